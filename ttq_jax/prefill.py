"""Stages 2 to 4: read the prompt; per layer observe, scale, quantize.

Everything happens inside the scan over the layers, so only one layer's activations, Gram matrix
and unpacked codes are alive at a time. Where a kernel does the rounding, each weight is read once,
for both the product with the prompt and the codes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ttq_jax.config import ModelConfig
from ttq_jax.experts import Routed, for_each_expert, for_own_experts, routed_linear
from ttq_jax.linear import add_bias, linear
from ttq_jax.models.cache import activation_dtype, empty_cache, map_rows
from ttq_jax.models.decoder import forward, plain
from ttq_jax.partition import put
from ttq_jax.quant.head import head_bits, pack_head
from ttq_jax.quant.moments import Reads, observe_expert
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.source import blend, blend_all, blend_expert
from ttq_jax.quant.streams import apart
from ttq_jax.quant.tree import (
    at_its_width,
    gather_widths,
    quantize_layer,
    quantize_tree,
    replace_kernels,
)
from ttq_jax.types import (
    EXPERT_SITES,
    SITE_OF,
    Cache,
    Moments,
    Offline,
    Params,
    Prompts,
    Stacked,
)


def last_hidden(hidden: Float[Array, "B T D"], prompts: Prompts) -> Float[Array, "B D"]:
    """The hidden state of each row's last real token."""
    length = prompts.valid.shape[1]
    last = length - 1 - jax.lax.argmax(prompts.valid[:, ::-1], 1, jnp.int32)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def observing(valid: Bool[Array, "B T"], reads: Reads) -> Callable[..., Any]:
    """A `Project` that multiplies and keeps the moments of each site's input, or expert's."""

    def project(
        site: str, x: Array | Routed, weights: dict[str, Params]
    ) -> tuple[dict[str, Array], Moments]:
        def make(expert: Array | None, _: None) -> Moments:
            return observe_expert(x, valid, reads, expert)

        return plain(site, x, weights)[0], for_each_expert(make, None, n_experts(x))

    return project


def n_experts(x: Array | Routed) -> int | None:
    """How many experts these activations are sorted by; None for plain ones."""
    return x.n_experts if isinstance(x, Routed) else None


def prefill(
    params: Params,
    prompts: Prompts,
    cache: Cache,
    *,
    config: ModelConfig,
    recipe: Recipe | None,
    offline: Offline,
) -> tuple[Float[Array, "B T D"], Cache, Params, dict[str, Moments], Float[Array, ""] | None]:
    """Reads the prompts and quantizes the weights on the way.

    Args:
      params: the dense tree.
      prompts: the batch; moments are pooled over it.
      cache: empty, with at least T slots.
      config: the model's.
      recipe: how to quantize; None keeps the weights as they are.
      offline: what the recipe needs besides the prompt.

    Returns:
      Final hidden states, the cache, the tree to decode from; per site the moments so far, stacked
      over the layers, without the prior ({} unless `recipe.source.keeps`); and the share of the
      experts that no token reached, which were quantized by the prior (None where there are no
      experts, or the recipe reads nothing of the prompt).

    Raises:
      ValueError: the tree is packed already, its tables are in another width than the recipe's, or
        `offline` has no prior for experts.
    """
    if recipe is not None and head_bits(params) != recipe.head:
        raise ValueError(
            f"head: expected a tree with tables of {recipe.head} bits, got {head_bits(params)} "
            "(None is dense); pass what quant.head.joined makes of a model's tree and of what "
            "prepare() returns"
        )
    if recipe is not None and offline.packed is None:
        check_prior(config, recipe, offline)
    return _prefill(params, prompts, cache, config, recipe, offline)


def check_prior(config: ModelConfig, recipe: Recipe, offline: Offline) -> None:
    """Refuses a mixture without a prior for experts that a prompt may not reach.

    Args:
      config: the model's.
      recipe: how to quantize.
      offline: what the recipe needs besides the prompt.

    Raises:
      ValueError: there is none.
    """
    if not (config.n_experts and _reads_prompt(recipe)):
        return
    selected = {SITE_OF[name] for name in SITE_OF if recipe.selects(name)}
    lacking = [site for site in EXPERT_SITES if site in selected - set(offline.moments)]
    if lacking:
        raise ValueError(
            f"{lacking[0]}: expected a prior for experts that no token reaches, got none; pass "
            "what prepare() returns as offline"
        )


def _reads_prompt(recipe: Recipe) -> bool:
    """Whether what the weights become depends on the prompt."""
    return recipe.source.of == "prompt" and recipe.reads != Reads()


def _prefill(
    params: Params, prompts: Prompts, cache: Cache, config: ModelConfig, recipe: Recipe | None,
    offline: Offline,
) -> tuple[Array, Cache, Params, dict[str, Moments], Array | None]:  # fmt: skip
    """`prefill`, also for shapes alone, to which no prior matters."""
    length = prompts.tokens.shape[1]

    def read(tree: Params, **project: Any) -> tuple[Array, Cache, dict[str, Any]]:
        return forward(config, tree, prompts.tokens, prompts.valid, cache, slots=length, **project)

    if recipe is None or offline.packed is not None:
        packed = params if offline.packed is None else offline.packed
        reader = params if recipe is None or recipe.prefill == "full" else packed
        hidden, cache, _ = read(reader)
        return hidden, cache, packed, {}, None
    project = quantizing(prompts.valid, config, recipe)
    rows = None if recipe.prefill != "both" else len(prompts.tokens)
    if rows is not None:
        prompts, cache = _twice(prompts, cache)
    hidden, cache, kept = read(params, project=project, per_layer=offline)
    if rows is not None:
        hidden, cache = hidden[:rows], map_rows(lambda a: a[:rows], cache)
    packed = {name: kernel for site, *_ in kept.values() for name, kernel in site.items()}
    moments = {site: seen for site, (_, seen, _) in kept.items() if seen is not None}
    shares = [jnp.mean(share) for _, _, share in kept.values() if share is not None]
    tree = replace_kernels(params, gather_widths(packed, recipe))
    return hidden, cache, tree, moments, shares[0] if shares else None


def _twice(prompts: Prompts, cache: Cache) -> tuple[Prompts, Cache]:
    """Each prompt once more, for a second stream: rows B to 2 B."""

    def twice(a: Array) -> Array:
        return jnp.concatenate([a, a])

    return Prompts(twice(prompts.tokens), twice(prompts.valid)), map_rows(twice, cache)


def quantizing(
    valid: Bool[Array, "B T"], config: ModelConfig, recipe: Recipe
) -> Callable[..., Any]:
    """A `Project` that observes, quantizes and multiplies, given a layer's `Offline`.

    Args:
      valid: the prompts' real tokens.
      config: the model's.
      recipe: how to quantize; with both streams it is given the activations of either.

    Returns:
      It keeps (packed weights; moments or None; share of unreached experts or None).
    """
    source, reads_prompt = recipe.source, _reads_prompt(recipe)
    both = recipe.prefill == "both"

    def project(
        site: str, x: Any, weights: dict[str, Params], layer: Offline
    ) -> tuple[dict[str, Array], tuple[dict[str, Any], Moments | None, Array | None]]:
        stacks, at = _dense({n: w["kernel"] for n, w in weights.items() if recipe.selects(n)})
        routed = isinstance(x, Routed)
        streams = apart(x, valid, recipe.correction) if both else None
        seen_by = x if streams is None else streams.drifted

        def make(
            expert: Array | None, here: Array | None, mine: tuple, stacks: dict[str, Array]
        ) -> tuple[dict, dict, Moments | None]:
            moments, carried, low_rank = mine
            seen = None
            if source.of == "prompt":
                seen = observe_expert(seen_by, valid, recipe.reads, expert)
                if carried is not None:
                    seen = seen + carried.scaled(source.decay)
                mix = blend if expert is None else blend_expert
                moments = mix(seen, moments, source)
            if not stacks:
                return {}, {}, seen
            beside = None if routed else streams or x
            ys, packed = quantize_layer(
                stacks, moments, recipe, low_rank, layer=at, expert=here, x=beside
            )
            return ys, packed, seen

        factors = {name: layer.low_rank[name] for name in stacks if name in layer.low_rank}
        mine = (layer.moments.get(site), layer.carried.get(site), factors)
        ys, packed, seen = for_own_experts(make, mine, stacks, n_experts(x))
        if routed:
            made = packed if recipe.prefill == "quantized" else {}
            ys = routed_linear(x, weights | _as_weights(made, recipe, config.n_layers, at))
        for name, w in weights.items():
            if name not in ys:
                ys[name] = linear(x, w["kernel"], w.get("bias"))
            elif not routed:
                ys[name] = add_bias(ys[name], w.get("bias")).astype(x.dtype)
        none_seen = routed and reads_prompt and stacks
        unreached = jnp.mean(seen.count == 0, dtype=jnp.float32) if none_seen else None
        return ys, (packed, seen if source.keeps else None, unreached)

    return project


def _dense(kernels: dict[str, Any]) -> tuple[dict[str, Array], Any]:
    """The stacks of a site's dense kernels, and the layer's index.

    Raises:
      ValueError: one is packed.
    """
    for name, kernel in kernels.items():
        if not isinstance(kernel, Stacked):
            raise ValueError(
                f"{name}: expected a dense weight to quantize, got a packed one; pass the tree "
                "that load() returned"
            )
    layer = next((kernel.layer for kernel in kernels.values()), None)
    return {name: kernel.kernels for name, kernel in kernels.items()}, layer


def _as_weights(
    packed: dict[str, Any], recipe: Recipe, n_layers: int, layer: Any
) -> dict[str, Params]:
    """One layer's packed experts as a site's weights."""
    return {
        name: {"kernel": at_its_width(name, one, recipe, n_layers, layer)}
        for name, one in packed.items()
    }


def requantize(
    params: Params, seen: dict[str, Moments], recipe: Recipe, offline: Offline
) -> Params:
    """Quantizes the weights again, from moments that include the generated tokens.

    Args:
      params: the dense tree.
      seen: per site, stacked over the layers, without the prior.
      recipe: how to quantize.
      offline: what the recipe needs besides the prompt.

    Returns:
      The tree with packed kernels.
    """
    moments = {
        site: blend_all(one, offline.moments.get(site), recipe.source) for site, one in seen.items()
    }
    return quantize_tree(params, recipe, moments, offline.low_rank)


def decoded_shapes(
    params: Params, config: ModelConfig, recipe: Recipe | None, offline: Offline
) -> Params:
    """Shapes and dtypes of the tree that `prefill` returns, without computing it.

    Args:
      params: the dense tree, or its shapes; its tables may be packed already.
      config: the model's.
      recipe: how it would be quantized.
      offline: what the recipe needs besides the prompts.

    Returns:
      A tree of `jax.ShapeDtypeStruct`; `effective_bits` and `stored_bytes` take it.
    """

    def run(params: Params, offline: Offline) -> Params:
        if recipe is not None and recipe.head is not None and head_bits(params) is None:
            params = {**params, **pack_head(params, recipe.head)}
        cache = empty_cache(config, 1, 1, activation_dtype(params))
        prompts = Prompts(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
        return _prefill(params, prompts, cache, config, recipe, offline)[2]

    return jax.eval_shape(run, params, dataclasses.replace(offline, head=None))


def first_turn(params: Params, config: ModelConfig, recipe: Recipe) -> dict[str, Moments]:
    """The moments that the first turn of a conversation starts from: zeros.

    Args:
      params: the dense tree, or its shapes.
      config: the model's.
      recipe: one with a decay.

    Returns:
      Per site, stacked over the layers; what `Offline.carried` takes.
    """

    def run(params: Params) -> dict[str, Moments]:
        valid = jnp.ones((1, 1), bool)
        cache = empty_cache(config, 1, 1, activation_dtype(params))
        see = observing(valid, recipe.reads)
        return forward(config, params, valid.astype(jnp.int32), valid, cache, project=see)[2]

    shapes = jax.eval_shape(run, params)
    return put(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))

"""Stages 2 to 4: read the prompt; per layer observe, scale, quantize.

Everything happens inside the scan over the layers, so only one layer's activations, Gram matrix
and unpacked codes are alive at a time. Where a kernel does the rounding, each weight is read once,
for both the product with the prompt and the codes. A long prompt may be read in parts, see
`models.chunks`: each part reads the weight, and their moments' sum quantizes it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.models.cache import activation_dtype, empty_cache, map_rows
from ttq_jax.models.chunks import Chunks, check_size
from ttq_jax.models.decoder import forward, plain
from ttq_jax.partition import put
from ttq_jax.quant.head import head_bits, pack_head
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.source import blend_all
from ttq_jax.quant.tree import gather_widths, quantize_tree, replace_kernels
from ttq_jax.sites import observing, quantizing, quantizing_after, reads_prompt
from ttq_jax.types import EXPERT_SITES, SITE_OF, Cache, Moments, Offline, Params, Prompts


def last_hidden(hidden: Float[Array, "B T D"], prompts: Prompts) -> Float[Array, "B D"]:
    """The hidden state of each row's last real token."""
    length = prompts.valid.shape[1]
    last = length - 1 - jax.lax.argmax(prompts.valid[:, ::-1], 1, jnp.int32)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def prefill(
    params: Params,
    prompts: Prompts,
    cache: Cache,
    *,
    config: ModelConfig,
    recipe: Recipe | None,
    offline: Offline,
    chunk: int = 0,
) -> tuple[Float[Array, "B T D"], Cache, Params, dict[str, Moments], Float[Array, ""] | None]:
    """Reads the prompts and quantizes the weights on the way.

    Args:
      params: the dense tree.
      prompts: the batch; moments are pooled over it.
      cache: empty, with at least T slots.
      config: the model's.
      recipe: how to quantize; None keeps the weights as they are.
      offline: what the recipe needs besides the prompt.
      chunk: longer prompts are read in parts of so many tokens, see `models.chunks`; 0 for whole.

    Returns:
      Final hidden states, the cache, the tree to decode from; per site the moments so far, stacked
      over the layers, without the prior ({} unless `recipe.source.keeps`); and the share of the
      experts that no token reached, which were quantized by the prior (None where there are no
      experts, or the recipe reads nothing of the prompt).

    Raises:
      ConfigError: a chunk out of range, or with a recipe that it does not go with.
      ValueError: the tree is packed already, its tables are in another width than the recipe's, or
        `offline` has no prior for experts.
    """
    check_chunk(chunk, recipe, unpacked=offline.packed is None)
    if recipe is not None and head_bits(params) != recipe.head:
        raise ValueError(
            f"head: expected a tree with tables of {recipe.head} bits, got {head_bits(params)} "
            "(None is dense); pass what quant.head.joined makes of a model's tree and of what "
            "prepare() returns"
        )
    if recipe is not None and offline.packed is None:
        check_prior(config, recipe, offline)
    return _prefill(params, prompts, cache, config, recipe, offline, chunk)


def check_chunk(chunk: int, recipe: Recipe | None, *, unpacked: bool = False) -> None:
    """Refuses parts of a prompt that the recipe cannot be served in.

    Args:
      chunk: see `prefill`.
      recipe: how to quantize.
      unpacked: whether weights are quantized on the way, though the prompt does not decide how.

    Raises:
      ConfigError: out of range, or the prompt is read by weights that are made on the way.
    """
    check_size(chunk)
    if not chunk or recipe is None or recipe.prefill == "full":
        return
    if unpacked or recipe.source.of == "prompt":
        raise ConfigError(
            f"prefill_chunk: with prefill = {recipe.prefill!r} the quantized weights of a "
            "projection read the prompt, and they are known when the whole prompt has reached it; "
            "set prefill to full, as ttq, fast and best do, or leave out the chunk"
        )


def check_prior(config: ModelConfig, recipe: Recipe, offline: Offline) -> None:
    """Refuses a mixture without a prior for experts that a prompt may not reach.

    Args:
      config: the model's.
      recipe: how to quantize.
      offline: what the recipe needs besides the prompt.

    Raises:
      ValueError: there is none.
    """
    if not (config.n_experts and reads_prompt(recipe)):
        return
    selected = {SITE_OF[name] for name in SITE_OF if recipe.selects(name)}
    lacking = [site for site in EXPERT_SITES if site in selected - set(offline.moments)]
    if lacking:
        raise ValueError(
            f"{lacking[0]}: expected a prior for experts that no token reaches, got none; pass "
            "what prepare() returns as offline"
        )


def _prefill(
    params: Params, prompts: Prompts, cache: Cache, config: ModelConfig, recipe: Recipe | None,
    offline: Offline, chunk: int = 0,
) -> tuple[Array, Cache, Params, dict[str, Moments], Array | None]:  # fmt: skip
    """`prefill`, also for shapes alone, to which no prior matters."""
    length = prompts.tokens.shape[1]

    def read(tree: Params, **how: Any) -> tuple[Array, Cache, dict[str, Any]]:
        return forward(config, tree, prompts.tokens, prompts.valid, cache, slots=length, **how)

    if recipe is None or offline.packed is not None:
        packed = params if offline.packed is None else offline.packed
        reader = params if recipe is None or recipe.prefill == "full" else packed
        hidden, cache, _ = read(reader, chunks=reading(chunk, length))
        return hidden, cache, packed, {}, None
    how: dict[str, Any]
    if 0 < chunk < length:
        how = {"chunks": quantizing_after(chunk, config, recipe)}
    else:
        how = {"project": quantizing(prompts.valid, config, recipe)}
    rows = None if recipe.prefill != "both" else len(prompts.tokens)
    if rows is not None:
        prompts, cache = _twice(prompts, cache)
    hidden, cache, kept = read(params, per_layer=offline, **how)
    if rows is not None:
        hidden, cache = hidden[:rows], map_rows(lambda a: a[:rows], cache)
    packed = {name: kernel for site, *_ in kept.values() for name, kernel in site.items()}
    moments = {site: seen for site, (_, seen, _) in kept.items() if seen is not None}
    shares = [jnp.mean(share) for _, _, share in kept.values() if share is not None]
    tree = replace_kernels(params, gather_widths(packed, recipe))
    return hidden, cache, tree, moments, shares[0] if shares else None


def reading(chunk: int, length: int) -> Chunks | None:
    """How tokens are read that nothing is kept of.

    Args:
      chunk: see `prefill`.
      length: T.

    Returns:
      For `forward`; None to read them at once.
    """
    if not 0 < chunk < length:
        return None
    return Chunks(chunk, lambda valid: plain, lambda site, kept, *_: kept)


def _twice(prompts: Prompts, cache: Cache) -> tuple[Prompts, Cache]:
    """Each prompt once more, for a second stream: rows B to 2 B."""

    def twice(a: Array) -> Array:
        return jnp.concatenate([a, a])

    return Prompts(twice(prompts.tokens), twice(prompts.valid)), map_rows(twice, cache)


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

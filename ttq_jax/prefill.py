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
from ttq_jax.linear import add_bias, linear
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, plain
from ttq_jax.quant.moments import Reads, observe
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.source import Source, blend
from ttq_jax.quant.tree import gather_widths, quantize_layer, quantize_tree, replace_kernels
from ttq_jax.types import Cache, Moments, Offline, Params, Prompts, Stacked


def last_hidden(hidden: Float[Array, "B T D"], prompts: Prompts) -> Float[Array, "B D"]:
    """The hidden state of each row's last real token."""
    length = prompts.valid.shape[1]
    last = length - 1 - jax.lax.argmax(prompts.valid[:, ::-1], 1, jnp.int32)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def observing(valid: Bool[Array, "B T"], reads: Reads) -> Callable[..., Any]:
    """A `Project` that multiplies and keeps the moments of each site's input."""

    def project(
        site: str, x: Array, weights: dict[str, Params]
    ) -> tuple[dict[str, Array], Moments]:
        return plain(site, x, weights)[0], observe(x, valid, reads)

    return project


def prefill(
    params: Params,
    prompts: Prompts,
    cache: Cache,
    *,
    config: ModelConfig,
    recipe: Recipe | None,
    offline: Offline,
) -> tuple[Float[Array, "B T D"], Cache, Params, dict[str, Moments]]:
    """Reads the prompts and quantizes the weights on the way.

    Args:
      params: the dense tree.
      prompts: the batch; moments are pooled over it.
      cache: empty, with at least T slots.
      config: the model's.
      recipe: how to quantize; None keeps the weights as they are.
      offline: what the recipe needs besides the prompt.

    Returns:
      Final hidden states, the cache, the tree to decode from, and per site the moments so far,
      stacked over the layers, without the prior ({} unless `recipe.source.keeps`).

    Raises:
      ValueError: the tree is packed already.
    """
    length = prompts.tokens.shape[1]

    def read(tree: Params, **project: Any) -> tuple[Array, Cache, dict[str, Any]]:
        return forward(config, tree, prompts.tokens, prompts.valid, cache, slots=length, **project)

    if recipe is None or offline.packed is not None:
        packed = params if offline.packed is None else offline.packed
        reader = params if recipe is None or recipe.prefill == "full" else packed
        hidden, cache, _ = read(reader)
        return hidden, cache, packed, {}
    source = recipe.source

    def project(
        site: str, x: Array, weights: dict[str, Params], layer: Offline
    ) -> tuple[dict[str, Array], tuple[dict[str, Any], Moments | None]]:
        seen, moments = None, layer.moments.get(site)
        if source.of == "prompt":
            seen = observe(x, prompts.valid, recipe.reads)
            if site in layer.carried:
                seen = seen + layer.carried[site].scaled(source.decay)
            moments = blend(seen, moments, source)
        stacks, at = _dense({n: w["kernel"] for n, w in weights.items() if recipe.selects(n)})
        ys: dict[str, Array] = {}
        packed: dict[str, Any] = {}
        if stacks:
            ys, packed = quantize_layer(stacks, moments, recipe, layer.low_rank, layer=at, x=x)
        for name, w in weights.items():
            if name in ys:
                ys[name] = add_bias(ys[name], w.get("bias")).astype(x.dtype)
            else:
                ys[name] = linear(x, w["kernel"], w.get("bias"))
        return ys, (packed, seen if source.keeps else None)

    hidden, cache, kept = read(params, project=project, per_layer=offline)
    packed = {name: kernel for site, _ in kept.values() for name, kernel in site.items()}
    moments = {site: seen for site, (_, seen) in kept.items() if seen is not None}
    return hidden, cache, replace_kernels(params, gather_widths(packed, recipe)), moments


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
        site: jax.vmap(lambda s, p: blend(s, p, recipe.source))(one, offline.moments.get(site))
        for site, one in seen.items()
    }
    return quantize_tree(params, recipe, moments, offline.low_rank)


def decoded_shapes(
    params: Params, config: ModelConfig, recipe: Recipe | None, offline: Offline
) -> Params:
    """Shapes and dtypes of the tree that `prefill` returns, without computing it.

    Args:
      params: the dense tree, or its shapes.
      config: the model's.
      recipe: how it would be quantized.
      offline: what the recipe needs besides the prompts.

    Returns:
      A tree of `jax.ShapeDtypeStruct`; `effective_bits` and `stored_bytes` take it.
    """
    return _shapes(params, config, recipe, offline)[2]


def first_turn(params: Params, config: ModelConfig, recipe: Recipe) -> dict[str, Moments]:
    """The moments that the first turn of a conversation starts from: zeros.

    Args:
      params: the dense tree, or its shapes.
      config: the model's.
      recipe: one with a decay.

    Returns:
      Per site, stacked over the layers; what `Offline.carried` takes.
    """
    # Factors and priors change no moment's shape.
    plain_recipe = dataclasses.replace(
        recipe, low_rank=dataclasses.replace(recipe.low_rank, rank=0, weighted=False),
        moments=Source(decay=1.0),
    )  # fmt: skip
    shapes = _shapes(params, config, plain_recipe, Offline())[3]
    return jax.device_put(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))


def _shapes(
    params: Params, config: ModelConfig, recipe: Recipe | None, offline: Offline
) -> tuple[Any, Any, Params, dict[str, Moments]]:
    """What `prefill` returns, as shapes."""

    def run(params: Params, offline: Offline) -> tuple[Any, Any, Params, dict[str, Moments]]:
        cache = empty_cache(config, 1, 1, params["embed"]["embedding"].dtype)
        prompts = Prompts(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
        return prefill(params, prompts, cache, config=config, recipe=recipe, offline=offline)

    return jax.eval_shape(run, params, offline)

"""Stages 2 to 4: read the prompt; per layer observe, scale, quantize.

Everything happens inside the scan over the layers, so only one layer's activations and
unpacked codes are alive at a time; and each weight is read once, for both the prompt's product
and its codes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ttq_jax.config import ModelConfig
from ttq_jax.linear import add_bias, linear
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward
from ttq_jax.quant.convert import quantize_and_multiply, replace_kernels
from ttq_jax.quant.moments import observe
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import Cache, Offline, Params, Prompts, QuantizedLinear


def last_hidden(hidden: Float[Array, "B T D"], prompts: Prompts) -> Float[Array, "B D"]:
    """The hidden state of each row's last real token."""
    length = prompts.valid.shape[1]
    last = length - 1 - jnp.argmax(prompts.valid[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def prefill(
    params: Params,
    prompts: Prompts,
    cache: Cache,
    *,
    config: ModelConfig,
    recipe: Recipe | None,
    offline: Offline,
) -> tuple[Float[Array, "B T D"], Cache, Params]:
    """Reads the prompts and quantizes the weights on the way.

    Args:
      params: the dense tree.
      prompts: the batch; moments are pooled over it.
      cache: empty, with at least T slots.
      config: the model's.
      recipe: how to quantize; None keeps the weights as they are.
      offline: what the recipe needs besides the prompt.

    Returns:
      Final hidden states, the cache, and the tree to decode from.

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
        return hidden, cache, packed

    def project(
        site: str, x: Array, weights: dict[str, Params], layer: Offline
    ) -> tuple[dict[str, Array], dict[str, QuantizedLinear]]:
        moments = layer.moments.get(site)
        if recipe.moments == "prompt":
            moments = observe(x, prompts.valid, recipe.powers)
        ys, packed = {}, {}
        for name, w in weights.items():
            kernel, bias = w["kernel"], w.get("bias")
            if isinstance(kernel, QuantizedLinear):
                raise ValueError(f"{name} is packed already; prefill quantizes a dense tree")
            if not recipe.selects(name):
                ys[name] = linear(x, kernel, bias)
                continue
            y, packed[name] = quantize_and_multiply(
                x, kernel.kernels, moments, recipe, layer.low_rank.get(name), layer=kernel.layer
            )
            ys[name] = add_bias(y, bias).astype(x.dtype)
        return ys, packed

    hidden, cache, kept = read(params, project=project, per_layer=offline)
    packed = {name: kernel for site in kept.values() for name, kernel in site.items()}
    return hidden, cache, replace_kernels(params, packed)


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

    def tree(params: Params, offline: Offline) -> Params:
        cache = empty_cache(config, 1, 1, params["embed"]["embedding"].dtype)
        prompts = Prompts(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
        return prefill(params, prompts, cache, config=config, recipe=recipe, offline=offline)[2]

    return jax.eval_shape(tree, params, offline)

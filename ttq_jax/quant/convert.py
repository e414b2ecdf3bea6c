"""The composition: moments -> scale -> rounding -> packed weight.

R = W − BA                 what is left for the codes
D = scale(moments)         one positive number per input channel
Q = round(D · R)           group-wise, on the grid
Ŵ = Q / D + BA             arXiv:2603.19296; the division is done on the activation
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import prefill_quantize, quantize_pack
from ttq_jax.quant.grid import decode, encode, fit, split_groups, store
from ttq_jax.quant.lowrank import factor_layers
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.scaling import NoScale
from ttq_jax.types import SITE_OF, LowRank, Moments, Offline, Params, QuantizedLinear


def _ingredients(
    w: Array, moments: Moments | None, recipe: Recipe, low_rank: LowRank | None, layer: Any
) -> tuple[Array | None, Array | None, LowRank | None]:
    """D as stored, the weight of each row's squared error, and the factors as stored."""
    grid, rows = recipe.grid, recipe.grid.rows_per_group(w.shape[-2])
    if low_rank is not None:
        low_rank = jax.tree.map(partial(store, grid=grid), low_rank)
    second = moments.mean_power(2.0) if moments and 2.0 in moments.powers else None
    if isinstance(recipe.scale, NoScale):
        return None, second, low_rank
    assert moments is not None, "Recipe refuses a scale without moments"
    residual = _residual(w, low_rank, layer)

    def trial(d: Array) -> Array:
        assert second is not None, "a scale that is searched reads the second moment"
        groups = split_groups(residual * d[:, None], rows)
        scales, zeros = fit(groups, grid)
        error = jnp.square(groups - decode(encode(groups, scales, zeros, grid), scales, zeros))
        return jnp.einsum("gr,grn->", split_groups(second / jnp.square(d), rows), error)

    channel_scale = store(recipe.scale(moments, trial), grid)
    if second is not None:
        second = second / jnp.square(channel_scale.astype(jnp.float32))
    return channel_scale, second, low_rank


def _residual(w: Array, low_rank: LowRank | None, layer: Any) -> Float[Array, "d_in d_out"]:
    """W − BA of one layer, float32."""
    if layer is not None:
        w = jax.lax.dynamic_index_in_dim(w, layer, keepdims=False)
    if low_rank is None:
        return w.astype(jnp.float32)
    down, up = (factor.astype(jnp.float32) for factor in (low_rank.down, low_rank.up))
    return w.astype(jnp.float32) - down @ up


def quantize(
    w: Float[Array, "*L d_in d_out"],
    moments: Moments | None,
    recipe: Recipe,
    low_rank: LowRank | None = None,
    *,
    layer: Array | int | None = None,
) -> QuantizedLinear:
    """Quantizes one weight; pure and jittable.

    Args:
      w: the weight; with a leading axis over layers if `layer` is given.
      moments: of the layer's inputs, with `recipe.powers`; None if the recipe reads none.
      recipe: how.
      low_rank: factors of BA, or None.
      layer: which one of stacked weights; moments and factors are its own. None: not stacked.

    Returns:
      The packed weight, of one layer.
    """
    channel_scale, importance, low_rank = _ingredients(w, moments, recipe, low_rank, layer)
    packed = quantize_pack(
        w, channel_scale, importance, _factors(low_rank), **recipe.grid.packing(w.shape[-2]),
        shrinks=recipe.rounding.shrinks, layer=layer,
    )  # fmt: skip
    return _assembled(packed, channel_scale, low_rank, recipe, w)


def quantize_and_multiply(
    x: Float[Array, "*batch d_in"],
    w: Float[Array, "*L d_in d_out"],
    moments: Moments | None,
    recipe: Recipe,
    low_rank: LowRank | None = None,
    *,
    layer: Array | int | None = None,
) -> tuple[Float[Array, "*batch d_out"], QuantizedLinear]:
    """The prompt's product with a weight, and the weight quantized, from one read of it.

    Args:
      x: activations.
      w: see `quantize`, as the arguments after it.
      moments: see `quantize`.
      recipe: how; its `prefill` says which weight is multiplied, the given or the quantized one.
      low_rank: see `quantize`.
      layer: see `quantize`.

    Returns:
      (x·W without a bias in x's dtype, the packed weight of one layer).
    """
    channel_scale, importance, low_rank = _ingredients(w, moments, recipe, low_rank, layer)
    y, packed = prefill_quantize(
        x, w, channel_scale, importance, _factors(low_rank), **recipe.grid.packing(w.shape[-2]),
        shrinks=recipe.rounding.shrinks, quantized=recipe.prefill == "quantized", layer=layer,
    )  # fmt: skip
    return y, _assembled(packed, channel_scale, low_rank, recipe, w)


def _factors(low_rank: LowRank | None) -> tuple[Array, Array] | None:
    return None if low_rank is None else (low_rank.down, low_rank.up)


def _assembled(
    packed: Any, channel_scale: Array | None, low_rank: LowRank | None, recipe: Recipe, w: Array
) -> QuantizedLinear:
    """The kernels' arrays, and what it takes to read them."""
    planes, scales, zeros = packed
    d_in, d_out = w.shape[-2:]
    return QuantizedLinear(
        planes=planes,
        scales=scales,
        zeros=zeros,
        channel_scale=channel_scale,
        low_rank=low_rank,
        bits=recipe.grid.bits,
        group_size=recipe.grid.rows_per_group(d_in),
        d_in=d_in,
        d_out=d_out,
    )


def replace_kernels(params: Params, packed: dict[str, Any]) -> Params:
    """The tree with some projections' kernels replaced; everything else is shared."""
    layers = params["layers"]
    new = {name: {**layers[name], "kernel": kernel} for name, kernel in packed.items()}
    return {**params, "layers": {**layers, **new}}


def static_factors(params: Params, recipe: Recipe | None) -> dict[str, LowRank]:
    """The low-rank factors that a recipe keeps, computed once per model.

    Args:
      params: a dense tree.
      recipe: its rank and selection are used.

    Returns:
      Per selected projection, factors stacked over the layers; {} at rank 0.
    """
    if recipe is None or not recipe.low_rank.rank:
        return {}
    return {
        name: factor_layers(leaf["kernel"], recipe.low_rank.rank)
        for name, leaf in params["layers"].items()
        if "kernel" in leaf and recipe.selects(name)
    }


@partial(jax.jit, static_argnames="recipe")
def quantize_params(params: Params, recipe: Recipe, offline: Offline) -> Params:
    """Quantizes a whole tree ahead of any prompt, one layer at a time.

    Args:
      params: a dense tree.
      recipe: its moments must not be the prompt's.
      offline: the corpus's moments and the static factors that the recipe reads.

    Returns:
      The tree with packed kernels.

    Raises:
      ValueError: the recipe needs a prompt.
    """
    if recipe.moments == "prompt":
        raise ValueError(
            "this recipe's moments are the prompt's: use generate(…, recipe=…), which quantizes "
            "during prefill, or a recipe with moments 'corpus' or 'none'"
        )

    packed: dict[str, Any] = {}
    for name, leaf in params["layers"].items():
        if "kernel" in leaf and recipe.selects(name):
            stack = leaf["kernel"]
            moments = offline.moments[SITE_OF[name]] if recipe.powers else None
            packed[name] = jax.lax.map(
                lambda at, stack=stack: quantize(stack, at[1], recipe, at[2], layer=at[0]),
                (jnp.arange(stack.shape[0]), moments, offline.low_rank.get(name)),
            )
    return replace_kernels(params, packed)

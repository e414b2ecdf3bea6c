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

from pallas_kernels import pack
from ttq_jax.quant.grid import Nearest, decode, split_groups, store
from ttq_jax.quant.lowrank import factor_layers
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.scaling import NoScale
from ttq_jax.types import SITE_OF, LowRank, Moments, Offline, Params, QuantizedLinear


def quantize(
    w: Float[Array, "d_in d_out"],
    moments: Moments | None,
    recipe: Recipe,
    low_rank: LowRank | None = None,
) -> QuantizedLinear:
    """Quantizes one weight; pure and jittable.

    Args:
      w: the weight.
      moments: of the layer's inputs, with `recipe.powers`; None if the recipe reads none.
      recipe: how.
      low_rank: factors of BA, or None.

    Returns:
      The packed weight.
    """
    grid, rows = recipe.grid, recipe.grid.rows_per_group(w.shape[0])
    residual = w.astype(jnp.float32)
    if low_rank is not None:
        low_rank = jax.tree.map(partial(store, grid=grid), low_rank)
        down, up = low_rank.down.astype(jnp.float32), low_rank.up.astype(jnp.float32)
        residual = residual - down @ up
    second = moments.mean_power(2.0) if moments and 2.0 in moments.powers else None

    def scaled(d: Array) -> tuple[Array, Array | None]:
        """D·R in groups, and the weight of each row's squared error there."""
        importance = None if second is None else split_groups(second / jnp.square(d), rows)
        return split_groups(residual * d[:, None], rows), importance

    def trial(d: Array) -> Array:
        groups, importance = scaled(d)
        codes, scales, zeros = Nearest()(groups, importance, grid)
        error = jnp.square(groups - decode(codes, scales, zeros, grid))
        return jnp.einsum("gr,grn->", importance, error)

    channel_scale = None
    groups, importance = scaled(jnp.ones(w.shape[0]))
    if not isinstance(recipe.scale, NoScale):
        assert moments is not None, "Recipe refuses a scale without moments"
        channel_scale = store(recipe.scale(moments, trial), grid)
        groups, importance = scaled(channel_scale.astype(jnp.float32))
    codes, scales, zeros = recipe.rounding(groups, importance, grid)
    codes = codes.reshape(-1, w.shape[1])
    return QuantizedLinear(
        planes=pack(codes, bits=grid.bits, group_size=rows),
        scales=scales,
        zeros=zeros,
        channel_scale=channel_scale,
        low_rank=low_rank,
        bits=grid.bits,
        group_size=rows,
        d_in=w.shape[0],
        d_out=w.shape[1],
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

    def one_layer(layer: tuple[Array, Moments | None, LowRank | None]) -> QuantizedLinear:
        kernel, moments, low_rank = layer
        return quantize(kernel, moments, recipe, low_rank)

    packed: dict[str, Any] = {}
    for name, leaf in params["layers"].items():
        if "kernel" in leaf and recipe.selects(name):
            moments = offline.moments[SITE_OF[name]] if recipe.powers else None
            packed[name] = jax.lax.map(
                one_layer, (leaf["kernel"], moments, offline.low_rank.get(name))
            )
    return replace_kernels(params, packed)

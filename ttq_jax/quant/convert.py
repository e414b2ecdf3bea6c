"""The composition: moments -> scale -> rounding -> packed weight.

R = W − BA                 what is left for the codes
D = scale(moments)         one positive number per input channel
Q = round(D · R)           group-wise, on the grid
Ŵ = Q / D + BA             arXiv:2603.19296; the division is done on the activation
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import Split, by_columns, pack, prefill_quantize, quantize_pack
from ttq_jax.linear import dense_weight, linear
from ttq_jax.mesh import check_rows
from ttq_jax.partition import SPLITS
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.grid import (
    Grid,
    Nearest,
    decode,
    encode,
    fit,
    for_weight,
    split_groups,
    store,
    with_columns,
    write,
)
from ttq_jax.quant.half_quadratic import HalfQuadratic
from ttq_jax.quant.lowrank import (
    LowRankRule,
    error_factors,
    joined,
    mean_factors,
    stored_factors,
)
from ttq_jax.quant.moments import Reads, about_mean, gram_blocks, mean_input
from ttq_jax.quant.recipe import KernelRounding, Recipe, has_kernel
from ttq_jax.quant.scaling import NoScale
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.quant.streams import Streams
from ttq_jax.types import LowRank, Moments, QuantizedLinear, Stacked


@dataclasses.dataclass(frozen=True)
class _Ready:
    """One projection with everything decided except its codes.

    Attributes:
      stack: the weight as given, maybe stacked over layers.
      layer: its index in the stack, or None.
      factors: the static low-rank factors as stored, or None.
      scale: D as stored, [d_in], or None.
      grid: the codes' grid.
      split: how the devices of a mesh share it; None on one.
    """

    stack: Array
    layer: Any
    factors: LowRank | None
    scale: Array | None
    grid: Grid
    split: Split | None = None

    @property
    def weight(self) -> Float[Array, "d_in d_out"]:
        """W, float32."""
        w = self.stack
        if self.layer is not None:
            w = jax.lax.dynamic_index_in_dim(w, self.layer, keepdims=False)
        return w.astype(jnp.float32)

    @property
    def residual(self) -> Float[Array, "d_in d_out"]:
        """W − BA, float32."""
        if self.factors is None:
            return self.weight
        down, up = (factor.astype(jnp.float32) for factor in self.factors.factors())
        return self.weight - jnp.matmul(down, up, precision="highest")

    @property
    def divisor(self) -> Float[Array, " d_in"]:
        """D in float32, ones if there is none."""
        if self.scale is None:
            return jnp.ones(self.stack.shape[-2], jnp.float32)
        return self.scale.astype(jnp.float32)


def _second(moments: Moments | None) -> Float[Array, " d_in"] | None:
    return moments.mean_power(2.0) if moments and 2.0 in moments.powers else None


def _trial(ready: _Ready, second: Array | None, d: Array) -> Float[Array, ""]:
    """The activation-weighted error that nearest rounding with D = d would leave."""
    assert second is not None, "a scale that is searched reads the second moment"
    rows = ready.grid.rows_per_group(len(d))
    groups = split_groups(ready.residual * d[:, None], rows)
    grid = for_weight(ready.grid, groups)
    scales, zeros = fit(groups, grid)
    codes = encode(groups, scales, zeros, grid)
    error = jnp.square(groups - decode(codes, scales, zeros))
    importance = split_groups(second / jnp.square(d), rows)
    return jnp.einsum("gr,grn->", importance, error, precision="highest")


def _scaled(ready: dict[str, _Ready], moments: Moments | None, recipe: Recipe) -> dict[str, _Ready]:
    """The projections of a site with their D; one D for all if the rule says so."""
    rule = recipe.scale
    if isinstance(rule, NoScale):
        return ready
    assert moments is not None, "Recipe refuses a scale without moments"
    second = _second(moments)

    def of(group: list[_Ready]) -> Array:
        def trial(d: Array) -> Array:
            return sum((_trial(one, second, d) for one in group), jnp.zeros((), jnp.float32))

        return store(rule(moments, trial), recipe.grid.store_dtype)

    if rule.shared:
        d = of(list(ready.values()))
        return {n: dataclasses.replace(one, scale=d) for n, one in ready.items()}
    return {n: dataclasses.replace(one, scale=of([one])) for n, one in ready.items()}


def _round_by_kernel(
    ready: _Ready, moments: Moments | None, rule: KernelRounding, x: Array | None, quantized: bool
) -> tuple[Array | None, QuantizedLinear]:
    """Nearest rounding and clip search by a kernel, which reads the weight once."""
    second, scale = _second(moments), ready.scale
    if second is not None and scale is not None:
        second = second / jnp.square(ready.divisor)
    factors = None if ready.factors is None else ready.factors.factors()
    how: dict[str, Any] = {
        **ready.grid.packing(ready.stack.shape[-2]),
        "shrinks": rule.shrinks,
        "refits": rule.refits,
        "layer": ready.layer,
        "split": ready.split,
    }
    if x is None:
        return None, _assembled(quantize_pack(ready.stack, scale, second, factors, **how), ready)
    y, packed = prefill_quantize(x, ready.stack, scale, second, factors, **how, quantized=quantized)
    return y, _assembled(packed, ready)


def _round_together(
    ready: list[_Ready], moments: Moments | None, rule: SecondOrder | HalfQuadratic
) -> list[QuantizedLinear]:
    """Roundings without a kernel; projections of one input, D and grid are one wide weight."""
    first, gram = ready[0], None
    d_in = first.stack.shape[-2]
    if rule.span:
        assert moments is not None, "Recipe refuses such a rounding without moments"
        block = Reads(span=rule.span).block(d_in)
        d = split_groups(first.divisor, block)
        gram = gram_blocks(moments, block) / jnp.where(d > 0, d, 1.0)[:, :, None]
        gram = gram / jnp.where(d > 0, d, 1.0)[:, None, :]
    elif 2.0 in rule.powers and (second := _second(moments)) is not None:
        gram = (second / jnp.square(first.divisor))[:, None, None]

    def of_columns(weights: tuple[Array, ...], gram: Array | None) -> tuple[Any, ...]:
        wide = jnp.concatenate(weights, axis=1)
        grid = for_weight(first.grid, split_groups(wide, first.grid.rows_per_group(d_in)))
        codes, scales, zeros = rule.round(wide, gram, grid)
        made, at = [], 0
        for w in weights:
            columns = slice(at, at := at + w.shape[-1])
            found = (codes[:, columns], scales[:, columns], zeros[:, columns])
            made.append((*found, grid.of(columns).columns))
        return tuple(made)

    weights = tuple(one.residual * one.divisor[:, None] for one in ready)
    made = by_columns(of_columns, weights, gram, splits=[one.split for one in ready])
    packed = []
    for one, (codes, scales, zeros, columns) in zip(ready, made, strict=True):
        blocks = 1 if one.split is None else one.split.row_blocks
        planes = pack(codes, bits=first.grid.bits, row_blocks=blocks)
        stored = write(scales, zeros, with_columns(first.grid, columns))
        packed.append(_assembled((planes, *stored), one))
    return packed


def _corrected(
    packed: QuantizedLinear, ready: _Ready, moments: Moments | None, rule: LowRankRule
) -> QuantizedLinear:
    """The packed weight, corrected by the parts of its error that the inputs excite most."""
    assert moments is not None, "Recipe refuses an error part without moments"

    def with_part(packed: QuantizedLinear, factors: LowRank) -> QuantizedLinear:
        found = stored_factors(factors, rule, ready.grid.store_dtype)
        return dataclasses.replace(packed, low_rank=joined(packed.low_rank, found))

    error = ready.weight - dense_weight(packed)
    if rule.mean:
        packed = with_part(packed, mean_factors(error, mean_input(moments)))
        error = ready.weight - dense_weight(packed)
    if rule.error_rank:
        d_in = len(error)
        gram = gram_blocks(moments, Reads(span=-1).block(d_in))[0, :d_in, :d_in]
        packed = with_part(packed, error_factors(error, gram, rule))
    return packed


def quantize_site(
    weights: dict[str, Array],
    moments: Moments | None,
    recipe: Recipe,
    low_rank: dict[str, LowRank],
    *,
    grids: dict[str, Grid] | None = None,
    layer: Array | int | None = None,
    x: Array | Streams | None = None,
    splits: dict[str, Split | None] | None = None,
) -> tuple[dict[str, Array], dict[str, QuantizedLinear]]:
    """Quantizes the projections that read one input; pure and jittable.

    Args:
      weights: by projection, [d_in, d_out]; with a leading axis over layers if `layer` is given.
      moments: of the input, with what `recipe.reads` says; None if the recipe reads nothing.
      recipe: how; its `prefill` says if the given weights multiply `x`, or the quantized ones.
      low_rank: static factors of BA by projection, where there are any.
      grids: by projection; None for the recipe's.
      layer: index of the layer, whose moments and factors these are; None if not stacked.
      x: activations [..., d_in] to be multiplied by the weights, or None; of two streams, X is
        multiplied by the weights as given, X̃ by the quantized ones.
      splits: by projection, how the devices of a mesh share it; None for as our own decoder's.

    Returns:
      ({projection: x·W without a bias} or {} without x, {projection: packed weight of one layer}).

    Raises:
      ConfigError: a group of input channels would lie on several devices.
    """
    if isinstance(x, Streams):
        return _in_both_streams(weights, moments, recipe, low_rank, grids, layer, x)
    rule, dtype = recipe.low_rank, recipe.grid.store_dtype
    ready = {}
    for name, w in weights.items():
        factors = low_rank.get(name)
        kept = None if factors is None else stored_factors(factors, rule, dtype)
        grid = grids[name] if grids else recipe.grid
        split = (SPLITS if splits is None else splits).get(name)
        split = None if split is None else split.here()
        check_rows(name, w.shape[-2], grid.group_size, split)
        ready[name] = _Ready(w, layer, kept, None, grid, split)
    about = about_mean(moments) if rule.mean and moments is not None else moments
    ready = _scaled(ready, about, recipe)
    ys: dict[str, Array] = {}
    packed: dict[str, QuantizedLinear] = {}
    rounding, quantized = recipe.rounding, recipe.prefill == "quantized"
    if has_kernel(rounding):
        for name, one in ready.items():
            y, packed[name] = _round_by_kernel(one, about, rounding, x, quantized)
            if y is not None:
                ys[name] = y
    else:
        assert not isinstance(rounding, Nearest | ClipSearch), "kernels round so"
        for names in _alike(ready, recipe):
            made = _round_together([ready[n] for n in names], about, rounding)
            packed |= dict(zip(names, made, strict=True))
    if rule.after:
        packed = {n: _corrected(p, ready[n], moments, rule) for n, p in packed.items()}
    if x is None:
        return {}, packed
    for name, one in ready.items():
        if quantized and (rule.after or name not in ys):
            ys[name] = linear(x, packed[name])
        elif name not in ys:
            ys[name] = linear(x, one.stack if layer is None else Stacked(one.stack, layer))
    return ys, packed


def _in_both_streams(
    weights: dict[str, Array], moments: Moments | None, recipe: Recipe,
    low_rank: dict[str, LowRank], grids: dict[str, Grid] | None, layer: Array | int | None,
    x: Streams,
) -> tuple[dict[str, Array], dict[str, QuantizedLinear]]:  # fmt: skip
    """`quantize_site` of the corrected weights, and the products of both streams, X first."""
    given = {n: w if layer is None else Stacked(w, layer) for n, w in weights.items()}
    moved = {n: x.moved(w.kernel if isinstance(w, Stacked) else w) for n, w in given.items()}
    _, packed = quantize_site(moved, moments, recipe, low_rank, grids=grids)

    def product(name: str) -> Array:
        return jnp.concatenate([linear(x.exact, given[name]), linear(x.drifted, packed[name])])

    return {name: product(name) for name in weights}, packed


def _alike(ready: dict[str, _Ready], recipe: Recipe) -> list[list[str]]:
    """Projections that can be rounded as one wide weight: the same D and the same grid."""
    if not recipe.scale.shared:
        return [[name] for name in ready]
    grids = dict.fromkeys(one.grid for one in ready.values())
    return [[n for n, one in ready.items() if one.grid == grid] for grid in grids]


def quantize(
    w: Float[Array, "*L d_in d_out"],
    moments: Moments | None,
    recipe: Recipe,
    low_rank: LowRank | None = None,
    *,
    layer: Array | int | None = None,
) -> QuantizedLinear:
    """Quantizes one weight, see `quantize_site`.

    Args:
      w: the weight; with a leading axis over layers if `layer` is given.
      moments: of the layer's inputs.
      recipe: how.
      low_rank: factors of BA, or None.
      layer: index of the layer; None if not stacked.

    Returns:
      The packed weight, of one layer.
    """
    factors = {} if low_rank is None else {"w": low_rank}
    return quantize_site({"w": w}, moments, recipe, factors, layer=layer)[1]["w"]


def _assembled(arrays: Any, ready: _Ready) -> QuantizedLinear:
    """The packed weight that these arrays make."""
    planes, scales, zeros = arrays
    d_in, d_out = ready.stack.shape[-2:]
    return QuantizedLinear(
        planes=planes,
        scales=scales,
        zeros=zeros,
        channel_scale=ready.scale,
        low_rank=ready.factors,
        bits=ready.grid.bits,
        group_size=ready.grid.rows_per_group(d_in),
        d_in=d_in,
        d_out=d_out,
        split=ready.split,
        row_blocks=1 if ready.split is None else ready.split.row_blocks,
    )

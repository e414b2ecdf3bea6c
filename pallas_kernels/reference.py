"""What every kernel computes, straight from the formulas: the oracle of all implementations.

The weight that planes, scales ``s``, zero points ``z``, a channel scale ``D`` and factors ``A, B``
stand for is, exactly,

    W[i, c] = s[i // g, c] * (q[i, c] - z[i // g, c]) / D[i] + (A B)[i, c]

with s and z as `grid.read` reads them: floating-point numbers, or eight or four bits each. A
prompt's activations are divided by ``D`` instead of the weight (arXiv:2603.19296): ``y = (x / D) Q
+ (x A) B``. Nothing here is tuned; `pallas_kernels.xla` is what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import grid, search
from pallas_kernels.grid import Scales
from pallas_kernels.layout import pack, unpack
from pallas_kernels.problem import Problem

_EXACT = jax.lax.Precision.HIGHEST

Packed = tuple[tuple[jax.Array, ...], Scales, jax.Array | None]
"""``(planes, scales, zeros)``: planes as `pack` returns them, scales ``[k // group_size, n]`` and
zero points of the same shape, None if symmetric or in the scales' bytes."""

LowRank = tuple[jax.Array, jax.Array]
"""``(A[d_in, r], B[r, n])``; in the paper's orientation these are Aᵀ and Bᵀ."""


def dequantize(
    planes: Sequence[jax.Array],
    scales: Scales,
    zeros: jax.Array | None,
    *,
    bits: int,
    group_size: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """The grid's part of a packed weight, ``s * (q - z)``.

    Args:
      planes: One ``uint8[..., k * width // 8, n]`` for each width in ``PLANES[bits]``, from `pack`.
      scales: ``[..., k // group_size, n]``; float32, bfloat16 or float16, or coded.
      zeros: As ``scales``, or uint8, see `grid.read`; None is symmetric, ``z = 2**(bits - 1)``, or
        beside `CodedPairs`.
      bits: Width of a code: 2, 3, 4, 5 or 8.
      group_size: Rows that share a scale: a multiple of 8 that divides ``k``.
      dtype: Of the result; the arithmetic is float32 whatever it is.

    Returns:
      ``[..., k, n]`` in ``dtype``.
    """
    codes = unpack(planes, bits=bits)
    *lead, k, n = codes.shape
    groups = codes.reshape(*lead, k // group_size, group_size, n).astype(jnp.float32)
    s, z = (jnp.asarray(a, jnp.float32) for a in grid.read(scales, zeros, bits=bits))
    weight = grid.decode(groups, s[..., None, :], z[..., None, :] if z.ndim else z)
    return weight.reshape(*lead, k, n).astype(dtype)


def packed_matmul(
    x: jax.Array,
    planes: Sequence[jax.Array],
    scales: Scales,
    zeros: jax.Array | None,
    channel_scale: jax.Array | None = None,
    low_rank: LowRank | None = None,
    *,
    problem: Problem,
) -> jax.Array:
    """``y = (x / D) Q + (x A) B`` in float32.

    Args:
      x: ``[..., d_in]`` with ``k - group_size < d_in <= k``; the rows beyond stand for nothing.
      planes: One ``uint8[k * width // 8, n]`` for each width in ``PLANES[bits]``, from `pack`.
      scales: ``[k // group_size, n]``.
      zeros: As ``scales``, or uint8; None is symmetric.
      channel_scale: D, ``[d_in]``, positive, or None.
      low_rank: ``(A, B)`` or None.
      problem: Bits and group size.

    Returns:
      ``y[..., n]``, float32 whatever x is.
    """
    bits, group_size = problem.bits, problem.group_size
    weight = dequantize(planes, scales, zeros, bits=bits, group_size=group_size)[: x.shape[-1]]
    x = x.astype(jnp.float32)
    scaled = x
    if channel_scale is not None:
        scaled = x / jnp.broadcast_to(channel_scale.astype(jnp.float32), x.shape)
    y = jnp.matmul(scaled, weight, precision=_EXACT)
    if low_rank is not None:
        down, up = (factor.astype(jnp.float32) for factor in low_rank)
        y = y + jnp.matmul(jnp.matmul(x, down, precision=_EXACT), up, precision=_EXACT)
    return y


def quantize_pack(
    w: jax.Array,
    channel_scale: jax.Array | None = None,
    importance: jax.Array | None = None,
    low_rank: LowRank | None = None,
    *,
    problem: Problem,
) -> Packed:
    """Rounds ``D (W - A B)`` to the nearest codes of each group's grid, and packs them.

    Args:
      w: ``[d_in, n]``, any floating dtype; rows are padded with zeros to a whole group.
      channel_scale: D, ``[d_in]``, positive, or None for 1.
      importance: ``[d_in]``, the weight of each row's squared error in the search over
        ``problem.shrinks``, non-negative; None weighs all rows alike.
      low_rank: ``(A, B)`` or None.
      problem: Bits, group size, zero point, what is stored as what, and the factors on a group's
        range. Each group and column takes the one with the least ``sum(importance * error**2)``,
        the earliest of equals, each after ``problem.refits`` of its scale and zero point.

    Returns:
      ``(planes, scales, zeros)``; zeros are None, ``store_dtype`` or uint8.
    """
    groups = _groups(w, channel_scale, low_rank, problem)
    low, high = jnp.min(groups, axis=1), jnp.max(groups, axis=1)
    form = problem.grid | {"columns": _columns(low, high, problem) if problem.coded else None}
    if problem.searched:
        h = None
        if importance is not None or problem.d_in < problem.k:
            # A zero point that is no whole number makes an error of padding, which counts nowhere.
            h = jnp.ones(problem.d_in) if importance is None else importance
            h = jnp.pad(h.astype(jnp.float32), (0, problem.k - problem.d_in))
            h = h.reshape(-1, problem.group_size, 1)
        scales, zeros = searched(
            groups, h, low, high, shrinks=problem.shrinks, refits=problem.refits, **form
        )
    else:
        shrink = problem.shrinks[0]
        scales, zeros = grid.fit(low * shrink, high * shrink, **form)
    codes = grid.encode(groups, scales[:, None], zeros[:, None], bits=problem.bits)
    planes = pack(codes.reshape(-1, problem.n).astype(jnp.uint8), bits=problem.bits)
    return planes, *grid.write(scales, zeros, form["columns"], **problem.grid)


def searched(
    groups: jax.Array,
    h: jax.Array | None,
    low: jax.Array,
    high: jax.Array,
    *,
    shrinks: tuple[float, ...],
    refits: int = 0,
    bits: int,
    zero_point: str,
    **form: Any,
) -> tuple[jax.Array, jax.Array]:
    """The search over ranges and their refits, see `search.best`.

    Args:
      groups: ``float32[n_group, group_size, n]``.
      h: ``float32[n_group, group_size, 1]``, what a squared error costs; None is 1.
      low: ``float32[n_group, n]``, the smallest of each group.
      high: Likewise, the largest.
      shrinks: Factors on a group's range.
      refits: Of each range's scale and zero point.
      bits: Width of a code.
      zero_point: See `grid.fit`.
      **form: What `grid.fit` takes beside them.

    Returns:
      ``(scales, zeros)``, ``float32[n_group, n]`` with the values that are stored.
    """

    def total(rows: jax.Array) -> jax.Array:
        return jnp.sum(rows, axis=1)

    def measure(scales: jax.Array, zeros: jax.Array, refitted: bool) -> Any:
        s, z = scales[:, None], zeros[:, None]
        codes = grid.encode(groups, s, z, bits=bits)
        error = jnp.square(groups - grid.decode(codes, s, z))
        sums = search.terms(groups, codes, z, h, zero_point=zero_point) if refitted else ()
        return total(error if h is None else h * error), tuple(map(total, sums))

    weights = None
    if refits and zero_point != "none":
        ones = jnp.ones((*groups.shape[:2], 1), jnp.float32) if h is None else h
        weights = total(ones), total(ones * groups)
    factors = jnp.asarray(shrinks, jnp.float32)
    return search.best(
        low, high, lambda i: factors[i], len(shrinks), refits, measure, weights,
        bits=bits, zero_point=zero_point, **form,
    )  # fmt: skip


def _groups(
    w: jax.Array, channel_scale: jax.Array | None, low_rank: LowRank | None, problem: Problem
) -> jax.Array:
    """``D (W - A B)`` in groups, ``float32[n_group, group_size, n]``, padded with zeros."""
    residual = w.astype(jnp.float32)
    if low_rank is not None:
        down, up = (factor.astype(jnp.float32) for factor in low_rank)
        residual = residual - jnp.matmul(down, up, precision=_EXACT)
    if channel_scale is not None:
        residual = residual * channel_scale.astype(jnp.float32)[:, None]
    padded = jnp.pad(residual, ((0, problem.k - problem.d_in), (0, 0)))
    return padded.reshape(-1, problem.group_size, problem.n)


def column_scales(
    w: jax.Array, channel_scale: jax.Array | None, low_rank: LowRank | None, layer: jax.Array, *,
    problem: Problem,
) -> jax.Array | None:  # fmt: skip
    """What the coded scales of each column are multiples of, for kernels that cannot find it.

    It depends on a whole column: where a kernel's blocks have parts of one, XLA reads the weight
    once more.

    Args:
      w: ``[L, d_in, n]``.
      channel_scale: See `quantize_pack`.
      low_rank: See `quantize_pack`.
      layer: ``int32[]``, which of the L.
      problem: See `quantize_pack`.

    Returns:
      ``float32[1, n]``, see `grid.column_scales`; None where scales are not coded.
    """
    if not problem.coded:
        return None
    one = jax.lax.dynamic_index_in_dim(w, layer, keepdims=False, allow_negative_indices=False)
    groups = _groups(one, channel_scale, low_rank, problem)
    return _columns(jnp.min(groups, axis=1), jnp.max(groups, axis=1), problem)


def _columns(low: jax.Array, high: jax.Array, problem: Problem) -> jax.Array:
    return grid.column_scales(low, high, **problem.grid, row_axes=problem.row_axes)


def with_columns(scales: jax.Array, of_columns: jax.Array | None, problem: Problem) -> Scales:
    """A kernel's scales as the public calls return them.

    Args:
      scales: ``[n_group, n]`` as the kernel wrote them.
      of_columns: From `column_scales`.
      problem: See `quantize_pack`.

    Returns:
      The same; coded if there are columns.
    """
    if of_columns is not None:
        of_columns = of_columns.reshape(-1).astype(problem.store_dtype)
    return grid.put_together(scales, of_columns, problem.scales)


def prefill_quantize(
    x: jax.Array,
    w: jax.Array,
    channel_scale: jax.Array | None = None,
    importance: jax.Array | None = None,
    low_rank: LowRank | None = None,
    *,
    problem: Problem,
) -> tuple[jax.Array, Packed]:
    """The prompt's product with a weight, and the weight packed: both from one read of it.

    Args:
      x: ``[..., d_in]``.
      w: ``[d_in, n]``.
      channel_scale: See `quantize_pack`, as the arguments after it.
      importance: See `quantize_pack`.
      low_rank: See `quantize_pack`.
      problem: See `quantize_pack`. Where it is `quantized`, x is multiplied with the weight that
        was just packed, as the paper does, instead of `w`.

    Returns:
      ``(y[..., n], (planes, scales, zeros))``, y in float32.
    """
    packed = quantize_pack(w, channel_scale, importance, low_rank, problem=problem)
    if problem.quantized:
        y = packed_matmul(x, *packed, channel_scale, low_rank, problem=problem)
    else:
        y = jnp.matmul(x.astype(jnp.float32), w.astype(jnp.float32), precision=_EXACT)
    return y, packed

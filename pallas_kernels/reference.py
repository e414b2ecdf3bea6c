"""What every packed kernel computes, in plain jax: the oracle, and the portable implementation.

The weight that planes, scales ``s`` and zero points ``z`` stand for is, exactly,

    w[r, c] = s[r // g, c] * (q[r, c] - z[r // g, c])

The insight that makes decoding fast on a CPU: with few rows of ``x``, never write ``w`` down. Per
group,

    sum_r x[r] w[r, c] = s[c] * (sum_r x[r] q[r, c] - z[c] * sum_r x[r])

and the inner sum, unrolled over a few rows, is an elementwise expression: XLA fuses unpack,
convert, multiply and add into one loop that vectorises over the output channels, on all cores.
With many rows the unpacking is better paid once, so ``w`` is written down and multiplied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.layout import PLANES, check_planes, unpack

FEW_ROWS = 4
"""Up to this many rows of x the weight is not written down, twice as many for a large weight.

On 2 AVX-512 cores the crossover is at 5 rows for 576 x 1536 and above 12 for 4096 x 4096, where
at 8 rows a dense float32 weight is as fast.
"""

_LARGE_WEIGHT = 2**22
"""Weights in a matrix that no longer fits a cache once written down as float32."""

_MAX_UNROLLED_COLUMNS = 17
"""Most octet columns (8 rows each) unrolled into one partial sum; compile time grows with it."""

_SCALE_DTYPES = ("float32", "bfloat16", "float16")


def _check_scales(scales: jax.Array, zeros: jax.Array | None, expected: tuple[int, ...]) -> None:
    for name, value, dtypes in (
        ("scales", scales, _SCALE_DTYPES),
        ("zeros", zeros, (*_SCALE_DTYPES, "uint8")),
    ):
        if value is None:
            continue
        if value.shape != expected:
            raise ValueError(
                f"{name}: expected shape {expected} ([..., n_group, n] of the planes), "
                f"got {value.shape}; one value per group and output channel"
            )
        if value.dtype.name not in dtypes:
            raise ValueError(
                f"{name}: expected one of {dtypes}, got {value.dtype}; cast it with .astype"
            )


def _check_weight(
    planes: Sequence[jax.Array],
    scales: jax.Array,
    zeros: jax.Array | None,
    *,
    bits: int,
    group_size: int,
) -> tuple[int, int]:
    k, n = check_planes(planes, bits=bits, group_size=group_size)
    _check_scales(scales, zeros, (*planes[0].shape[:-2], k // group_size, n))
    return k, n


def _zeros_f32(zeros: jax.Array | None, bits: int) -> jax.Array:
    return jnp.float32(2 ** (bits - 1)) if zeros is None else zeros.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "dtype"))
def dequantize(
    planes: Sequence[jax.Array],
    scales: jax.Array,
    zeros: jax.Array | None,
    *,
    bits: int,
    group_size: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """The weight that a packed matrix stands for, ``w = s * (q - z)``.

    Args:
      planes: One ``uint8[..., k * width // 8, n]`` for each width in ``PLANES[bits]``, from `pack`.
      scales: ``[..., n_group, n]``, ``n_group = k // group_size``; float32, bfloat16 or float16.
      zeros: As ``scales``, or uint8, in units of codes; None is symmetric, ``z = 2**(bits - 1)``.
      bits: Width of a code: 2, 3, 4, 5 or 8.
      group_size: Rows that share a scale: a multiple of 8 that divides ``k``.
      dtype: Of the result; the arithmetic is float32 whatever it is.

    Returns:
      ``w[..., k, n]`` in ``dtype``.

    Raises:
      ValueError: the planes, the scales or the zeros do not fit each other or the packing.
    """
    k, n = _check_weight(planes, scales, zeros, bits=bits, group_size=group_size)
    lead = planes[0].shape[:-2]
    codes = unpack(planes, bits=bits, group_size=group_size)
    codes = codes.reshape(*lead, k // group_size, group_size, n).astype(jnp.float32)
    zero = _zeros_f32(zeros, bits)
    if zeros is not None:
        zero = zero[..., None, :]
    weight = scales.astype(jnp.float32)[..., None, :] * (codes - zero)
    return weight.reshape(*lead, k, n).astype(dtype)


def _code(views: Sequence[jax.Array], widths: Sequence[int], octet: int) -> jax.Array:
    """Codes of one octet row as float32: ``views[p]`` is ``uint32[n_group, width, n_part, n]``."""
    code = jnp.uint32(0)
    base = 0
    for width, view in zip(widths, views, strict=True):
        carrier = view[:, octet % width]
        shift = width * (octet // width) - base
        # One shift puts the field where the code wants it; a second one would cost a tenth.
        part = carrier >> jnp.uint32(shift) if shift >= 0 else carrier << jnp.uint32(-shift)
        if width < 8:
            part = part & jnp.uint32((2**width - 1) << base)
        code = code | part
        base += width
    # The sign bit is clear, and int32 converts in one instruction where uint32 may not.
    return code.astype(jnp.int32).astype(jnp.float32)


def _unrolled_columns(group_size: int) -> int | None:
    """Octet columns in one partial sum: the fewest that compile to a fast loop, None if none do.

    XLA:CPU fuses the slice that a layer scan takes of the stacked planes into a loop that uses it
    in at most 15 places, and then reloads the layer number for every weight, which stops LLVM from
    vectorising (3 times slower). Two columns are 16 rows: the slice becomes a small copy instead.
    """
    columns = group_size // 8
    upper = min(columns, _MAX_UNROLLED_COLUMNS)
    return next((step for step in range(2, upper + 1) if columns % step == 0), None)


def _one_row(
    x: jax.Array,
    planes: Sequence[jax.Array],
    scales: jax.Array,
    zeros: jax.Array | None,
    *,
    bits: int,
    group_size: int,
) -> jax.Array:
    """``float32[k] -> float32[n]`` without ever storing a weight."""
    n = planes[0].shape[-1]
    widths = PLANES[bits]
    n_group, columns = x.size // group_size, group_size // 8
    step = _unrolled_columns(group_size)
    assert step is not None, group_size
    n_part = columns // step
    x = x.reshape(n_group, 8, n_part, step)
    views = [
        plane.reshape(n_group, width, n_part, step, n)
        for width, plane in zip(widths, planes, strict=True)
    ]
    partial = jnp.zeros((n_group, n_part, n), jnp.float32)
    x_sum = jnp.zeros((n_group, n_part), jnp.float32)
    for first in range(min(widths)):
        # Fields of the same carrier next to each other, so that it is loaded once.
        for j in range(step):
            column = [view[:, :, :, j].astype(jnp.uint32) for view in views]
            for octet in range(first, 8, min(widths)):
                code = _code(column, widths, octet)
                partial = partial + x[:, octet, :, j, None] * code
                x_sum = x_sum + x[:, octet, :, j]
    zero = _zeros_f32(zeros, bits)
    if zeros is not None:
        zero = zero[:, None]
    partial = scales.astype(jnp.float32)[:, None] * (partial - zero * x_sum[..., None])
    # No reduction anywhere in here, a dot with ones instead: XLA:CPU hands a reduction with all
    # that fuses into it to a library that wants every operand in memory (4 times slower).
    ones = jnp.ones((n_group * n_part,), jnp.float32)
    return jnp.matmul(ones, partial.reshape(-1, n), precision=jax.lax.Precision.HIGHEST)


def _tie(planes: Sequence[jax.Array], x: jax.Array) -> tuple[jax.Array, ...]:
    """The same planes, but to the compiler a function of ``float32[m, k]`` x.

    In a loop over tokens whose planes do not change, XLA would move the unpacking out of the loop
    and keep four bytes per weight; optimization barriers are dropped before that pass. The tie is
    a bit that is zero unless x has a NaN, and then the product has one too.
    """
    if x.size == 0:
        return tuple(planes)
    tie = (x[0, 0] != x[0, 0]).astype(jnp.uint8)
    return tuple(plane | tie for plane in planes)


@functools.partial(jax.jit, static_argnames=("bits", "group_size"))
def packed_matmul(
    x: jax.Array,
    planes: Sequence[jax.Array],
    scales: jax.Array,
    zeros: jax.Array | None,
    *,
    bits: int,
    group_size: int,
) -> jax.Array:
    """``y = x @ w`` for the weight of `dequantize`, accumulated in float32.

    The formulation depends on shapes alone, which are static: see `FEW_ROWS`.

    Args:
      x: ``[..., k]``, finite, any floating dtype.
      planes: One ``uint8[k * width // 8, n]`` for each width in ``PLANES[bits]``, from `pack`.
      scales: ``[n_group, n]`` with ``n_group = k // group_size``; float32, bfloat16 or float16.
      zeros: As ``scales``, or uint8, in units of codes; None is symmetric, ``z = 2**(bits - 1)``.
      bits: Width of a code: 2, 3, 4, 5 or 8.
      group_size: Rows that share a scale: a multiple of 8 that divides ``k``.

    Returns:
      ``y[..., n]`` in ``x.dtype``.

    Raises:
      ValueError: an argument does not fit the others or the packing; the message says which.
    """
    k, n = _check_weight(planes, scales, zeros, bits=bits, group_size=group_size)
    if planes[0].ndim != 2:
        raise ValueError(
            f"planes: expected two axes [k*width//8, n], got shape {planes[0].shape}; "
            "scan or vmap over stacked layers"
        )
    if x.ndim < 1 or x.shape[-1] != k or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x: expected floating [..., {k}] for planes of {k} rows, "
            f"got {x.dtype}{list(x.shape)}; the last axis is the input channel"
        )
    m = math.prod(x.shape[:-1])
    rows = x.reshape(m, k).astype(jnp.float32)
    planes = _tie(planes, rows)
    few = 2 * FEW_ROWS if k * n >= _LARGE_WEIGHT else FEW_ROWS
    if 0 < m <= few and _unrolled_columns(group_size):
        # A loop nest per row: one nest with the rows inside is no longer vectorised over n.
        one = functools.partial(_one_row, bits=bits, group_size=group_size)
        y = jnp.stack([one(rows[i], planes, scales, zeros) for i in range(m)])
    else:
        w = dequantize(planes, scales, zeros, bits=bits, group_size=group_size)
        y = jnp.matmul(rows, w, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(*x.shape[:-1], n).astype(x.dtype)

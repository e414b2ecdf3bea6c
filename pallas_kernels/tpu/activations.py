"""Activations as `packed_matmul` multiplies them, prepared once per call.

*bfloat16*: permuted, as `unpack.as_bfloat16` gives the codes.

*int8*: a row is ``2**e`` times a whole number of 21 bits, which three limbs of 7 bits hold,

    x[i] ~ 2**(e - 6) (l0 + 2**-7 l1 + 2**-14 l2),      |error| < 2**(e - 20) <= 2**-20 max|x|

with ``2**e <= max|x| < 2**(e+1)``. The limbs become rows of their own; with few rows of x they are
free, because the matrix unit takes 32 at once, and int8 weights load it in half the time.

*Folds.* A product costs the matrix unit the same for 32 channels as for 128. Small groups are
therefore multiplied several at a time: x stands several times below itself, every copy with one
group's channels alone, so that each group's sum comes out as rows of its own.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.unpack import interleave

LANES = 128
LIMBS = 3
_LIMB_BITS = 7
_SUBLANES = 8


def _round_up(rows: int) -> int:
    return -(-rows // _SUBLANES) * _SUBLANES


def split3(a: jax.Array) -> list[jax.Array]:
    """float32 as a sum of three bfloat16 numbers, up to float32's last bits."""
    parts = []
    for _ in range(3):
        part = a.astype(jnp.bfloat16)
        parts.append(part)
        a = a - part.astype(jnp.float32)
    return parts


def place(parts: list[jax.Array], m: int) -> jax.Array:
    """Several arrays' first m rows after one another, in as few registers as they fill.

    Args:
      parts: ``float32[rows, n]`` each, rows a multiple of 8.
      m: rows of each that count.

    Returns:
      ``float32[len(parts) * m, n]``, rounded up to 8 rows; what stands beyond is zero.
    """
    if m % _SUBLANES == 0:
        return jnp.concatenate([part[:m] for part in parts])
    rows = _round_up(len(parts) * m)
    row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    out = jnp.zeros((rows, parts[0].shape[1]), jnp.float32)
    for i, part in enumerate(parts):
        if part.shape[0] < rows:
            missing = jnp.zeros((rows - part.shape[0], part.shape[1]), jnp.float32)
            part = jnp.concatenate([part, missing])
        moved = pltpu.roll(part[:rows], i * m, axis=0) if i else part[:rows]
        out = jnp.where((row >= i * m) & (row < (i + 1) * m), moved, out)
    return out


def collect(placed: jax.Array, m: int, weights: tuple[float, ...]) -> jax.Array:
    """The weighted sum of what `place` put after one another.

    Args:
      placed: ``float32[len(weights) * m, n]``, rounded up to 8 rows.
      m: rows of each.
      weights: one factor each.

    Returns:
      ``float32[rows, n]`` whose first m rows count.
    """
    rows = placed.shape[0]
    if m % _SUBLANES == 0:
        parts = [placed[i * m : (i + 1) * m] for i in range(len(weights))]
    else:
        shifts = range(0, len(weights) * m, m)
        parts = [pltpu.roll(placed, rows - by, axis=0) if by else placed for by in shifts]
    terms = [part * weight for part, weight in zip(parts, weights, strict=True)]
    return functools.reduce(jnp.add, terms)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` of bfloat16, sums in float32."""
    # Said, not left to `jax_default_matmul_precision`: Mosaic refuses more for bfloat16.
    return jnp.dot(a, b, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32)


def exact_dot(a: jax.Array, b: jax.Array, m: int) -> jax.Array:
    """``a @ b`` in float32 by the bfloat16 matrix unit.

    Args:
      a: ``bfloat16[3 m, k]``, the parts of a placed after one another.
      b: ``float32[k, n]``.
      m: rows of a.

    Returns:
      ``float32[rows, n]`` whose first m rows count.
    """
    products = [_product(a, part) for part in split3(b)]
    return collect(products[2] + products[1] + products[0], m, (1.0, 1.0, 1.0))


def _stacked(x_ref: Any, start: int, stop: int) -> jax.Array:
    """Chunks of 128 channels as rows, so that the matrix unit is loaded once for them."""
    chunks = [x_ref[:, at : min(at + LANES, stop)] for at in range(start, stop, LANES)]
    if stop % LANES:
        padding = jnp.zeros((x_ref.shape[0], -stop % LANES), x_ref.dtype)
        chunks[-1] = jnp.concatenate([chunks[-1], padding], axis=1)
    return jnp.concatenate(chunks)


def _times(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """``x @ chosen`` for a matrix of zeros and ones: exact in float32."""
    ones = chosen.astype(jnp.float32).astype(jnp.bfloat16)
    return _product(x, ones)


def _square(axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis)


def write_sums(x_ref: Any, sums_ref: Any, group_size: int, m: int) -> None:
    """Minus the sum of each group of channels, as three bfloat16 parts.

    Args:
      x_ref: ``bfloat16[rows, k]``.
      sums_ref: gets ``bfloat16[3 m, groups]``, placed; groups are rounded up to 128.
      group_size: channels that share a scale.
      m: rows of x that count.
    """
    rows, k = x_ref.shape
    # A run never crosses a group; its sum stands in every lane, and is added in its group's.
    run = math.gcd(group_size, LANES)
    lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    # The channels of 128 groups at a time: all runs' sums of a long row would be spilled.
    for block in range(0, sums_ref.shape[1], LANES):
        first = block * group_size
        stacked = _stacked(x_ref, first, min(first + LANES * group_size, k))
        sums = [_times(stacked, _square(0) // run == r) for r in range(LANES // run)]
        total = jnp.zeros((rows, LANES), jnp.float32)
        for i, at in itertools.product(range(stacked.shape[0] // rows), range(0, LANES, run)):
            if first + i * LANES + at < k:
                part = sums[at // run][i * rows : (i + 1) * rows]
                total = jnp.where(lane == (i * LANES + at) // group_size, total - part, total)
        parts = [part.astype(jnp.float32) for part in split3(total)]
        sums_ref[:, block : block + LANES] = place(parts, m).astype(jnp.bfloat16)


def fold(x: jax.Array, group_size: int, folds: int) -> jax.Array:
    """Copies of x below one another, each with the channels of every `folds`-th group alone.

    Args:
      x: ``float32[rows, k]``, k from the start of a fold's first group on.
      group_size: channels that share a scale.
      folds: copies.

    Returns:
      ``float32[folds * rows, k]``; the other channels of a copy are zeros.
    """
    if folds == 1:
        return x
    group = lax.broadcasted_iota(jnp.int32, x.shape, 1) // group_size % folds
    return jnp.concatenate([jnp.where(group == i, x, 0.0) for i in range(folds)])


def write_bfloat16(
    x_ref: Any, out_ref: Any, group_size: int, folds: int, *, permuted: bool
) -> None:
    """Activations, folded, in the order of `unpack.as_bfloat16` by a product with a permutation.

    Args:
      x_ref: ``bfloat16[m, k]``.
      out_ref: gets ``bfloat16[folds * m, k]``.
      group_size: See `fold`.
      folds: See `fold`.
      permuted: Whether the codes' order is not their own.
    """
    m, k = x_ref.shape
    stacked = _stacked(x_ref, 0, k)
    moved = (
        _times(stacked, _square(0) == interleave(_square(1)))
        if permuted
        else stacked.astype(jnp.float32)
    )
    for i, at in enumerate(range(0, k, LANES)):
        size = min(LANES, k - at)
        part = fold(moved[i * m : (i + 1) * m, :size], group_size, folds)
        out_ref[:, at : at + size] = part.astype(jnp.bfloat16)


def _power(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``2**e`` and ``2**-e`` of each row, ``float32[m, 1]``: the largest power up to max|x|."""
    bits = lax.bitcast_convert_type(jnp.max(jnp.abs(x), axis=1, keepdims=True), jnp.int32)
    exponent = jnp.clip(bits & 0x7F800000, 1 << 23, 253 << 23)
    as_float = lambda b: lax.bitcast_convert_type(b, jnp.float32)  # noqa: E731
    return as_float(exponent), as_float((254 << 23) - exponent)


def write_limbs(x_ref: Any, out_ref: Any, m: int, group_size: int, folds: int) -> None:
    """Limbs of the activations, folded.

    Args:
      x_ref: ``bfloat16[16, k]``.
      out_ref: gets ``int8[folds * LIMBS * m, k]``, placed; each fold is rounded up to 8 rows.
      m: rows of x that count.
      group_size: See `fold`.
      folds: See `fold`.
    """
    x = x_ref[: _round_up(m), :].astype(jnp.float32)
    left = x * _power(x)[1] * 2.0 ** (_LIMB_BITS - 1)
    limbs = []
    for _ in range(LIMBS):
        limb = left.astype(jnp.int32).astype(jnp.float32)
        left = (left - limb) * 2.0**_LIMB_BITS
        limbs.append(limb)
    folded = fold(place(limbs, m), group_size, folds)
    out_ref[...] = folded.astype(jnp.int32).astype(jnp.int8)


def join_limbs(x_ref: Any, products: jax.Array, m: int) -> jax.Array:
    """What the limbs' products stand for.

    Args:
      x_ref: ``bfloat16[16, k]``.
      products: ``float32[LIMBS * m, n]``, placed.
      m: rows of x.

    Returns:
      ``float32[rows, n]`` whose first m rows count.
    """
    power = _power(x_ref[: _round_up(m), :].astype(jnp.float32))[0] * 2.0 ** (1 - _LIMB_BITS)
    joined = collect(products, m, tuple(2.0 ** (-_LIMB_BITS * i) for i in range(LIMBS)))
    return joined[: power.shape[0]] * power

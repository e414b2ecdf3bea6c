"""Activations as `packed_matmul` multiplies them, prepared once per call.

*bfloat16*: permuted, as `unpack.as_bfloat16` gives the codes.

*int8*: a row is ``2**e`` times a whole number of 21 bits, which three limbs of 7 bits hold,

    x[i] ~ 2**(e - 6) (l0 + 2**-7 l1 + 2**-14 l2),      |error| < 2**(e - 20) <= 2**-20 max|x|

with ``2**e <= max|x| < 2**(e+1)``. The limbs become rows of their own; with few rows of x they are
free, because the matrix unit takes 32 at once, and int8 weights load it in half the time.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.unpack import interleave

LANES = 128
LIMBS = 3
_LIMB_BITS = 7


def split3(a: jax.Array) -> list[jax.Array]:
    """float32 as a sum of three bfloat16 numbers, up to float32's last bits."""
    parts = []
    for _ in range(3):
        part = a.astype(jnp.bfloat16)
        parts.append(part)
        a = a - part.astype(jnp.float32)
    return parts


def exact_dot(a_parts: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` in float32 by the bfloat16 matrix unit.

    Args:
      a_parts: ``bfloat16[3 m, k]``, the three parts of a, each m rows.
      b: ``float32[k, n]``.

    Returns:
      ``float32[m, n]``.
    """
    product = sum(
        jnp.dot(a_parts, part, preferred_element_type=jnp.float32) for part in split3(b)
    )
    m = a_parts.shape[0] // 3
    return product[:m] + product[m : 2 * m] + product[2 * m :]


def _stacked(x_ref: Any) -> jax.Array:
    """All chunks of 128 channels as rows, so that the matrix unit is loaded once for them."""
    m, k = x_ref.shape
    chunks = [x_ref[:, at : min(at + LANES, k)] for at in range(0, k, LANES)]
    if k % LANES:
        padding = jnp.zeros((m, -k % LANES), x_ref.dtype)
        chunks[-1] = jnp.concatenate([chunks[-1], padding], axis=1)
    return jnp.concatenate(chunks)


def _times(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """``x @ chosen`` for a matrix of zeros and ones: exact in float32."""
    ones = chosen.astype(jnp.float32).astype(jnp.bfloat16)
    return jnp.dot(x, ones, preferred_element_type=jnp.float32)


def _square(axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis)


def write_sums(x_ref: Any, sums_ref: Any, group_size: int) -> None:
    """Minus the sum of each group of channels, as three bfloat16 parts.

    Args:
      x_ref: ``bfloat16[m, k]``.
      sums_ref: gets ``bfloat16[3 m, groups]``, groups rounded up to 128.
      group_size: channels that share a scale.
    """
    m, k = x_ref.shape
    stacked = _stacked(x_ref)
    # A run never crosses a group; its sum stands in every lane, and is added in its group's.
    run = math.gcd(group_size, LANES)
    sums = [_times(stacked, _square(0) // run == r) for r in range(LANES // run)]
    lane = lax.broadcasted_iota(jnp.int32, (m, LANES), 1)
    for block in range(0, sums_ref.shape[1], LANES):
        total = jnp.zeros((m, LANES), jnp.float32)
        for i, at in itertools.product(range(-(-k // LANES)), range(0, LANES, run)):
            group = (i * LANES + at) // group_size - block
            if i * LANES + at < k and 0 <= group < LANES:
                part = sums[at // run][i * m : (i + 1) * m]
                total = jnp.where(lane == group, total - part, total)
        for i, piece in enumerate(split3(total)):
            sums_ref[i * m : (i + 1) * m, block : block + LANES] = piece


def write_permuted(x_ref: Any, out_ref: Any) -> None:
    """Activations in the order of `unpack.as_bfloat16`, by a product with a permutation.

    Args:
      x_ref: ``bfloat16[m, k]``.
      out_ref: gets the same shape.
    """
    m, k = x_ref.shape
    moved = _times(_stacked(x_ref), _square(0) == interleave(_square(1)))
    for i, at in enumerate(range(0, k, LANES)):
        size = min(LANES, k - at)
        out_ref[:, at : at + size] = moved[i * m : (i + 1) * m, :size].astype(jnp.bfloat16)


def _power(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``2**e`` and ``2**-e`` of each row, ``float32[m, 1]``: the largest power up to max|x|."""
    bits = lax.bitcast_convert_type(jnp.max(jnp.abs(x), axis=1, keepdims=True), jnp.int32)
    exponent = jnp.clip(bits & 0x7F800000, 1 << 23, 253 << 23)
    as_float = lambda b: lax.bitcast_convert_type(b, jnp.float32)  # noqa: E731
    return as_float(exponent), as_float((254 << 23) - exponent)


def write_limbs(x_ref: Any, out_ref: Any) -> None:
    """Limbs of the activations, each row's `LIMBS` after one another.

    Args:
      x_ref: ``bfloat16[16, k]``, rows beyond the ones in `out_ref` are not read.
      out_ref: gets ``int8[m * LIMBS, k]``.
    """
    rows = out_ref.shape[0]
    x = x_ref[...].astype(jnp.float32)
    left = x * _power(x)[1] * 2.0 ** (_LIMB_BITS - 1)
    limbs = []
    for _ in range(LIMBS):
        limb = left.astype(jnp.int32).astype(jnp.float32)
        left = (left - limb) * 2.0**_LIMB_BITS
        limbs.append(limb.astype(jnp.bfloat16))
    stacked = jnp.concatenate(limbs)
    shape = (rows, stacked.shape[0])
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    chosen = column == (row % LIMBS) * x.shape[0] + row // LIMBS
    ones = chosen.astype(jnp.float32).astype(jnp.bfloat16)
    ordered = jnp.dot(ones, stacked, preferred_element_type=jnp.float32)
    out_ref[...] = ordered.astype(jnp.int32).astype(jnp.int8)


def join_limbs(x_ref: Any, products: jax.Array) -> jax.Array:
    """What the limbs' products stand for.

    Args:
      x_ref: ``bfloat16[16, k]``.
      products: ``float32[m * LIMBS, n]``.

    Returns:
      ``float32[16, n]``; rows from m on are zeros.
    """
    rows = products.shape[0]
    power = _power(x_ref[...].astype(jnp.float32))[0]
    row = lax.broadcasted_iota(jnp.int32, (power.shape[0], rows), 0)
    column = lax.broadcasted_iota(jnp.int32, (power.shape[0], rows), 1)
    limb = column % LIMBS
    weight = jnp.where(limb == 0, 1.0, jnp.where(limb == 1, 2.0**-7, 2.0**-14))
    weight = jnp.where(column // LIMBS == row, weight, 0.0).astype(jnp.bfloat16)
    joined = sum(
        jnp.dot(weight, part, preferred_element_type=jnp.float32) for part in split3(products)
    )
    return joined * (power * 2.0 ** (1 - _LIMB_BITS))

"""The grid of a group: range -> scale and zero point -> codes. One formula for every kernel.

    asymmetric   s = (max − min) / (2^b − 1),      z = −min / s,    w ≈ s (q − z)
    symmetric    s = max|w| / (2^(b−1) − 1),       z = 2^(b−1)

The range always contains 0, so that exact zeros (and padding) stay exact and a constant group is
well defined. Scales and zero points are rounded to their storage type *before* the codes are
chosen: the codes make up for that rounding. Codes come from a product with 1/s, not a quotient by
s: one division per group instead of one per weight, on every machine.

All arguments are plain float32 arrays that broadcast against each other, so that the same lines
run inside a Pallas kernel, where a group is a block of rows, and outside.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

ZERO_POINTS = ("none", "float", "integer")
"""Symmetric; stored like a scale, so that both ends of the range are on the grid; uint8, so that 0
is on the grid (the convention of AutoAWQ and GPTQ)."""


def fit(
    low: jax.Array,
    high: jax.Array,
    *,
    bits: int,
    zero_point: str,
    store_dtype: jax.typing.DTypeLike,
    nearest: Callable[[jax.Array], jax.Array] = jnp.round,
) -> tuple[jax.Array, jax.Array]:
    """Scales and zero points of ranges.

    Args:
      low: float32, smallest weight of each group; taken as 0 where positive.
      high: float32, largest weight of each group; taken as 0 where negative.
      bits: Width of a code.
      zero_point: One of `ZERO_POINTS`.
      store_dtype: Floating type that scales, and float zero points, are stored in.
      nearest: Rounds to the nearest whole number, ties to even; for compilers that cannot
        translate `jnp.round`.

    Returns:
      ``(scales, zeros)``, float32 but exactly representable in what they are stored as; scales are
      positive.
    """
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    top = 2**bits - 1
    if zero_point == "none":
        step = jnp.maximum(-low, high) / (2 ** (bits - 1) - 1)
    else:
        step = (high - low) / top
    scales = step.astype(store_dtype).astype(jnp.float32)
    # An all-zero group, or one too small to be divided by, is exactly 0.
    scales = jnp.where(scales > 2.0**-120, scales, 1.0)
    if zero_point == "none":
        return scales, jnp.full_like(scales, 2 ** (bits - 1))
    zeros = -low / scales
    if zero_point == "integer":
        return scales, jnp.clip(nearest(zeros), 0, top)
    return scales, zeros.astype(store_dtype).astype(jnp.float32)


def encode(
    w: jax.Array,
    scales: jax.Array,
    zeros: jax.Array,
    *,
    bits: int,
    nearest: Callable[[jax.Array], jax.Array] = jnp.round,
) -> jax.Array:
    """The nearest code of each weight (round to nearest, ties to even).

    Args:
      w: float32 weights.
      scales: From `fit`, broadcast against ``w``.
      zeros: From `fit`, broadcast against ``w``.
      bits: Width of a code.
      nearest: See `fit`.

    Returns:
      Whole numbers in ``0 .. 2**bits - 1``, float32.
    """
    return jnp.clip(nearest(w * (1.0 / scales) + zeros), 0.0, 2.0**bits - 1)


def decode(codes: jax.Array, scales: jax.Array, zeros: jax.Array) -> jax.Array:
    """What codes stand for: ``s (q − z)``.

    Args:
      codes: float32.
      scales: From `fit`.
      zeros: From `fit`.

    Returns:
      float32 weights.
    """
    return scales * (codes - zeros)

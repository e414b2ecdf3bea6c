"""The grid of a group: range -> scale and zero point -> codes. One formula for every kernel.

    asymmetric   s = (max − min) / (2^b − 1),      z = −min / s,    w ≈ s (q − z)
    symmetric    s = max|w| / (2^(b−1) − 1),       z = 2^(b−1)

A scale is stored as a floating-point number, or *coded*: as ``u`` in 1 .. 255 times ``c``, the
largest scale of its column over 255. A zero point beside coded scales takes eight bits too, in
steps of ``2^(b−8)``.

The range always contains 0, so that exact zeros (and padding) stay exact and a constant group is
well defined. Scales and zero points are rounded to their storage type *before* the codes are
chosen: the codes make up for that rounding. Codes come from a product with 1/s, not a quotient by
s: one division per group instead of one per weight, on every machine.

All arguments are plain float32 arrays that broadcast against each other, so that the same lines
run inside a Pallas kernel, where a group is a block of rows, and outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ZERO_POINTS = ("none", "float", "integer")
"""Symmetric; stored like a scale, so that both ends of the range are on the grid; whole, so that 0
is on the grid (the convention of AutoAWQ and GPTQ)."""

SCALES = ("float", "coded")
"""How scales are stored: each as a floating-point number; as eight bits, times one number per
column."""

_MOST = 255
_SMALLEST = 2.0**-120


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedScales:
    """Scales in eight bits: ``s[g, c] = columns[c] * codes[g, c]``.

    Attributes:
      codes: uint8[..., n_group, n], 1 to 255.
      columns: [..., n], positive, bfloat16 or float32.
    """

    codes: Any
    columns: Any


Scales = jax.Array | CodedScales
"""``[..., n_group, n]``, positive: floating-point numbers, or coded."""


Nearest = Callable[[jax.Array], jax.Array]
Stored = Callable[[jax.Array, jax.typing.DTypeLike], jax.Array]


def as_stored(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The nearest numbers of another floating type, as float32.

    XLA drops a conversion to a narrower type and back (`xla_allow_excess_precision`, which is on by
    default), so that what is computed from the result would not be what is stored.

    Args:
      x: float32.
      dtype: float32, bfloat16 or float16.

    Returns:
      float32, exactly representable in ``dtype``; beyond its range, infinity.
    """
    to = jnp.finfo(dtype)
    return x if to.bits >= 32 else jax.lax.reduce_precision(x, to.nexp, to.nmant)


def column_scales(
    low: jax.Array,
    high: jax.Array,
    *,
    bits: int,
    zero_point: str,
    store_dtype: jax.typing.DTypeLike,
    stored: Stored = as_stored,
) -> jax.Array:
    """What the coded scales of a column are multiples of.

    Args:
      low: ``float32[n_group, n]``, smallest weight of each group.
      high: likewise, largest.
      bits: Width of a code.
      zero_point: One of `ZERO_POINTS`.
      store_dtype: See `CodedScales.columns`.
      stored: See `fit`.

    Returns:
      ``float32[1, n]``, exactly representable in ``store_dtype``.
    """
    span, part = _span(low, high, bits, zero_point)
    columns = stored(jnp.max(span, axis=0, keepdims=True) * (part / _MOST), store_dtype)
    return jnp.where(columns > _SMALLEST, columns, 1.0)


def _span(low: jax.Array, high: jax.Array, bits: int, zero_point: str) -> tuple[jax.Array, float]:
    """What a grid reaches over, and the part of that which is a step.

    Steps are products with that part. XLA compiles a quotient by a constant as such a product, and
    moves a constant factor past a division, but not in operations that are run one by one: a scale
    next to a tie would be another there.
    """
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    if zero_point == "none":
        return jnp.maximum(-low, high), 1.0 / (2 ** (bits - 1) - 1)
    return high - low, 1.0 / (2**bits - 1)


def fit(
    low: jax.Array,
    high: jax.Array,
    columns: jax.Array | None = None,
    *,
    bits: int,
    zero_point: str,
    store_dtype: jax.typing.DTypeLike,
    nearest: Nearest = jnp.round,
    stored: Stored = as_stored,
) -> tuple[jax.Array, jax.Array]:
    """Scales and zero points of ranges.

    Args:
      low: float32, smallest weight of each group; taken as 0 where positive.
      high: float32, largest weight of each group; taken as 0 where negative.
      columns: From `column_scales`: the scales are coded. None: they are not.
      bits: Width of a code.
      zero_point: One of `ZERO_POINTS`.
      store_dtype: Floating type that scales, and float zero points, are stored in.
      nearest: Rounds to the nearest whole number, ties to even; for compilers that cannot
        translate `jnp.round`.
      stored: Rounds to the storage type; for compilers that cannot translate `as_stored`.

    Returns:
      ``(scales, zeros)``, float32 with the values of what is stored; scales are positive.
    """
    span, part = _span(low, high, bits, zero_point)
    if columns is None:
        scales = stored(span * part, store_dtype)
        # An all-zero group, or one too small to be divided by, is exactly 0.
        scales = jnp.where(scales > _SMALLEST, scales, 1.0)
    else:
        scales = jnp.clip(nearest(span * (part / columns)), 1.0, _MOST) * columns
    if zero_point == "none":
        return scales, jnp.full_like(scales, 2 ** (bits - 1))
    zeros = -jnp.minimum(low, 0.0) / scales
    return scales, fit_zeros(
        zeros, bits=bits, zero_point=zero_point, coded=columns is not None,
        store_dtype=store_dtype, nearest=nearest, stored=stored,
    )  # fmt: skip


def fit_scales(
    scales: jax.Array,
    columns: jax.Array | None = None,
    *,
    store_dtype: jax.typing.DTypeLike,
    nearest: Nearest = jnp.round,
    stored: Stored = as_stored,
) -> jax.Array:
    """Scales as they are stored.

    Args:
      scales: float32, positive.
      columns: See `fit`.
      store_dtype: See `fit`.
      nearest: See `fit`.
      stored: See `fit`.

    Returns:
      float32, the nearest of the values that can be stored.
    """
    if columns is None:
        found = stored(scales, store_dtype)
        return jnp.where(found > _SMALLEST, found, 1.0)
    return jnp.clip(nearest(scales / columns), 1.0, _MOST) * columns


def fit_zeros(
    zeros: jax.Array,
    *,
    bits: int,
    zero_point: str,
    coded: bool,
    store_dtype: jax.typing.DTypeLike,
    nearest: Nearest = jnp.round,
    stored: Stored = as_stored,
) -> jax.Array:
    """Zero points as they are stored.

    Args:
      zeros: float32, in units of codes.
      bits: See `fit`.
      zero_point: "float" or "integer".
      coded: Whether scales are.
      store_dtype: See `fit`.
      nearest: See `fit`.
      stored: See `fit`.

    Returns:
      float32, the nearest of the values that can be stored.
    """
    if zero_point == "integer":
        return jnp.clip(nearest(zeros), 0, 2**bits - 1)
    if coded:
        return jnp.clip(nearest(zeros * 2.0 ** (8 - bits)), 0, _MOST) * 2.0 ** (bits - 8)
    return stored(zeros, store_dtype)


def write(
    scales: jax.Array,
    zeros: jax.Array | None,
    columns: jax.Array | None = None,
    *,
    bits: int,
    zero_point: str,
    store_dtype: jax.typing.DTypeLike,
) -> tuple[Scales, jax.Array | None]:
    """What is stored of scales and zero points; `read` gives them back.

    Args:
      scales: ``float32[n_group, n]`` from `fit`.
      zeros: Likewise.
      columns: See `fit`.
      bits: See `fit`.
      zero_point: See `fit`.
      store_dtype: See `fit`.

    Returns:
      Scales; and zero points, None if symmetric, else uint8 if coded or whole.
    """
    whole = zeros
    if columns is None:
        out: Scales = scales.astype(store_dtype)
    else:
        codes = jnp.round(scales / columns).astype(jnp.uint8)
        out = CodedScales(codes, columns[0].astype(store_dtype))
        whole = None if zeros is None else zeros * 2.0 ** (8 - bits)
    if zero_point == "none" or whole is None:
        return out, None
    coded = columns is not None or zero_point == "integer"
    return out, whole.astype(jnp.uint8 if coded else store_dtype)


def read(
    scales: Scales, zeros: jax.Array | None, *, bits: int
) -> tuple[jax.Array, jax.Array | float]:
    """The values of stored scales and zero points.

    Args:
      scales: See `Scales`.
      zeros: ``[..., n_group, n]`` in what `write` stores; None is symmetric.
      bits: Width of a code.

    Returns:
      ``(scales, zeros)``, float32 and in units of codes.
    """
    coded = isinstance(scales, CodedScales)
    middle = 2.0 ** (bits - 1)
    z = middle if zeros is None else zeros.astype(jnp.float32) * zero_unit(bits, coded=coded)
    if not isinstance(scales, CodedScales):
        return scales.astype(jnp.float32), z
    columns = scales.columns.astype(jnp.float32)[..., None, :]
    return scales.codes.astype(jnp.float32) * columns, z


def taken_apart(scales: Scales) -> tuple[jax.Array, jax.Array | None]:
    """What is stored per group; and per column, None unless the scales are coded."""
    if isinstance(scales, CodedScales):
        return scales.codes, scales.columns
    return scales, None


def zero_unit(bits: int, *, coded: bool) -> float:
    """What a stored zero point counts in: codes, or the fractions of them that eight bits hold."""
    return 2.0 ** (bits - 8) if coded else 1.0


def encode(
    w: jax.Array,
    scales: jax.Array,
    zeros: jax.Array,
    *,
    bits: int,
    nearest: Nearest = jnp.round,
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

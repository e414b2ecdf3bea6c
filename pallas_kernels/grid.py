"""The grid of a group: range -> scale and zero point -> codes. One formula for every kernel.

    asymmetric   s = (max − min) / (2^b − 1),      z = −min / s,    w ≈ s (q − z)
    symmetric    s = max|w| / (2^(b−1) − 1),       z = 2^(b−1)

A scale is stored as a floating-point number, or *coded*: as ``u`` in 1 .. 255 times ``c``, the
largest scale of its column over 255. A zero point beside coded scales takes eight bits too, in
steps of ``2^(b−8)``. In four bits each, ``u`` is in 1 .. 15, a zero point counts in steps of
``2^(b−4)``, and the two share a byte, ``16 u + z``.

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

SCALES = ("float", "coded", "coded4")
"""How scales are stored: each as a floating-point number; as eight bits, times one number per
column; as four bits, in a byte with the zero point."""

_WIDTHS = {"coded": 8, "coded4": 4}
"""Bits of a coded scale, and of the zero point beside it."""

SMALLEST = 2.0**-120
"""A scale up to this cannot be divided by: its group is exactly 0."""


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedPairs(CodedScales):
    """Scales and zero points in four bits each: ``codes = 16 u + z``, u from 1 to 15.

    ``s[g, c] = columns[c] * u[g, c]``; ``z`` counts in ``2**(bits - 4)`` codes. Beside them there
    is no array of zero points.
    """


_CODED = {"coded": CodedScales, "coded4": CodedPairs}

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
    scales: str,
    store_dtype: jax.typing.DTypeLike,
    stored: Stored = as_stored,
    row_axes: tuple[str, ...] = (),
) -> jax.Array:
    """What the coded scales of a column are multiples of.

    Args:
      low: ``float32[n_group, n]``, smallest weight of each group.
      high: likewise, largest.
      bits: Width of a code.
      zero_point: One of `ZERO_POINTS`.
      scales: One of `SCALES`, not "float".
      store_dtype: See `CodedScales.columns`.
      stored: See `fit`.
      row_axes: Mesh axes that the column's other groups are on, of a `shard_map` around.

    Returns:
      ``float32[1, n]``, exactly representable in ``store_dtype``.
    """
    span, part = _span(low, high, bits, zero_point)
    span = jnp.max(span, axis=0, keepdims=True)
    span = jax.lax.pmax(span, row_axes) if row_axes else span
    columns = stored(span * (part / most(scales)), store_dtype)
    return jnp.where(columns > SMALLEST, columns, 1.0)


def most(scales: str) -> int:
    """The largest code of a coded scale."""
    return 2 ** _WIDTHS[scales] - 1


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
    scales: str = "float",
    nearest: Nearest = jnp.round,
    stored: Stored = as_stored,
) -> tuple[jax.Array, jax.Array]:
    """Scales and zero points of ranges.

    Args:
      low: float32, smallest weight of each group; taken as 0 where positive.
      high: float32, largest weight of each group; taken as 0 where negative.
      columns: From `column_scales`; None where scales are not coded.
      bits: Width of a code.
      zero_point: One of `ZERO_POINTS`.
      scales: One of `SCALES`.
      store_dtype: Floating type that scales, and float zero points, are stored in.
      nearest: Rounds to the nearest whole number, ties to even; for compilers that cannot
        translate `jnp.round`.
      stored: Rounds to the storage type; for compilers that cannot translate `as_stored`.

    Returns:
      ``(scales, zeros)``, float32 with the values of what is stored; scales are positive.
    """
    span, part = _span(low, high, bits, zero_point)
    if columns is None:
        s = stored(span * part, store_dtype)
        # An all-zero group, or one too small to be divided by, is exactly 0.
        s = jnp.where(s > SMALLEST, s, 1.0)
    else:
        s = jnp.clip(nearest(span * (part / columns)), 1.0, most(scales)) * columns
    if zero_point == "none":
        return s, jnp.full_like(s, 2 ** (bits - 1))
    return s, fit_zeros(
        -jnp.minimum(low, 0.0) / s, bits=bits, zero_point=zero_point, scales=scales,
        store_dtype=store_dtype, nearest=nearest, stored=stored,
    )  # fmt: skip


def fit_zeros(
    zeros: jax.Array,
    *,
    bits: int,
    zero_point: str,
    scales: str,
    store_dtype: jax.typing.DTypeLike,
    nearest: Nearest = jnp.round,
    stored: Stored = as_stored,
) -> jax.Array:
    """Zero points as they are stored.

    Args:
      zeros: float32, in units of codes.
      bits: See `fit`.
      zero_point: "float" or "integer".
      scales: See `fit`.
      store_dtype: See `fit`.
      nearest: See `fit`.
      stored: See `fit`.

    Returns:
      float32, the nearest of the values that can be stored.
    """
    if zero_point == "integer":
        return jnp.clip(nearest(zeros), 0, 2**bits - 1)
    if scales == "float":
        return stored(zeros, store_dtype)
    unit = zero_unit(bits, scales)
    return jnp.clip(nearest(zeros * (1.0 / unit)), 0, most(scales)) * unit


def zero_unit(bits: int, scales: str) -> float:
    """What a stored zero point counts in: codes, or the parts of them that its bits hold."""
    return 1.0 if scales == "float" else 2.0 ** (bits - _WIDTHS[scales])


def closed(
    s: jax.Array,
    z: jax.Array,
    columns: jax.Array | None,
    /,
    *,
    bits: int,
    zero_point: str,
    scales: str,
    store_dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, ...]:
    """What is kept of each group, inside a kernel and outside; `opened` is the way back.

    Args:
      s: Scales from `fit`.
      z: Zero points from `fit`.
      columns: See `fit`.
      bits: See `fit`.
      zero_point: See `fit`.
      scales: See `fit`.
      store_dtype: See `fit`.

    Returns:
      Scales, and zero points where there is an array of them.
    """

    def whole(a: jax.Array) -> jax.Array:
        # But for what a product with a reciprocal leaves.
        return (a + 0.5).astype(jnp.int32)

    z = z * (1.0 / zero_unit(bits, scales))
    if columns is None:
        first = s.astype(store_dtype)
        second = whole(z).astype(jnp.uint8) if zero_point == "integer" else z.astype(store_dtype)
        return (first,) if zero_point == "none" else (first, second)
    u = whole(s * (1.0 / columns))
    if scales == "coded4":
        return ((u * 16 + whole(z)).astype(jnp.uint8),)
    kept = (u,) if zero_point == "none" else (u, whole(z))
    return tuple(a.astype(jnp.uint8) for a in kept)


def opened(
    scales: jax.Array, zeros: jax.Array | None, kind: str
) -> tuple[jax.Array, jax.Array | None]:
    """The numbers in what is kept of each group, inside a kernel and outside.

    Args:
      scales: Any block of what `closed` makes.
      zeros: Likewise; None where there is none.
      kind: One of `SCALES`.

    Returns:
      ``(s, z)``, float32: scales, in what the columns' numbers count if they are coded; and zero
      points in `zero_unit`, None if symmetric.
    """
    if kind == "coded4":
        scales, zeros = halves(scales.astype(jnp.int32))

    def wide(a: jax.Array) -> jax.Array:
        # Mosaic and Triton make floats of bytes fastest by way of int32.
        return (a.astype(jnp.int32) if a.dtype == jnp.uint8 else a).astype(jnp.float32)

    return wide(scales), None if zeros is None else wide(zeros)


def halves(both: jax.Array, bit: Any = 0) -> tuple[jax.Array, jax.Array]:
    """Scales and zero points of bytes of `CodedPairs`; `bit` is 0, known to a compiler or not."""
    return both >> (4 | bit), both & (15 | bit)


def write(
    s: jax.Array,
    z: jax.Array,
    columns: jax.Array | None = None,
    /,
    *,
    bits: int,
    zero_point: str,
    scales: str,
    store_dtype: jax.typing.DTypeLike,
) -> tuple[Scales, jax.Array | None]:
    """What is stored of scales and zero points; `read` gives them back.

    Args:
      s: ``float32[n_group, n]`` from `fit`.
      z: Likewise.
      columns: See `fit`.
      bits: See `fit`.
      zero_point: See `fit`.
      scales: See `fit`.
      store_dtype: See `fit`.

    Returns:
      Scales; and zero points, None if symmetric or in the scales' bytes, else uint8 if coded or
      whole.
    """
    first, *rest = closed(
        s, z, columns, bits=bits, zero_point=zero_point, scales=scales, store_dtype=store_dtype
    )
    of_columns = None if columns is None else columns[0].astype(store_dtype)
    return put_together(first, of_columns, scales), rest[0] if rest else None


def read(
    scales: Scales, zeros: jax.Array | None, *, bits: int
) -> tuple[jax.Array, jax.Array | float]:
    """The values of stored scales and zero points.

    Args:
      scales: See `Scales`.
      zeros: ``[..., n_group, n]`` in what `write` stores; None where it stores none.
      bits: Width of a code.

    Returns:
      ``(scales, zeros)``, float32 and in units of codes; one number of zeros if symmetric.
    """
    kept, columns = taken_apart(scales)
    s, z = opened(kept, zeros, kind_of(scales))
    if columns is not None:
        s = s * columns.astype(jnp.float32)[..., None, :]
    return s, 2.0 ** (bits - 1) if z is None else z * zero_unit(bits, kind_of(scales))


def kind_of(scales: Any) -> str:
    """How scales are stored, one of `SCALES`."""
    return next((kind for kind, form in _CODED.items() if type(scales) is form), "float")


def taken_apart(scales: Scales) -> tuple[jax.Array, jax.Array | None]:
    """What is stored per group; and per column, None unless the scales are coded."""
    if isinstance(scales, CodedScales):
        return scales.codes, scales.columns
    return scales, None


def put_together(per_group: Any, columns: Any, kind: str) -> Any:
    """Scales of that kind from what `taken_apart` gives."""
    return per_group if columns is None else _CODED[kind](per_group, columns)


def encode(
    w: jax.Array, scales: jax.Array, zeros: jax.Array, *, bits: int, nearest: Nearest = jnp.round
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
    return nearest(jnp.clip(w * (1.0 / scales) + zeros, 0.0, 2.0**bits - 1))


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

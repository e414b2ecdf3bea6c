"""Packed words to numbers that the matrix unit of a TPU multiplies.

A word holds carrier rows ``4r .. 4r+3`` of a plane in its bytes (bitcasting uint8 rows is free).

*bfloat16.* The insight is that a bit pattern is a number already: with a code ``q < 128`` in the
low mantissa bits, ``0x4300 | q`` is the bfloat16 number ``128 + q``, exactly. Two codes of a word
are turned with one shift, one *and*, one *or*; nothing is converted. The halves of a word give
every second row: 16 even, then 16 odd ones of each run of 32, so activations are permuted alike.
8-bit codes do not fit seven mantissa bits: they are made signed and converted.

*int8.* With one shift and one *and* per word, its four bytes are four codes, in their own order.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.layout import PLANES

RUN = 32
"""Carrier rows in one vector register: four bytes to the word, eight words."""

_MAX_PIECE = 512
"""Most rows in one product of the matrix unit."""

Load = Callable[[int, int, int, int], jax.Array]
"""``(plane, row, carrier, size) -> int32[size // 4, n]``: carriers of `size` rows of a unit, where
the plane's row-th run of units begins, see `merged`."""


def unit_rows(k: int, bits: int) -> int:
    """Rows of a unit: unit u is what field u of the narrowest plane holds."""
    return k * min(PLANES[bits]) // 8


def offset(bits: int, *, integer: bool) -> float:
    """What is added to every code on the way: the zero point takes it up."""
    if bits == 8:
        return -128.0
    return 0.0 if integer else 128.0


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of one unit and one fold of groups that are multiplied at once.

    Attributes:
      unit: their unit.
      carrier: the first one's place in the unit.
      row: the first one's code row.
      size: how many; a multiple of 32.
    """

    unit: int
    carrier: int
    row: int
    size: int


def pieces(k: int, bits: int, rows: int) -> list[Piece]:
    """All rows, cut where a run of `rows` or a unit ends.

    Args:
      k: rows.
      bits: width of a code.
      rows: of a group, or of the groups of a fold; a multiple of 32 (or k).

    Returns:
      Pieces; those that share carriers next to each other.
    """
    length = unit_rows(k, bits)
    found = []
    for unit in range(k // length):
        first = unit * length
        ends = {r - first for r in range(0, k, rows) if first < r < first + length}
        edges = sorted({0, length} | ends)
        found += [
            Piece(unit, at, first + at, min(end - at, _MAX_PIECE))
            for start, end in itertools.pairwise(edges)
            for at in range(start, end, _MAX_PIECE)
        ]
    return sorted(found, key=lambda p: (p.carrier, p.unit))


def _field(word: jax.Array, shift: int, mask: int) -> jax.Array:
    """Bits of an int32 word, moved right by `shift` (left if negative)."""
    if shift > 0:
        word = lax.shift_right_logical(word, jnp.int32(shift))
    elif shift < 0:
        word = lax.shift_left(word, jnp.int32(-shift))
    return word & jnp.int32(mask)


def merged(load: Load, unit: int, carrier: int, size: int, bits: int) -> tuple[jax.Array, int, int]:
    """Words in whose bytes a unit's codes are whole.

    Of two planes, units four apart have their codes in the two nibbles of the same merged bytes if
    they are 3-bit ones; 5-bit ones take a byte each.

    Args:
      load: gives a plane's words.
      unit: whose codes.
      carrier: first row within the unit.
      size: rows.
      bits: width of a code.

    Returns:
      ``(int32[size // 4, n], shift, mask)``: a code is ``byte >> shift & mask``.
    """
    main, *narrow = PLANES[bits]
    if not narrow:
        return load(0, 0, carrier, size), unit * bits, 2**bits - 1
    field, row = divmod(unit, main)
    low, high = load(0, row, carrier, size), load(1, 0, carrier, size)
    if bits == 3:
        nibble, field = divmod(field, 2)
        words = _field(low, 2 * field, 0x33333333) | _field(high, unit % 4 - 2, 0x44444444)
        return words, 4 * nibble, 7
    return _field(low, 4 * field, 0x0F0F0F0F) | _field(high, unit - 4, 0x10101010), 0, 31


def as_bfloat16(words: jax.Array, shift: int, mask: int) -> jax.Array:
    """``int32[rows, n]`` to ``bfloat16[4 * rows, n]``: codes plus their `offset`.

    Args:
      words: from `merged`.
      shift: from `merged`.
      mask: from `merged`.

    Returns:
      Rows in the order of `interleave`; 8-bit codes in their own.
    """
    if mask == 255:
        return as_int8(words, shift, mask).astype(jnp.float32).astype(jnp.bfloat16)
    halves = [
        _field(words, shift + 8 * odd, mask | mask << 16) | jnp.int32(0x43004300)
        for odd in range(2)
    ]
    even, odd = (pltpu.bitcast(half, jnp.bfloat16) for half in halves)
    half = RUN // 2
    return jnp.concatenate([
        part[r : r + half] for r in range(0, even.shape[0], half) for part in (even, odd)
    ])


def as_int8(words: jax.Array, shift: int, mask: int) -> jax.Array:
    """``int32[rows, n]`` to ``int8[4 * rows, n]``: codes plus their `offset`, in their own order.

    Args:
      words: from `merged`.
      shift: from `merged`.
      mask: from `merged`.

    Returns:
      Codes.
    """
    if mask == 255:
        return pltpu.bitcast(words ^ jnp.int32(-0x7F7F7F80), jnp.int8)
    return pltpu.bitcast(_field(words, shift, mask * 0x01010101), jnp.int8)


def interleave(lane: jax.Array) -> jax.Array:
    """Which row stands at a place in the order of `as_bfloat16`: 16 even, then 16 odd ones."""
    return (lane & ~31) | ((lane & 15) << 1) | ((lane >> 4) & 1)

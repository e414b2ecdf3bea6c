"""Activations times a packed weight, at the speed of its bits.

The matrix unit of a TPU multiplies bfloat16 by bfloat16, so every code must become one. The
insight is that a bit pattern already is: with a code ``q < 128`` in the low mantissa bits,
``0x4300 | q`` is the bfloat16 number ``128 + q``, exactly. Two codes of an int32 word are turned
with one shift, one *and*, one *or*; nothing is converted, and ``128`` joins the zero point:

    y[c] = sum_g s[g, c] * (sum_{i in g} x[i] (128 + q[i, c]))  -  sum_g X[g] s[g, c] (128 + z[g, c])

with ``X[g]`` the sum of the group's activations. Products of bfloat16 numbers and sums in float32
make the first term as exact as any float32 matmul; the second is multiplied as three bfloat16
pieces of each factor, which is float32 again.

Words hold carrier rows ``4r .. 4r+3`` in their bytes (a free bitcast of uint8), so the halves of a
word give every second row: 16 even, then 16 odd ones of each run of 32. The activations are
permuted alike, once per call, by a product with a permutation matrix.

8-bit codes do not fit seven mantissa bits: these are made signed and converted by the vector unit.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.layout import PLANES

_RUN = 32
"""Carrier rows in one vector register: four bytes to the word, eight words."""

_LANES = 128
_ROWS = 16
_MAX_PIECE = 512
"""Most rows in one product of the matrix unit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """What one step of the grid works on.

    Attributes:
      rows: of x.
      columns: of the weight, all `k` rows of each; a multiple of 128.
      parts: pieces that a block of a plane is fetched in: a single transfer does not use all of
        the memory's bandwidth.
      cores: cores of the chip, among which the columns are divided.
    """

    rows: int
    columns: int
    parts: int
    cores: int


def _info() -> Any:
    """The chip that is compiled for; a v5e where there is none, as in the interpreter."""
    try:
        return pltpu.get_tpu_info()
    except ValueError:
        return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)


def default_blocks(m: int, k: int, n: int, *, bits: int, group_size: int) -> Blocks:
    """The heuristic: columns as wide as a sixth of the fast memory allows, up to 1024.

    A wider block has fewer steps and longer rows to fetch, but the first one's transfer is not
    hidden, so each core gets two steps where the weight is wide enough.

    Args:
      m: rows of x.
      k: rows of the weight.
      n: its columns.
      bits: width of a code.
      group_size: rows that share a scale.

    Returns:
      Sizes for the chip that is compiled for.
    """
    info = _info()
    bytes_per_column = k * bits // 8 + 8 * (k // group_size)
    columns = 1024
    while columns > _LANES and (
        columns * bytes_per_column > info.vmem_capacity_bytes // 6
        or 2 * columns * info.num_cores > n
    ):
        columns //= 2
    cores = info.num_cores if pl.cdiv(n, columns) % info.num_cores == 0 else 1
    unit = k * min(PLANES[bits]) // 8
    grain = max(_LANES, group_size)
    parts = next((p for p in (4, 3, 2) if unit % (p * grain) == 0), 1)
    # Rows fill the registers of a bfloat16 array; those beyond m are dropped at the end.
    rows = min(pl.cdiv(m, _ROWS) * _ROWS, 64)
    return Blocks(rows=rows, columns=columns, parts=parts, cores=cores)


def _vmem_limit() -> int:
    return _info().vmem_capacity_bytes * 7 // 8


def refusal(
    *, m: int, k: int, n: int, bits: int, group_size: int, dtype: Any, **_: Any
) -> str | None:
    """Why this kernel cannot serve; None if it can.

    Args:
      m: rows of x.
      k: rows of the weight.
      n: its columns.
      bits: width of a code.
      group_size: rows that share a scale.
      dtype: of x.

    Returns:
      The reason.
    """
    del m, n
    unit = k * min(PLANES[bits]) // 8
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"x is {jnp.dtype(dtype).name}; the matrix unit multiplies bfloat16"
    if unit % _RUN:
        return (
            f"{k} rows of {bits}-bit codes are slabs of {unit} rows; "
            f"vector registers hold multiples of {_RUN}"
        )
    if group_size % _RUN and group_size != k:
        return f"group_size {group_size} is not a multiple of {_RUN}"
    return None


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Rows of one unit, one group and one part, multiplied at once."""

    unit: int
    carrier: int
    row: int
    size: int


def _pieces(k: int, bits: int, group_size: int, parts: int) -> list[_Piece]:
    """All rows. Unit u is field u of the narrowest plane; its carriers are counted within it."""
    length = k * min(PLANES[bits]) // 8
    cuts = {*range(0, length, length // parts), length}
    pieces = []
    for unit in range(k // length):
        first = unit * length
        groups = {g - first for g in range(0, k, group_size) if first < g < first + length}
        edges = sorted(cuts | groups)
        for start, end in zip(edges, edges[1:], strict=False):
            for at in range(start, end, _MAX_PIECE):
                size = min(end - at, _MAX_PIECE)
                pieces.append(_Piece(unit, at, first + at, size))
    # Units that share carriers next to each other, so that what they share is computed once.
    return sorted(pieces, key=lambda p: (p.carrier, p.unit))


def _field(word: jax.Array, shift: int, mask: int) -> jax.Array:
    """Bits of an int32 word, moved right by `shift` (left if negative)."""
    if shift > 0:
        word = lax.shift_right_logical(word, jnp.int32(shift))
    elif shift < 0:
        word = lax.shift_left(word, jnp.int32(-shift))
    return word & jnp.int32(mask)


def _merged(load: Any, unit: int, carrier: int, size: int, bits: int) -> tuple[jax.Array, int, int]:
    """Words with a unit's codes in whole fields: ``(int32[size // 4, n], shift, mask)``.

    Of two planes, units four apart have their codes in the two nibbles of the same merged bytes if
    they are 3-bit ones; 5-bit ones take a byte each.
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


def _codes(words: jax.Array, shift: int, mask: int, bits: int) -> jax.Array:
    """``bfloat16[4 * rows, n]`` from ``int32[rows, n]``: codes plus 128 in the permuted order.

    8-bit codes: minus 128, in their own order.
    """
    if bits == 8:
        signed = pltpu.bitcast(words ^ jnp.int32(-0x7F7F7F80), jnp.int8)
        return signed.astype(jnp.float32).astype(jnp.bfloat16)
    halves = [
        _field(words, shift + 8 * odd, mask | mask << 16) | jnp.int32(0x43004300)
        for odd in range(2)
    ]
    even, odd = (pltpu.bitcast(half, jnp.bfloat16) for half in halves)
    half = _RUN // 2
    return jnp.concatenate(
        [part[r : r + half] for r in range(0, even.shape[0], half) for part in (even, odd)]
    )


def _split3(a: jax.Array) -> list[jax.Array]:
    """float32 as a sum of three bfloat16 numbers, exactly up to float32's last bits."""
    parts = []
    for _ in range(3):
        part = a.astype(jnp.bfloat16)
        parts.append(part)
        a = a - part.astype(jnp.float32)
    return parts


def _prepare(x_ref: Any, x_codes_ref: Any, sums_ref: Any, *, bits: int, group_size: int) -> None:
    """Activations in the order that codes come in, and minus their sums by group.

    Both are products with zeros and ones, exact in float32. All chunks of 128 channels are stacked
    as rows, so that the matrix unit is loaded once for each.
    """
    m, k = x_ref.shape
    starts = range(0, k, _LANES)
    chunks = [x_ref[:, at : min(at + _LANES, k)] for at in starts]
    if k % _LANES:
        padding = jnp.zeros((m, -k % _LANES), x_ref.dtype)
        chunks[-1] = jnp.concatenate([chunks[-1], padding], axis=1)
    stacked = jnp.concatenate(chunks)
    row = lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), 0)
    lane = lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), 1)

    def times(chosen: jax.Array) -> jax.Array:
        ones = chosen.astype(jnp.float32).astype(jnp.bfloat16)
        return jnp.dot(stacked, ones, preferred_element_type=jnp.float32)

    if bits != 8:
        moved = times(row == ((lane & ~31) | ((lane & 15) << 1) | ((lane >> 4) & 1)))
        for i, at in enumerate(starts):
            size = min(_LANES, k - at)
            x_codes_ref[:, at : at + size] = moved[i * m : (i + 1) * m, :size].astype(jnp.bfloat16)
    # A run never crosses a group; its sum stands in every lane, and is added in its group's.
    run = math.gcd(group_size, _LANES)
    sums = [times((row // run) == r) for r in range(_LANES // run)]
    lane = lax.broadcasted_iota(jnp.int32, (m, _LANES), 1)
    for block in range(0, sums_ref.shape[1], _LANES):
        total = jnp.zeros((m, _LANES), jnp.float32)
        for i, at in itertools.product(range(len(starts)), range(0, _LANES, run)):
            group = (starts[i] + at) // group_size - block
            if starts[i] + at < k and 0 <= group < _LANES:
                part = sums[at // run][i * m : (i + 1) * m]
                total = jnp.where(lane == group, total - part, total)
        for i, piece in enumerate(_split3(total)):
            sums_ref[i * m : (i + 1) * m, block : block + _LANES] = piece


def _kernel(
    layer_ref: Any, x_ref: Any, *refs: Any,
    bits: int, group_size: int, parts: int, symmetric: bool,
) -> None:  # fmt: skip
    """One block of columns of y."""
    del layer_ref
    n_plane = parts * len(PLANES[bits])
    plane_refs, scales_ref, refs = refs[:n_plane], refs[n_plane], refs[n_plane + 1 :]
    zeros_ref, refs = (None, refs) if symmetric else (refs[0], refs[1:])
    y_ref, x_codes_ref, sums_ref, rows_ref = refs
    m, k = x_ref.shape

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        _prepare(x_ref, x_codes_ref, sums_ref, bits=bits, group_size=group_size)

    unit = k * min(PLANES[bits]) // 8

    @functools.cache
    def load(plane: int, row: int, carrier: int, size: int) -> jax.Array:
        at = row * unit + carrier
        of_plane = plane_refs[plane * parts : (plane + 1) * parts]
        part, at = divmod(at, of_plane[0].shape[0])
        return pltpu.bitcast(of_plane[part][at : at + size, :], jnp.int32)

    merged = functools.cache(functools.partial(_merged, load))
    # A float32 row is broadcast while it is loaded, for nothing.
    rows_ref[...] = scales_ref[...].astype(jnp.float32)
    offset = -128.0 if bits == 8 else 128.0
    zeros: Any = 2.0 ** (bits - 1)
    if zeros_ref is not None:
        zeros = zeros_ref[...]
        if zeros.dtype == jnp.uint8:
            zeros = zeros.astype(jnp.int32)
        zeros = zeros.astype(jnp.float32)
    x = x_ref if bits == 8 else x_codes_ref
    total = _correction(sums_ref, rows_ref[...] * (zeros + offset))
    for piece in _pieces(k, bits, group_size, parts):
        words = merged(piece.unit, piece.carrier, piece.size, bits)
        codes = _codes(*words, bits)
        product = jnp.dot(
            x[:, piece.row : piece.row + piece.size], codes, preferred_element_type=jnp.float32
        )
        group = piece.row // group_size
        total = total + product * rows_ref[group : group + 1, :]
    y_ref[...] = total.astype(y_ref.dtype)


def _correction(sums_ref: Any, terms: jax.Array) -> jax.Array:
    """``sums @ terms`` in float32, each split into three bfloat16 pieces."""
    groups = terms.shape[0]
    product = sum(
        jnp.dot(sums_ref[:, :groups], part, preferred_element_type=jnp.float32)
        for part in _split3(terms)
    )
    m = sums_ref.shape[0] // 3
    return product[:m] + product[m : 2 * m] + product[2 * m :]


def packed_matmul(
    x: jax.Array,
    planes: Sequence[jax.Array],
    scales: jax.Array,
    zeros: jax.Array | None,
    layer: jax.Array,
    *,
    bits: int,
    group_size: int,
    tiles: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """``y = x @ (s (q - z))`` for one layer of a stack.

    Args:
      x: ``bfloat16[m, k]``, finite.
      planes: ``uint8[L, k * width // 8, n]`` for each width in ``PLANES[bits]``.
      scales: ``[L, k // group_size, n]``.
      zeros: as ``scales``, or uint8, or None.
      layer: ``int32[]``.
      bits: width of a code.
      group_size: rows that share a scale; `refusal` tells which are served.
      tiles: block sizes; None for `default_blocks`.
      interpret: run by the TPU interpreter.

    Returns:
      ``y[m, n]``, bfloat16.
    """
    m, k = x.shape
    n = scales.shape[-1]
    sizes = tiles or default_blocks(m, k, n, bits=bits, group_size=group_size)
    columns, parts = sizes.columns, sizes.parts
    steps = pl.cdiv(n, columns * sizes.cores)

    def weight_spec(rows: int, part: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (pl.squeezed, rows, columns),
            lambda core, i, j, layer: (layer[0], part, core * steps + j),
        )

    operands, specs = [x], [pl.BlockSpec((sizes.rows, k), lambda core, i, j, layer: (i, 0))]
    for plane in planes:
        operands += [plane] * parts
        specs += [weight_spec(plane.shape[1] // parts, part) for part in range(parts)]
    for small in (scales, zeros):
        if small is not None:
            operands.append(small)
            specs.append(weight_spec(k // group_size, 0))
    sums = pl.cdiv(k // group_size, _LANES) * _LANES
    kernel = functools.partial(
        _kernel, bits=bits, group_size=group_size, parts=parts, symmetric=zeros is None
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(sizes.cores, pl.cdiv(m, sizes.rows), steps),
            in_specs=specs,
            out_specs=pl.BlockSpec(
                (sizes.rows, columns), lambda core, i, j, layer: (i, core * steps + j)
            ),
            scratch_shapes=[
                pltpu.VMEM((sizes.rows, k), jnp.bfloat16),
                pltpu.VMEM((3 * sizes.rows, sums), jnp.bfloat16),
                pltpu.VMEM((k // group_size, columns), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_vmem_limit(),
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="packed_matmul",
    )(layer.reshape(1), *operands)

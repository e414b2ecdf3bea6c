"""The portable implementation, plain XLA: what runs on CPUs, and where no kernel serves.

Arguments are checked and normalised by `pallas_kernels.dispatch`: activations are divided by the
channel scale already, and weights have a leading layer axis with the layer's number beside them.

The insight that makes decoding fast on a CPU: with few rows of ``x``, never write the weight down.
Where rows ``r`` are all of one group,

    sum_r x[r] w[r, c] = s[c] * (sum_r x[r] q[r, c] - z[c] * sum_r x[r])

and the inner sum, unrolled over a few rows of each octet, is an elementwise expression: XLA fuses
reading a layer out of its stack, unpacking, converting, multiplying and adding into one loop that
vectorises over the output channels, on all cores. With many rows the unpacking is better paid
once: a block of the weight is written down that stays in a cache, and multiplied. A wide weight is
multiplied some columns at a time, so that what is written down, partial sums too, stays there.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import reference
from pallas_kernels.grid import Scales, halves, taken_apart, zero_unit
from pallas_kernels.layout import PLANES
from pallas_kernels.problem import Problem
from pallas_kernels.reference import LowRank, Packed

FEW_ROWS = 4
"""Up to this many rows of x the weight is not written down."""

_UNROLLED = 8
"""Most rows of an octet in one partial sum; compile time grows with it."""

_BLOCK_WEIGHTS = 2**20
"""Most weights written down at a time, as float32: what a core's second cache level holds."""

_BLOCK_SUMS = 2**19
"""Most partial sums of a row at a time. They are written once and read once."""

_MIN_BLOCK_ROWS = 128
"""Rows of a block however wide it is: a product of fewer is mostly loop."""

_EXACT = jax.lax.Precision.HIGHEST


def _at(stacks: Any, layer: jax.Array) -> Any:
    """One layer of every stack."""
    return jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(
            a, layer, keepdims=False, allow_negative_indices=False
        ),
        stacks,
    )


def _cut(a: jax.Array, start: tuple[Any, ...], shape: tuple[int, ...]) -> jax.Array:
    """The block of this shape that starts there, at no negative index."""
    at = [np.int32(i) if isinstance(i, int) else i for i in start]
    return jax.lax.dynamic_slice(a, at, shape, allow_negative_indices=False)


def _largest_divisor(of: int, limit: int) -> int:
    return max(d for d in range(1, min(of, limit) + 1) if of % d == 0)


def _tie(x: jax.Array) -> jax.Array:
    """``uint8[]`` zero, but to the compiler a function of ``float32[k]`` x.

    In a loop over tokens whose planes do not change, XLA would move the unpacking out of the loop
    and keep four bytes per weight; optimization barriers are dropped before that pass. What is
    read is or-ed with this bit, which is zero unless x has a NaN, and then the product has one too.
    """
    return (x[0] != x[0]).astype(jnp.uint8)


class _PerGroup:
    """A stack of per-group values ``[L, k // g, n]``, to be read by rows of the weight.

    XLA:CPU slices no 16-bit floats: it converts the whole stack to float32 first and, in a loop,
    keeps that. So they are read as integers.
    """

    def __init__(self, a: jax.Array, part: int, group_size: int):
        layers, n_group, n = a.shape
        self.dtype = a.dtype
        if a.dtype in (jnp.bfloat16, jnp.float16):
            a = jax.lax.bitcast_convert_type(a, jnp.uint16)
        # One row for each `part` rows of the weight. It is a broadcast, so nothing is written.
        a = jnp.broadcast_to(a[:, :, None], (layers, n_group, group_size // part, n))
        self.octets = a.reshape(layers, 8, -1, n)

    def read(
        self, layer: jax.Array, octets: tuple[int, int], rows: tuple[Any, int],
        columns: tuple[Any, int],
    ) -> jax.Array:  # fmt: skip
        """float32[octets, rows, 1, columns], each given as start and count; rows in parts.

        One slice: pieces put together would keep XLA from vectorising what fuses with them.
        """
        (octet, count), (row, tall), (column, wide) = octets, rows, columns
        a = _cut(self.octets, (layer, octet, row, column), (1, count, tall, wide))
        a = a.reshape(count, tall, 1, wide)
        if self.dtype == jnp.bfloat16:
            return jax.lax.bitcast_convert_type(a.astype(jnp.uint32) << jnp.uint32(16), jnp.float32)
        if self.dtype == jnp.float16:
            a = jax.lax.bitcast_convert_type(a, jnp.float16)
        return a.astype(jnp.float32)


def _field(carriers: list[jax.Array], bits: int, octet: int) -> tuple[jax.Array, int]:
    """(``2**up`` times the codes of an octet as float32, ``up``), from one carrier a plane.

    The first plane's bits stay where they are, its shift is left to a factor of x or s; a second
    plane's are shifted to join them.
    """
    widths = PLANES[bits]
    up = widths[0] * (octet // widths[0])
    code = carriers[0].astype(jnp.int32)
    if bits < 8:
        code = code & jnp.int32((2 ** widths[0] - 1) << up)
    if len(widths) == 2:
        high = carriers[1].astype(jnp.int32)
        base = up + widths[0]
        shift = base - widths[1] * (octet // widths[1])
        high = high << jnp.int32(shift) if shift >= 0 else high >> jnp.int32(-shift)
        code = code | (high & jnp.int32((2 ** widths[1] - 1) << base))
    return code.astype(jnp.float32), up


class _Grid:
    """Stacks of scales and zero points, to be read together."""

    def __init__(self, scales: Any, zeros: Any, tie: Any, part: int, group_size: int, kind: str):
        # Bytes are taken apart before they are cut: XLA writes down what is cut 16 times.
        both = halves(scales, tie) if kind == "coded4" else (scales, zeros)
        self.kept = [_PerGroup(a, part, group_size) for a in both if a is not None]
        self.kind = kind

    def read(self, bits: int, *at: Any) -> tuple[jax.Array, jax.Array]:
        """Scales, and zero points in codes; see `_PerGroup.read`."""
        scales, *zeros = (a.read(*at) for a in self.kept)
        if not zeros:
            return scales, jnp.float32(2 ** (bits - 1))
        return scales, zeros[0] * jnp.float32(zero_unit(bits, self.kind))


def _by_columns(some: Any, lead: tuple[int, ...], n: int, width: int) -> jax.Array:
    """``[*lead, n]``, of which ``some(start, width)`` makes ``[*lead, width]``."""
    if width >= n:
        return some(jnp.zeros((), jnp.int32), n)

    def write(i: jax.Array, y: jax.Array) -> jax.Array:
        # The last block begins early, and some columns come out twice, the same.
        start = jnp.minimum(i * jnp.int32(width), jnp.int32(n - width))
        return jax.lax.dynamic_update_slice_in_dim(y, some(start, width), start, axis=-1)

    y = jnp.zeros((*lead, n), jnp.float32)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(-(-n // width)), write, y)


# A jit of its own: a long program to trace, and a model asks for it again and again.
@functools.partial(jax.jit, static_argnames=("bits", "group_size", "kind"))
def _one_row(
    x: jax.Array, planes: tuple[jax.Array, ...], scales: jax.Array, zeros: jax.Array | None,
    layer: jax.Array, *, bits: int, group_size: int, kind: str,
) -> jax.Array:  # fmt: skip
    """``float32[k] -> float32[n]`` without ever storing a weight."""
    layers, _, n = planes[0].shape
    rows = x.size // 8
    # Consecutive rows of an octet that are surely of one group, and those of one partial sum.
    part = math.gcd(rows, group_size)
    step = _largest_divisor(part, _UNROLLED)
    n_part, sums = rows // part, part // step
    # Octets that do not share a carrier have partial sums of their own: one loop over them all
    # would read more streams than a core can fetch ahead, at a third of the speed.
    apart = min(PLANES[bits])
    x = x.reshape(8 // apart, apart, n_part, sums, step)
    views = [p.reshape(layers, -1, n_part, sums, step, n) for p in planes]
    tie = _tie(x.reshape(-1))
    grid = _Grid(scales, zeros, tie, part, group_size, kind)

    def some(start: jax.Array, width: int) -> jax.Array:
        # Every row is cut out of the stack by itself: were a layer cut out first, its many readers
        # would make XLA either copy it or read the layer's number again for every weight, from
        # memory that LLVM cannot know to be unchanged, and then nothing is vectorised.
        def carriers(view: jax.Array, octet: int, j: int) -> jax.Array:
            at = (layer, octet % view.shape[1], 0, 0, j, start)
            cut = _cut(view, at, (1, apart, n_part, sums, 1, width))
            return cut.reshape(apart, n_part, sums, width) | tie

        y = jnp.zeros((apart, n_part, sums, width), jnp.float32)
        # Fields of the same carriers one after another, so that these are loaded once.
        for field in range(8 // apart):
            octet = field * apart
            partial = jnp.zeros_like(y)
            for j in range(step):
                code, up = _field([carriers(view, octet, j) for view in views], bits, octet)
                partial = partial + (x[field, ..., j, None] * jnp.float32(2.0**-up)) * code
            x_sum = functools.reduce(jnp.add, [x[field, ..., j, None] for j in range(step)])
            s, z = grid.read(bits, layer, (octet, apart), (0, n_part), (start, width))
            y = y + s * (partial - z * x_sum)
        # No reduction in here: XLA:CPU hands one, with all that fuses into it, to a library that
        # wants every operand in memory. A dot with two rows of ones: one would be compiled.
        ones = jnp.ones((2, apart * n_part * sums), jnp.float32)
        return jnp.matmul(ones, y.reshape(-1, width), precision=_EXACT)[0]

    return _by_columns(some, (), n, max(1, _BLOCK_SUMS // (apart * n_part * sums)))


def _block_octet_rows(rows: int, part: int, n: int) -> int:
    """Rows that a block takes of each octet: whole parts, or a fraction of one."""
    limit = max(_MIN_BLOCK_ROWS // 8, _BLOCK_WEIGHTS // (8 * n))
    if part > limit:
        return _largest_divisor(part, limit)
    return part * _largest_divisor(rows // part, limit // part)


def _many_rows(
    x: jax.Array, planes: tuple[jax.Array, ...], scales: jax.Array, zeros: jax.Array | None,
    layer: jax.Array, *, bits: int, group_size: int, kind: str,
) -> jax.Array:  # fmt: skip
    """``float32[m, k] -> float32[m, n]``, some rows of every octet at a time."""
    layers, _, n = planes[0].shape
    m, k = x.shape
    rows = k // 8
    part = math.gcd(rows, group_size)
    most = min(n, max(1, _BLOCK_WEIGHTS // _MIN_BLOCK_ROWS))
    block = _block_octet_rows(rows, part, most)
    n_part, n_block = max(block // part, 1), rows // block
    views = [p.reshape(layers, -1, rows, n) for p in planes]
    tie = _tie(x[0])
    grid = _Grid(scales, zeros, tie, part, group_size, kind)
    x_blocks = x.reshape(m, 8, n_block, block).transpose(2, 0, 1, 3).reshape(n_block, m, -1)

    def some(start: jax.Array, width: int) -> jax.Array:
        def unpacked(i: jax.Array) -> jax.Array:
            code = jnp.zeros((8, block, width), jnp.uint8)
            base = 0
            for bit, view in zip(PLANES[bits], views, strict=True):
                at = (layer, 0, i * block, start)
                carriers = _cut(view, at, (1, bit, block, width)) | tie
                # An iota along the fields keeps this one loop; see `layout.unpack`.
                fields = jax.lax.broadcasted_iota(jnp.uint8, (8 // bit, 1, 1, 1), 0)
                plane = (carriers >> (fields * jnp.uint8(bit))) & jnp.uint8(2**bit - 1)
                code = code | (plane.reshape(8, block, width) << jnp.uint8(base))
                base += bit
            return code.astype(jnp.int32).astype(jnp.float32).reshape(8, n_part, -1, width)

        def add_block(y: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            i, x_block = at
            s, z = grid.read(bits, layer, (0, 8), (i * block // part, n_part), (start, width))
            w = s * (unpacked(i) - z)
            return y + jnp.matmul(x_block, w.reshape(-1, width), precision=_EXACT), None

        zeros_y = jnp.zeros((m, width), jnp.float32)
        steps = jnp.arange(n_block, dtype=jnp.int32), x_blocks
        return jax.lax.scan(add_block, zeros_y, steps)[0]

    return _by_columns(some, (m,), n, most)


def packed_matmul(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scales: Scales,
    zeros: jax.Array | None,
    layer: jax.Array,
    *,
    problem: Problem,
) -> jax.Array:
    """``y = x @ (s (q - z))``, accumulated in float32; tuned for CPUs.

    The formulation depends on shapes alone, which are static: see `FEW_ROWS`.

    Args:
      x: ``[m, k]``, finite.
      planes: ``uint8[L, k * width // 8, n]`` for each width in ``PLANES[bits]``.
      scales: ``[L, k // group_size, n]``, float32, bfloat16 or float16, or coded.
      zeros: As scales, or uint8, or None.
      layer: ``int32[]``.
      problem: Bits and group size.

    Returns:
      ``y[m, n]`` in ``problem.y_dtype``.
    """
    grouping: Any = {
        "bits": problem.bits, "group_size": problem.group_size, "kind": problem.scales
    }  # fmt: skip
    m, n = x.shape[0], planes[0].shape[-1]
    codes, columns = taken_apart(scales)
    weight = (planes, codes, zeros, layer)
    rows = x.astype(jnp.float32)
    if m == 0:
        y = jnp.zeros((0, n), jnp.float32)
    elif m <= FEW_ROWS:
        # A loop nest per row: one nest with the rows inside is no longer vectorised over n.
        y = jnp.stack([_one_row(rows[i], *weight, **grouping) for i in range(m)])
    else:
        y = _many_rows(rows, *weight, **grouping)
    if columns is not None:
        y = y * _at(columns, layer).astype(jnp.float32)[None]
    return y.astype(problem.y_dtype)


def dense_matmul(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scales: Scales,
    zeros: jax.Array | None,
    layer: jax.Array,
    *,
    problem: Problem,
) -> jax.Array:
    """As `packed_matmul`, through a dense weight of x's dtype, for a matrix unit and many rows.

    Args:
      x: See `packed_matmul`, as the arguments after it.
      planes: See `packed_matmul`.
      scales: See `packed_matmul`.
      zeros: See `packed_matmul`.
      layer: See `packed_matmul`.
      problem: See `packed_matmul`.

    Returns:
      ``y[m, n]`` in ``problem.y_dtype``; the weight was rounded to it once, sums are float32.
    """
    w = reference.dequantize(
        *_at((planes, scales, zeros), layer), bits=problem.bits, group_size=problem.group_size,
        dtype=x.dtype,
    )  # fmt: skip
    precision = _EXACT if x.dtype == jnp.float32 else None
    y = jnp.matmul(x, w, precision=precision, preferred_element_type=jnp.float32)
    return y.astype(problem.y_dtype)


def quantize_pack(
    w: jax.Array,
    channel_scale: jax.Array | None,
    importance: jax.Array | None,
    low_rank: LowRank | None,
    layer: jax.Array,
    *,
    problem: Problem,
) -> Packed:
    """Rounds and packs one layer; see `reference.quantize_pack`.

    Args:
      w: ``[L, d_in, n]``.
      channel_scale: ``[d_in]`` or None.
      importance: ``[d_in]`` or None.
      low_rank: ``(A[d_in, r], B[r, n])`` or None.
      layer: ``int32[]``.
      problem: What to do.

    Returns:
      ``(planes, scales, zeros)`` of that layer.
    """
    return reference.quantize_pack(
        _at(w, layer), channel_scale, importance, low_rank, problem=problem
    )


def prefill_quantize(
    x: jax.Array,
    w: jax.Array,
    channel_scale: jax.Array | None,
    importance: jax.Array | None,
    low_rank: LowRank | None,
    layer: jax.Array,
    *,
    problem: Problem,
) -> tuple[jax.Array, Packed]:
    """The prompt's product with one layer, and that layer packed.

    Args:
      x: ``[m, d_in]``; not divided by the channel scale.
      w: See `quantize_pack`, as the arguments after it.
      channel_scale: See `quantize_pack`.
      importance: See `quantize_pack`.
      low_rank: See `quantize_pack`.
      layer: See `quantize_pack`.
      problem: See `quantize_pack`. Where it is `quantized`, ``x / D`` is multiplied with the codes
        that were just packed, instead of x with w; the low-rank part is left to the caller.

    Returns:
      ``(y[m, n] in x's dtype, (planes, scales, zeros))``.
    """
    packed = quantize_pack(w, channel_scale, importance, low_rank, layer, problem=problem)
    if problem.quantized:
        y = reference.packed_matmul(x, *packed, channel_scale, problem=problem)
    else:
        weight = _at(w, layer).astype(x.dtype)
        y = jnp.matmul(x, weight, preferred_element_type=jnp.float32)
    return y.astype(x.dtype), packed

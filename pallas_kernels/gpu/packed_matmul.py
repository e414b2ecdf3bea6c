"""``y = x Q`` from packed codes, Triton backend: one kernel for a row or two, one for more.

Both walk over carrier rows. A step takes ``depth`` carrier rows of every plane; their fields are
``depth`` consecutive rows of each slab, all inside one group, so that a partial product of the raw
codes is scaled once per column. A program owns a block of columns and one of ``splits`` runs of
steps; partial sums of the splits are added by XLA (no atomics: the result is reproducible).

* One or two rows, `_few_rows`: products and sums in float32, spread over threads like the carriers
  as they are loaded. Nothing crosses threads before the end, and what would be 14/16 padding of a
  tensor core's operand is not computed. Beyond two rows the multiply-adds (one per weight and row,
  beside about two instructions to unpack it) would exceed what can be issued at full bandwidth.
* More rows, `_many_rows`: tensor cores, rows padded to 16. The zero point enters through the sums
  of x, which XLA computes beside the kernel.

Block sizes (`blocks`) are a heuristic, derived for an H100 and never measured: see its docstring.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.gpu import triton, unpack
from pallas_kernels.gpu.limits import SHARED_BYTES, check_addressable
from pallas_kernels.gpu.triton import pallas_call, plgpu
from pallas_kernels.grid import Scales, opened, taken_apart
from pallas_kernels.layout import PLANES
from pallas_kernels.problem import Problem

_EXACT = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Block sizes of one call; all powers of two.

    Attributes:
      rows: of x per program; at most 2 selects `_few_rows`.
      columns: of the weight per program.
      depth: carrier rows per step; divides the group and the slab.
      splits: programs that share a column block; any number.
      num_warps: warps per program.
      num_stages: depth of Triton's software pipeline.
    """

    rows: int
    columns: int
    depth: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3


def granule(problem: Problem) -> int:
    """The longest run of rows, a power of two, that never leaves its group or its slab."""
    run = math.gcd(problem.group_size, problem.k // unpack.slabs(problem.bits))
    return run & -run


def unservable(problem: Problem, least: int) -> str | None:
    """What this kernel and Hopper's refuse alike.

    Args:
      problem: What is asked for.
      least: Rows that the kernel needs to share a scale and a field.

    Returns:
      The reason, None if there is none.
    """
    p, run = problem, granule(problem)
    if run < least:
        return (
            f"{p.k} rows of {p.bits}-bit codes in groups of {p.group_size} share a scale and a bit "
            f"field for only {run} rows at a time, the kernel needs {least}"
        )
    if p.m < 1 or p.n < 1:
        return f"nothing to compute: {p.m} rows, {p.n} columns"
    return None


def _ceil_power(value: int) -> int:
    return 1 << (value - 1).bit_length()


def shared_bytes(tiles: Tiles, problem: Problem) -> int:
    """Shared memory of `_many_rows`, as the compiler lays it out (compared with its own figures).

    Args:
      tiles: Block sizes.
      problem: What is asked for.

    Returns:
      Bytes; an upper bound before compute capability 9.0.
    """
    bits, itemsize = problem.bits, problem.itemsize
    parts = sum(width // min(PLANES[bits]) for width in PLANES[bits])
    x = unpack.slabs(bits) * tiles.rows * tiles.depth * itemsize
    carriers = parts * tiles.depth * tiles.columns
    if itemsize < 4:
        return tiles.num_stages * x + (tiles.num_stages - 1) * carriers + 512
    # Tensor cores read bfloat16 weights from registers, float32 ones go through shared memory.
    return (tiles.num_stages - 1) * (x + carriers) + 4 * tiles.depth * tiles.columns + 512


def blocks(problem: Problem) -> Tiles:
    """The default block sizes.

    A step loads 128 carrier rows (fewer where each holds more slabs, so that the unrolled code and
    the registers stay bounded) by 128 columns: 16 KiB in flight per program and 4-bit plane, where
    an H100 needs about 18 KiB per multiprocessor to cover its latency. Shared memory stays below
    96 KiB, what an L4 has; an H100 holds two such programs. Splits are added until there
    are two programs for each of 132 multiprocessors (four where no tensor core is used, as those
    need fewer registers), but partial sums never exceed a quarter of the weight's bytes.

    Args:
      problem: What is asked for.

    Returns:
      What `packed_matmul` uses if it is given none.
    """
    m, n, bits = problem.m, problem.n, problem.bits
    few = m <= 2
    run = granule(problem)
    # Exact products of float32 take the registers of four bfloat16 ones; larger blocks spill.
    exact = problem.itemsize == 4 and not few
    rows = m if few else min(max(_ceil_power(m), 16), 32 if exact else 64)
    wide = rows == 64 or exact or (rows == 32 and unpack.slabs(bits) == 8)
    tiles = Tiles(
        rows=rows, columns=min(128, max(_ceil_power(n), 16)),
        depth=min(run, 256 // unpack.slabs(bits), 32 if exact else 128), splits=1,
        num_warps=8 if wide else 4,
    )  # fmt: skip
    while not few and shared_bytes(tiles, problem) > SHARED_BYTES:
        # Fewer stages first: a smaller depth multiplies the additions of scaled partial products.
        smaller: dict[str, int] = {"num_stages": 2}
        if tiles.num_stages == 2:
            smaller = {"depth": tiles.depth // 2}
        tiles = dataclasses.replace(tiles, **smaller)
    steps = problem.k // unpack.slabs(bits) // tiles.depth
    programs = pl.cdiv(n, tiles.columns) * pl.cdiv(m, rows)
    wanted = pl.cdiv(4 * 132 if few else 2 * 132, programs)
    splits = max(1, min(wanted, steps, problem.k * bits // (128 * m)))
    # As even as the number of steps allows: a longer last run would be waited for.
    return dataclasses.replace(tiles, splits=pl.cdiv(steps, pl.cdiv(steps, splits)))


def refusal(problem: Problem, chip: str | None) -> str | None:
    """Why this kernel cannot serve a problem.

    Args:
      problem: The problem.
      chip: Short name of the GPU, None if unknown.

    Returns:
      The reason, None if it can.
    """
    return triton.refusal(chip) or unservable(problem, least=16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Facts(Problem):
    """What the kernels' bodies know statically."""

    tiles: Tiles
    interpret: bool

    @property
    def slab(self) -> int:
        """Rows of a slab of the narrowest plane."""
        return self.k // unpack.slabs(self.bits)

    @property
    def offset(self) -> float:
        """What is subtracted from codes while they are unpacked."""
        return 2.0 ** (self.bits - 1) if self.zero_point == "none" else 0.0


def _load(ref: Any, rows: Any, columns: Any, inside: Any, layer: Any = None) -> jax.Array:
    """A masked block; masked-out columns are 0. Rows are an index, a slice, or None: no axis."""
    at = tuple(index for index in (layer, rows, columns) if index is not None)
    if inside is None:
        return plgpu.load(ref.at[at])
    other = jnp.zeros((), ref.dtype)
    return plgpu.load(ref.at[at], mask=inside, other=other)


def _columns(facts: _Facts) -> tuple[Any, Any]:
    """This program's columns and which of them exist (None: all)."""
    size = facts.tiles.columns
    start = pl.program_id(1) * size
    inside = None if facts.n % size == 0 else start + jnp.arange(size, dtype=jnp.int32) < facts.n
    return pl.ds(start, size), inside


def _steps(facts: _Facts) -> tuple[Any, Any]:
    """First step of this program and the one after its last."""
    steps = facts.slab // facts.tiles.depth
    each = pl.cdiv(steps, facts.tiles.splits)
    first = pl.program_id(2) * each
    return first, jnp.minimum(first + each, steps)


def _scale_and_zero(
    refs: Any, row: Any, columns: Any, inside: Any, layer: Any, facts: _Facts
) -> Any:
    """Scales ``f32[c]`` of the group of a row and, if there are any, zero points."""
    kept = [_load(ref, row // facts.group_size, columns, inside, layer) for ref in refs]
    scales, zeros = opened(kept[0], kept[1] if facts.zero_dtype else None, facts.scales)
    return [scales] if zeros is None else [scales, zeros * facts.zero_unit]


def _by_columns(sums: jax.Array, ref: Any, columns: Any, inside: Any, axis: int) -> jax.Array:
    """Sums times what there is per column, if scales are coded; the sums' other axis is `axis`."""
    if ref is None:
        return sums
    factor = _load(ref, None, columns, inside)
    return sums * (factor[None, :] if axis == 0 else factor[:, None])


def _few_rows(layer_ref: Any, x_ref: Any, *refs: Any, facts: _Facts) -> None:
    """One or two rows of x; see the module's docstring."""
    *planes, y_ref = refs
    count = len(PLANES[facts.bits])
    planes, grid_refs = planes[:count], planes[count:]
    of_columns = grid_refs.pop() if facts.coded else None
    tiles, layer = facts.tiles, layer_ref[0]
    columns, inside = _columns(facts)
    mask = None if inside is None else inside[None, :]
    height = min(16, tiles.depth)
    zero = jnp.zeros((height, tiles.columns), jnp.float32)
    multiply_add = functools.partial(unpack.multiply_add, interpret=facts.interpret)
    # Not subtracted from each weight but, times the sum of x, from each group.
    bias = 0.0 if facts.bits == 8 else 128.0

    def wide(a: jax.Array) -> jax.Array:
        return jnp.broadcast_to(a, zero.shape)

    def slab_step(slab: int, step: Any, loaded: Any, accs: Any) -> Any:
        row = slab * facts.slab + step * tiles.depth
        scale, *zeros = _scale_and_zero(grid_refs, row, columns, inside, layer, facts)
        places = unpack.sources(slab, facts.bits)
        fields = [field for _, field in places]
        parts = [zero] * facts.m
        sums = [jnp.zeros((height,), jnp.float32)] * facts.m
        for chunk in range(tiles.depth // height):
            carriers = [loaded[i, part, chunk] for i, (part, _) in enumerate(places)]
            q = unpack.numbers(
                carriers, fields, bits=facts.bits, dtype=jnp.float32, offset=-bias,
                interpret=facts.interpret,
            )  # fmt: skip
            for i in range(facts.m):
                x = x_ref[i, pl.ds(row + chunk * height, height)].astype(jnp.float32)
                parts[i] = multiply_add(wide(x[:, None]), q, parts[i])
                sums[i] = sums[i] + x
        origin = wide((zeros[0] if zeros else scale * 0.0 + facts.offset)[None, :] + bias)
        parts = [
            multiply_add(wide(-s[:, None]), origin, p) for p, s in zip(parts, sums, strict=True)
        ]
        scale = wide(scale[None, :])
        return [multiply_add(p, scale, acc) for acc, p in zip(accs, parts, strict=True)]

    def step(t: Any, accs: Any) -> Any:
        loaded = {
            (i, part, chunk): _load(
                planes[i],
                pl.ds(part * facts.slab + t * tiles.depth + chunk * height, height),
                columns, mask, layer,
            )
            for i, width in enumerate(PLANES[facts.bits])
            for part in range(width // min(PLANES[facts.bits]))
            for chunk in range(tiles.depth // height)
        }  # fmt: skip
        for slab in range(unpack.slabs(facts.bits)):
            accs = slab_step(slab, t, loaded, accs)
        return accs

    accs = lax.fori_loop(*_steps(facts), step, [zero] * facts.m)
    for i, acc in enumerate(accs):
        total = jnp.sum(acc, axis=0, keepdims=True)
        total = _by_columns(total, of_columns, columns, inside, 0).astype(y_ref.dtype)
        plgpu.store(y_ref.at[pl.program_id(2), pl.ds(i, 1), columns], total, mask=mask)


def _many_rows(layer_ref: Any, x_ref: Any, *refs: Any, facts: _Facts) -> None:
    """A block of rows of x on the tensor cores; see the module's docstring."""
    *operands, y_ref = refs
    count = len(PLANES[facts.bits])
    planes, grid_refs = operands[:count], operands[count:]
    of_columns = grid_refs.pop() if facts.coded else None
    sums_ref = None if facts.zero_point == "none" else grid_refs.pop()
    tiles, layer = facts.tiles, layer_ref[0]
    columns, inside = _columns(facts)
    mask = None if inside is None else inside[None, :]
    first = pl.program_id(0) * tiles.rows
    rows = pl.ds(first, tiles.rows)
    ragged = facts.m % tiles.rows != 0
    real = first + jnp.arange(tiles.rows, dtype=jnp.int32) < facts.m if ragged else None
    real_rows = None if real is None else real[:, None]

    def step(t: Any, acc: Any) -> Any:
        narrow = min(PLANES[facts.bits])
        loaded = [
            [_load(plane, pl.ds(part * facts.slab + t * tiles.depth, tiles.depth), columns, mask,
                   layer) for part in range(width // narrow)]
            for plane, width in zip(planes, PLANES[facts.bits], strict=True)
        ]  # fmt: skip
        for slab in range(unpack.slabs(facts.bits)):
            row = slab * facts.slab + t * tiles.depth
            places = unpack.sources(slab, facts.bits)
            q = unpack.numbers(
                [parts[part] for parts, (part, _) in zip(loaded, places, strict=True)],
                [field for _, field in places], bits=facts.bits, dtype=x_ref.dtype,
                offset=facts.offset, interpret=facts.interpret,
            )  # fmt: skip
            x = _load(x_ref, rows, pl.ds(row, tiles.depth), real_rows)
            precision = _EXACT if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
            part = jnp.dot(q.T, x.T, preferred_element_type=jnp.float32, precision=precision)
            scale, *zeros = _scale_and_zero(grid_refs, row, columns, inside, layer, facts)
            if zeros:
                sums = _load(sums_ref, row // tiles.depth, rows, real)
                part = part - zeros[0][:, None] * sums[None, :]
            acc = acc + part * scale[:, None]
        return acc

    start = jnp.zeros((tiles.columns, tiles.rows), jnp.float32)
    acc = lax.fori_loop(*_steps(facts), step, start)
    acc = _by_columns(acc, of_columns, columns, inside, 1)
    kept = mask if real_rows is None else real_rows
    if mask is not None and real_rows is not None:
        kept = mask & real_rows
    y = acc.T.astype(y_ref.dtype)
    plgpu.store(y_ref.at[pl.program_id(2), rows, columns], y, mask=kept)


def packed_matmul(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scales: Scales,
    zeros: jax.Array | None,
    layer: jax.Array,
    *,
    problem: Problem,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """``y = x @ (s (q - z))``, accumulated in float32; arguments as `dispatch` normalises them.

    Args:
      x: ``[m, k]``.
      planes: ``uint8[L, k * width // 8, n]`` for each width in ``PLANES[bits]``.
      scales: ``[L, k // group_size, n]``, or coded.
      zeros: As scales, or uint8, or None.
      layer: ``int32[]``, which of the L.
      problem: What to do; `refusal` tells what is served.
      tiles: Block sizes; None is `blocks`.
      interpret: Runs on the CPU, for tests.

    Returns:
      ``y[m, n]`` in ``problem.y_dtype``.

    Raises:
      ValueError: A stack of planes is between 2 and 4 GiB.
    """
    m, k, n = problem.m, problem.k, problem.n
    check_addressable(planes)
    tiles = tiles or blocks(problem)
    facts = _Facts(**vars(problem), tiles=tiles, interpret=interpret)
    few = m <= 2 and tiles.rows <= 2
    codes, of_columns = taken_apart(scales)
    operands = [layer.reshape(1), x, *planes, codes]
    if zeros is not None:
        operands.append(zeros)
    if problem.zero_point != "none" and not few:
        runs = x.reshape(m, k // tiles.depth, tiles.depth)
        operands.append(jnp.sum(runs, axis=2, dtype=jnp.float32).T)
    if of_columns is not None:
        row = lax.dynamic_index_in_dim(of_columns, layer, keepdims=False)
        operands.append(row.astype(jnp.float32))
    grid = (1 if few else pl.cdiv(m, tiles.rows), pl.cdiv(n, tiles.columns), tiles.splits)
    partial = problem.y_dtype if tiles.splits == 1 else jnp.float32
    out = pallas_call(
        functools.partial(_few_rows if few else _many_rows, facts=facts),
        out_shape=jax.ShapeDtypeStruct((tiles.splits, m, n), partial),
        grid=grid,
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
        interpret=interpret,
        name=f"packed_matmul_{problem.bits}bit",
    )(*operands)
    return out[0] if tiles.splits == 1 else jnp.sum(out, axis=0).astype(problem.y_dtype)

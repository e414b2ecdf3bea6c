"""A weight in, its packed codes, scales and zero points out: one read of the weight.

A step of the grid takes a block of columns, all or a fraction of their rows, and rounds it as
`pallas_kernels.tpu.rounding` describes. The codes of a column of blocks stay in fast memory until
they are complete, because a carrier holds codes from rows far apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.layout import PLANES
from pallas_kernels.problem import Problem
from pallas_kernels.reference import LowRank, Packed, column_scales, with_columns
from pallas_kernels.tpu import memory
from pallas_kernels.tpu.blocks import LANES, Rounding
from pallas_kernels.tpu.rounding import Rounder
from pallas_kernels.tpu.schedule import emit

_ROWS = 4096
"""Most rows in a block: the code of a step is unrolled over its groups."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """What one step of the grid works on.

    Attributes:
      rows: of the weight; divides k, and is k or a multiple of 128.
      columns: of the weight, a multiple of 128.
      cores: cores of the chip, among which the columns are divided.
    """

    rows: int
    columns: int
    cores: int


def block_rows(k: int, group_size: int, most: int) -> int:
    """The most rows up to ``most``, if possible, that blocks of whole groups can have."""
    sizes = (
        rows
        for rows in range(k, 0, -group_size)
        if k % rows == 0 and (rows == k or rows % LANES == 0)
    )
    fitting = list(sizes)
    return next((rows for rows in fitting if rows <= most), fitting[-1])


def block_cores(n: int, columns: int, cores: int) -> int:
    """As many cores as the chip has, if they get equally many blocks of columns."""
    return cores if pl.cdiv(n, columns) % cores == 0 else 1


def shapes(problem: Problem) -> Iterator[Rounding]:
    """Blocks in the order in which they are preferred: wide ones of many rows first.

    Coded scales prefer narrow blocks of all rows to wide ones of some: without a whole column in
    fast memory, XLA would read the weight once more to find the column's number.

    Args:
      problem: what is rounded.

    Yields:
      It, in such blocks.
    """
    p = problem
    widths = (2 * LANES, LANES) if p.n > LANES else (LANES,)
    sizes = [
        (block_rows(p.k, p.group_size, most), columns)
        for columns in widths
        for most in (_ROWS, _ROWS // 2, _ROWS // 4, 1)
    ]
    if p.coded:
        sizes = [at for at in sizes if at[0] == p.k] + [(p.k, LANES)] + sizes
    for rows, columns in sizes:
        yield Rounding(**vars(p), weighed=p.searched, rows=rows, columns=columns)


def default_blocks(problem: Problem, chip: str | None = None) -> Blocks | None:
    """The heuristic: all rows up to 4096, 256 columns, or less where the fast memory is small.

    Args:
      problem: what is rounded.
      chip: short name; None is the one that is compiled for.

    Returns:
      Sizes, None if none fit.
    """
    info = memory.chip_info(chip)
    spec = memory.first_fitting(
        ((s, memory.needed(s, w_itemsize=problem.itemsize)) for s in shapes(problem)), info
    )
    if spec is None:
        return None
    cores = block_cores(problem.n, spec.columns, info.num_cores)
    return Blocks(rows=spec.rows, columns=spec.columns, cores=cores)


def unservable(problem: Problem) -> str | None:
    """What `quantize_pack` and `prefill_quantize` refuse alike.

    Args:
      problem: what is rounded.

    Returns:
      The reason; None if there is none.
    """
    p = problem
    if p.group_size % 32:
        return f"group_size {p.group_size} is not a multiple of 32, the rows of a register of bytes"
    if p.n < LANES:
        return f"{p.n} columns are fewer than the {LANES} lanes of a register"
    for dtype in (p.dtype, p.store_dtype):
        if dtype not in {"bfloat16", "float32"}:
            return f"{dtype} is no type of the vector unit; bfloat16 and float32 are"
    if p.rank > 1024:
        return f"a low-rank part of rank {p.rank} exceeds 1024"
    return None


def refusal(problem: Problem, chip: str | None = None) -> str | None:
    """Why this kernel cannot serve; None if it can.

    Args:
      problem: what it is asked for.
      chip: short name; None is the one that is compiled for.

    Returns:
      The reason.
    """
    why = unservable(problem)
    if why is None and default_blocks(problem, chip) is None:
        return too_large(problem.k, chip)
    return why


def too_large(k: int, chip: str | None) -> str:
    """The reason where no blocks fit."""
    size = memory.limit(memory.chip_info(chip)) >> 20
    return f"columns of {k} rows do not fit into {size} MiB of fast memory with what they need"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A `pallas_call` in the making: everything that concerns the rounding.

    Attributes:
      spec: what to round.
      cores: see `Blocks`.
      operands: weight, and what is given beside it.
      in_specs: of the operands.
      out_specs: planes, scales, zero points, what the kernel found of the columns.
      out_shape: likewise.
      of_columns: the last operand, from `reference.column_scales`, or None.
    """

    spec: Rounding
    cores: int
    operands: list[Any]
    in_specs: list[Any]
    out_specs: list[Any]
    out_shape: list[Any]
    of_columns: jax.Array | None

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cores, columns of blocks of a core, blocks of a column."""
        s = self.spec
        return self.cores, pl.cdiv(pl.cdiv(s.n, s.columns), self.cores), s.steps

    def column(self, core: Any, i: Any) -> Any:
        """The column of blocks of a grid point."""
        return core * self.grid[1] + i

    def rounder(self, zero: Any, refs: list[Any], outs: list[Any], rounded: Any) -> Rounder:
        """The rounder of a kernel's refs: of operands, then of outputs, then of scratch."""
        s = self.spec
        refs = list(refs)
        w = refs.pop(0)
        scale = refs.pop(0) if s.scaled else None
        importance = refs.pop(0) if s.weighed else None
        down, up = (refs.pop(0), refs.pop(0)) if s.rank else (None, None)
        of_columns = None if self.of_columns is None else refs.pop(0)
        planes = tuple(outs[: len(PLANES[s.bits])])
        scales, *zeros = outs[len(planes) : len(self.out_shape)]
        if s.finds_columns:
            of_columns = zeros.pop()
        return Rounder(
            spec=s, zero=zero, step=0 if s.steps == 1 else pl.program_id(2), w=w,
            channel_scale=scale, importance=importance, down=down, up=up, of_columns=of_columns,
            planes=planes, scales=scales, zeros=zeros[0] if zeros else None, rounded=rounded,
            scratch=tuple(outs[len(self.out_shape) :]),
        )  # fmt: skip


def _by_lanes(per_row: jax.Array, k: int) -> jax.Array:
    """``[ceil(k / 128), 128]`` of what is given per row."""
    total = pl.cdiv(k, LANES) * LANES
    return jnp.pad(per_row.astype(jnp.float32), (0, total - per_row.size)).reshape(-1, LANES)


def prepare(
    w: jax.Array, channel_scale: jax.Array | None, importance: jax.Array | None,
    low_rank: LowRank | None, layer: jax.Array, blocks: Blocks, problem: Problem,
) -> Call:  # fmt: skip
    """Lays out operands and outputs.

    Args:
      w: ``[L, d_in, n]``.
      channel_scale: ``[d_in]`` or None.
      importance: ``[d_in]`` or None.
      low_rank: ``(A, B)`` or None.
      layer: int32[].
      blocks: sizes.
      problem: what is rounded.

    Returns:
      The call.
    """
    weighed = problem.searched and importance is not None
    spec = Rounding(**vars(problem), weighed=weighed, rows=blocks.rows, columns=blocks.columns)
    k, n, rank = spec.k, spec.n, spec.rank
    per_core = pl.cdiv(pl.cdiv(n, blocks.columns), blocks.cores)

    def column_of(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, blocks.columns), lambda c, i, s, layer: (0, c * per_core + i))

    def whole(a: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(a.shape, lambda c, i, s, layer: (0, 0))

    operands: list[Any] = [w]
    in_specs = [
        pl.BlockSpec(
            (None, blocks.rows, blocks.columns),
            lambda c, i, s, layer: (layer[0], s, c * per_core + i),
        )
    ]
    for per_row in (channel_scale, importance if weighed else None):
        if per_row is not None:
            operands.append(_by_lanes(per_row, k))
            in_specs.append(whole(operands[-1]))
    if low_rank is not None:
        down, up = (factor.astype(jnp.float32) for factor in low_rank)
        operands += [jnp.pad(down, ((0, k - spec.d_in), (0, 0))), up]
        in_specs.append(pl.BlockSpec((blocks.rows, rank), lambda c, i, s, layer: (s, 0)))
        in_specs.append(column_of(rank))
    of_columns = None
    if not spec.finds_columns:
        of_columns = column_scales(w, channel_scale, low_rank, layer, problem=problem)
    if of_columns is not None:
        operands.append(of_columns)
        in_specs.append(column_of(1))
    outs = [(k * width // 8, "uint8") for width in PLANES[spec.bits]]
    outs += [(k // spec.group_size, t) for t in (spec.scale_dtype, spec.zero_dtype) if t]
    outs += [(1, "float32")] * spec.finds_columns
    return Call(
        spec=spec, cores=blocks.cores, operands=operands, in_specs=in_specs, of_columns=of_columns,
        out_specs=[column_of(rows) for rows, _ in outs],
        out_shape=[jax.ShapeDtypeStruct((rows, n), dtype) for rows, dtype in outs],
    )  # fmt: skip


def unflatten(outs: list[jax.Array], call: Call) -> Packed:
    """Planes, scales, zero points from a call's outputs."""
    planes = tuple(outs[: len(PLANES[call.spec.bits])])
    scales, *zeros = outs[len(planes) :]
    of_columns = zeros.pop() if call.spec.finds_columns else call.of_columns
    return planes, with_columns(scales, of_columns, call.spec), zeros[0] if zeros else None


def is_first() -> Any:
    """Whether this is a core's first step."""
    return (pl.program_id(1) == 0) & (pl.program_id(2) == 0)


def compiler_params(**more: Any) -> pltpu.CompilerParams:
    """Cores work on columns of their own; nearly all of the fast memory may be used."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=memory.limit(memory.chip_info()),
        **more,
    )


def quantize_pack(
    w: jax.Array,
    channel_scale: jax.Array | None,
    importance: jax.Array | None,
    low_rank: LowRank | None,
    layer: jax.Array,
    *,
    problem: Problem,
    tiles: Blocks | None = None,
    interpret: Any = False,
) -> Packed:
    """Rounds ``D (W - A B)`` to the nearest codes of each group's grid, and packs them.

    Args:
      w: ``[L, d_in, n]``, bfloat16 or float32.
      channel_scale: D, ``[d_in]``, or None.
      importance: ``[d_in]``, weighs a row's squared error in the search over shrinks, or None.
      low_rank: ``(A[d_in, r], B[r, n])`` or None.
      layer: int32[], which weight of the stack.
      problem: what to do; `refusal` tells what is served.
      tiles: block sizes; None for `default_blocks`.
      interpret: False, or `pltpu.InterpretParams`.

    Returns:
      ``(planes, scales, zeros)`` as `reference.quantize_pack` returns them.
    """
    blocks = tiles or default_blocks(problem)
    assert blocks is not None, "refused before"
    call = prepare(w, channel_scale, importance, low_rank, layer, blocks, problem)

    def kernel(layer_ref: Any, *refs: Any) -> None:
        at = len(call.operands)
        zero = jnp.minimum(layer_ref[0], 0)
        rounder = call.rounder(zero, list(refs[:at]), list(refs[at:]), None)
        pl.when(is_first())(rounder.prepare)
        if call.spec.steps == 1:
            emit(rounder.pieces() + rounder.pack(), [])
            return
        emit(rounder.pieces(), [])
        pl.when(pl.program_id(2) == call.spec.steps - 1)(lambda: emit(rounder.pack(), []))

    outs = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=call.grid, in_specs=call.in_specs,
            out_specs=call.out_specs, scratch_shapes=call.spec.scratch(),
        ),
        out_shape=call.out_shape, compiler_params=compiler_params(), interpret=interpret,
        name="quantize_pack",
    )(layer.reshape(1).astype(jnp.int32), *call.operands)  # fmt: skip
    return unflatten(list(outs), call)

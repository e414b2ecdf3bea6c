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

from pallas_kernels import grid
from pallas_kernels.layout import PLANES
from pallas_kernels.tpu import memory
from pallas_kernels.tpu.rounding import LANES, Rounder, Rounding
from pallas_kernels.tpu.schedule import emit

Packed = tuple[tuple[jax.Array, ...], jax.Array, jax.Array | None]
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


def shapes(
    k: int, n: int, *, group_size: int, bits: int = 8, zero_point: str = "float",
    store_dtype: Any = jnp.float32, shrinks: int = 1, rank: int = 0, scaled: bool = True,
) -> Iterator[Rounding]:  # fmt: skip
    """Blocks in the order in which they are preferred: wide ones of many rows first.

    Args:
      k: rows of the codes.
      n: columns.
      group_size: rows that share a scale.
      bits: width of a code.
      zero_point: one of `grid.ZERO_POINTS`.
      store_dtype: of scales and float zero points.
      shrinks: how many factors on a group's range there are.
      rank: of the low-rank part.
      scaled: there is a channel scale.

    Yields:
      What is rounded, in such blocks.
    """
    for columns in (2 * LANES, LANES) if n > LANES else (LANES,):
        for most in (_ROWS, _ROWS // 2, _ROWS // 4, 1):
            yield Rounding(
                d_in=k, k=k, bits=bits, group_size=group_size, zero_point=zero_point,
                store_dtype=jnp.dtype(store_dtype), shrinks=(1.0,) * shrinks, scaled=scaled,
                weighed=shrinks > 1, rank=rank, rows=block_rows(k, group_size, most),
                columns=columns,
            )  # fmt: skip


def default_blocks(
    k: int, n: int, *, group_size: int, w_itemsize: int = 2, chip: str | None = None, **kind: Any
) -> Blocks | None:
    """The heuristic: all rows up to 4096, 256 columns, or less where the fast memory is small.

    Args:
      k: rows of the codes.
      n: columns.
      group_size: rows that share a scale.
      w_itemsize: bytes of a number of the weight.
      chip: short name; None is the one that is compiled for.
      **kind: see `shapes`.

    Returns:
      Sizes, None if none fit.
    """
    info = memory.chip_info(chip)
    spec = memory.first_fitting(
        ((s, memory.needed(s, w_itemsize=w_itemsize))
         for s in shapes(k, n, group_size=group_size, **kind)), info,
    )  # fmt: skip
    if spec is None:
        return None
    cores = block_cores(n, spec.columns, info.num_cores)
    return Blocks(rows=spec.rows, columns=spec.columns, cores=cores)


def unservable(
    *, k: int, n: int, group_size: int, dtypes: tuple[Any, ...], rank: int
) -> str | None:
    """What `quantize_pack` and `prefill_quantize` refuse alike.

    Args:
      k: rows of the codes.
      n: columns.
      group_size: rows that share a scale.
      dtypes: of what is read and written.
      rank: of the low-rank part.

    Returns:
      The reason; None if there is none.
    """
    del k
    if group_size % 32:
        return f"group_size {group_size} is not a multiple of 32, the rows of a register of bytes"
    if n < LANES:
        return f"{n} columns are fewer than the {LANES} lanes of a register"
    for dtype in dtypes:
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
            return (
                f"{jnp.dtype(dtype).name} is no type of the vector unit; bfloat16 and float32 are"
            )
    if rank > 1024:
        return f"a low-rank part of rank {rank} exceeds 1024"
    return None


def refusal(
    *, k: int, n: int, group_size: int, dtype: Any, store_dtype: Any = jnp.float32, rank: int = 0,
    chip: str | None = None, d_in: int = 0, **kind: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot serve; None if it can.

    Args:
      k: rows of the codes.
      n: columns.
      group_size: rows that share a scale.
      dtype: of the weight.
      store_dtype: of scales and float zero points.
      rank: of the low-rank part, 0 for none.
      chip: short name; None is the one that is compiled for.
      d_in: rows of the weight; does not matter.
      **kind: see `shapes`.

    Returns:
      The reason.
    """
    del d_in
    why = unservable(k=k, n=n, group_size=group_size, dtypes=(dtype, store_dtype), rank=rank)
    if why is not None:
        return why
    blocks = default_blocks(
        k, n, group_size=group_size, store_dtype=store_dtype, rank=rank, chip=chip,
        w_itemsize=jnp.dtype(dtype).itemsize, **kind,
    )  # fmt: skip
    return None if blocks else too_large(k, chip)


def too_large(k: int, chip: str | None) -> str:
    """The reason where no blocks fit."""
    size = memory.limit(memory.chip_info(chip)) >> 20
    return f"columns of {k} rows do not fit into {size} MiB of fast memory with what they need"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A `pallas_call` in the making: everything that concerns the rounding.

    Attributes:
      spec: what to round.
      n: columns.
      cores: see `Blocks`.
      operands: weight, and what is given beside it.
      in_specs: of the operands.
      out_specs: planes, scales, zero points.
      out_shape: likewise.
    """

    spec: Rounding
    n: int
    cores: int
    operands: list[Any]
    in_specs: list[Any]
    out_specs: list[Any]
    out_shape: list[Any]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cores, columns of blocks of a core, blocks of a column."""
        return self.cores, pl.cdiv(pl.cdiv(self.n, self.spec.columns), self.cores), self.spec.steps

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
        planes = tuple(outs[: len(PLANES[s.bits])])
        scales, *zeros = outs[len(planes) : len(self.out_shape)]
        return Rounder(
            spec=s, zero=zero, step=0 if s.steps == 1 else pl.program_id(2), w=w,
            channel_scale=scale, importance=importance, down=down, up=up, planes=planes,
            scales=scales, zeros=zeros[0] if zeros else None, rounded=rounded,
            scratch=tuple(outs[len(self.out_shape) :]),
        )  # fmt: skip


def _by_lanes(per_row: jax.Array, k: int) -> jax.Array:
    """``[ceil(k / 128), 128]`` of what is given per row."""
    total = pl.cdiv(k, LANES) * LANES
    return jnp.pad(per_row.astype(jnp.float32), (0, total - per_row.size)).reshape(-1, LANES)


def prepare(
    w: jax.Array, channel_scale: Any, importance: Any, down: Any, up: Any, blocks: Blocks,
    **kind: Any,
) -> Call:  # fmt: skip
    """Lays out operands and outputs.

    Args:
      w: ``[L, d_in, n]``.
      channel_scale: ``[d_in]`` or None.
      importance: ``[d_in]`` or None.
      down: ``[d_in, r]`` or None.
      up: ``[r, n]`` or None.
      blocks: sizes.
      **kind: fields of `Rounding` that are not shapes.

    Returns:
      The call.
    """
    _, d_in, n = w.shape
    g, bits, store = kind["group_size"], kind["bits"], kind["store_dtype"]
    k = pl.cdiv(d_in, g) * g
    rank = 0 if down is None else down.shape[1]
    searched = len(kind["shrinks"]) > 1
    spec = Rounding(
        d_in=d_in, k=k, scaled=channel_scale is not None,
        weighed=searched and importance is not None, rank=rank, rows=blocks.rows,
        columns=blocks.columns, **kind,
    )  # fmt: skip
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
    for wanted, per_row in ((spec.scaled, channel_scale), (spec.weighed, importance)):
        if wanted:
            operands.append(_by_lanes(per_row, k))
            in_specs.append(whole(operands[-1]))
    if rank:
        down = jnp.pad(down.astype(jnp.float32), ((0, k - d_in), (0, 0)))
        operands += [down, up.astype(jnp.float32)]
        in_specs.append(pl.BlockSpec((blocks.rows, rank), lambda c, i, s, layer: (s, 0)))
        in_specs.append(column_of(rank))
    heights = [k * width // 8 for width in PLANES[bits]]
    outs = [(rows, jnp.uint8) for rows in heights] + [(k // g, store)]
    if spec.zero_point != "none":
        outs.append((k // g, jnp.uint8 if spec.zero_point == "integer" else store))
    return Call(
        spec=spec, n=n, cores=blocks.cores, operands=operands, in_specs=in_specs,
        out_specs=[column_of(rows) for rows, _ in outs],
        out_shape=[jax.ShapeDtypeStruct((rows, n), dtype) for rows, dtype in outs],
    )  # fmt: skip


def unflatten(outs: list[jax.Array], bits: int) -> Packed:
    """Planes, scales, zero points from a call's outputs."""
    planes = tuple(outs[: len(PLANES[bits])])
    scales, *zeros = outs[len(planes) :]
    return planes, scales, zeros[0] if zeros else None


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
    down: jax.Array | None,
    up: jax.Array | None,
    layer: jax.Array,
    *,
    bits: int,
    group_size: int,
    zero_point: str,
    store_dtype: jax.typing.DTypeLike,
    shrinks: tuple[float, ...] = (1.0,),
    tiles: Blocks | None = None,
    interpret: Any = False,
) -> Packed:
    """Rounds ``D (W - A B)`` to the nearest codes of each group's grid, and packs them.

    Args:
      w: ``[L, d_in, n]``, bfloat16 or float32.
      channel_scale: D, ``[d_in]``, or None.
      importance: ``[d_in]``, weighs a row's squared error in the search over ``shrinks``, or None.
      down: A, ``[d_in, r]``, or None.
      up: B, ``[r, n]``, or None.
      layer: int32[], which weight of the stack.
      bits: width of a code: 2, 3, 4, 5 or 8.
      group_size: rows that share a scale, a multiple of 32.
      zero_point: one of `grid.ZERO_POINTS`.
      store_dtype: of scales and float zero points.
      shrinks: factors on a group's range to choose from.
      tiles: block sizes; None for `default_blocks`.
      interpret: False, or `pltpu.InterpretParams`.

    Returns:
      ``(planes, scales, zeros)`` as `reference.quantize_pack` returns them.
    """
    assert zero_point in grid.ZERO_POINTS
    k = pl.cdiv(w.shape[1], group_size) * group_size
    blocks = tiles or default_blocks(
        k, w.shape[2], group_size=group_size, w_itemsize=w.dtype.itemsize, bits=bits,
        zero_point=zero_point, store_dtype=store_dtype, shrinks=len(shrinks),
        rank=0 if down is None else down.shape[1], scaled=channel_scale is not None,
    )  # fmt: skip
    assert blocks is not None, "refused before"
    call = prepare(
        w, channel_scale, importance, down, up, blocks, bits=bits, group_size=group_size,
        zero_point=zero_point, store_dtype=jnp.dtype(store_dtype), shrinks=tuple(shrinks),
    )  # fmt: skip

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
    return unflatten(list(outs), bits)

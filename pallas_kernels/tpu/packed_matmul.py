"""Activations times a packed weight, at the speed of its bits.

The matrix unit of a TPU multiplies bfloat16 by bfloat16 or int8 by int8, so one side must change
for the other. With few rows of x it is x: cut into int8 limbs, so that codes go in as they are.
With more rows it is the codes: as the bfloat16 numbers ``128 + q``, which their bits nearly are.
`pallas_kernels.tpu.unpack` and `pallas_kernels.tpu.activations` have both. Either way

    y[c] = sum_g s[g, c] * (sum_{i in g} x[i] (q[i, c] + t))  -  sum_g X[g] s[g, c] (z[g, c] + t)

with ``X[g]`` the sum of the group's activations and ``t`` the offset of the codes' form. Products
are exact and sums float32 in both terms; the second one is multiplied as three bfloat16 parts of
each factor, which is float32 again.

Groups are multiplied one by one, and their partial sums scaled: fewer operations than scaling the
weight while x has few rows. The whole column of a weight is one block, so that a slab of the
layout (any group of it) is a run of consecutive vector registers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grid import Scales, opened, taken_apart
from pallas_kernels.layout import PLANES
from pallas_kernels.problem import Problem
from pallas_kernels.tpu.activations import (
    LANES,
    exact_dot,
    join_limbs,
    write_bfloat16,
    write_limbs,
    write_sums,
)
from pallas_kernels.tpu.fetch import Planes
from pallas_kernels.tpu.memory import chip_info, limit
from pallas_kernels.tpu.unpack import (
    RUN,
    Load,
    as_bfloat16,
    as_int8,
    merged,
    offset,
    pieces,
    unit_rows,
)

_ROWS = 16
"""Rows of a register of bfloat16 numbers."""

_INTEGER_ROWS = {128: {1: 10, 2: 8, 4: 8}, 256: {1: 16, 2: 8, 4: 5}}
"""By the height of the matrix unit and the folds, the most rows of x that are faster as limbs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """What one step of the grid works on.

    Attributes:
      rows: of x.
      columns: of the weight, all `k` rows of each; a multiple of 128.
      parts: that a block of a plane is fetched in: a single transfer does not use all of the
        memory's bandwidth.
      cores: cores of the chip, among which the columns are divided.
      integer: multiply int8 numbers, see the module's docstring.
      folds: groups that are multiplied at once, see `activations.fold`.
      width: columns whose sums are in registers at a time; divides `columns`.
    """

    rows: int
    columns: int
    parts: int
    cores: int
    integer: bool = False
    folds: int = 1
    width: int = 1024


def default_blocks(problem: Problem) -> Blocks:
    """The heuristic.

    Columns are as many, up to 1024, as leave each core two steps (the transfer of the first block
    is not hidden) and fit twice into a third of the fast memory, and beside x; preferably they
    divide n. Rows of x are at most 64, fewer (and groups not folded) where k is so long that 128
    columns would not fit beside them. Sums of wide int8 products and of narrow bfloat16 ones stay
    in registers.

    Args:
      problem: what is asked for.

    Returns:
      Sizes for the chip that is compiled for.
    """
    info = chip_info()
    m, k, n = problem.m, problem.k, problem.n
    bits, group_size = problem.bits, problem.group_size
    bytes_per_column = k * bits // 8 + 8 * (k // group_size)

    def left(rows: int, folds: int) -> int:
        """Bytes beside x, which is there twice as it comes, once arranged, and spilled twice."""
        x = (2 + 3 * folds) * rows * k * jnp.dtype(jnp.bfloat16).itemsize
        return info.vmem_capacity_bytes * 7 // 8 - x

    # Rows fill the registers of a bfloat16 array; those beyond m are dropped at the end.
    rows, least = min(pl.cdiv(m, _ROWS) * _ROWS, 64), 2 * LANES * bytes_per_column
    while rows > _ROWS and left(rows, 1) < least:
        rows -= _ROWS
    folds = LANES // group_size if LANES % group_size == 0 and rows == _ROWS else 1
    if left(rows, folds) < least:
        folds = 1
    block = min(info.vmem_capacity_bytes // 6, left(rows, folds) // 2)
    most = min(1024, block // bytes_per_column, n // (2 * info.num_cores))
    columns = max(LANES, most // LANES * LANES)
    columns = next((c for c in range(columns, columns // 4, -LANES) if n % c == 0), columns)
    cores = info.num_cores if pl.cdiv(n, columns) % info.num_cores == 0 else 1
    shortest = unit_rows(k, bits)
    parts = next(p for p in (8, 6, 4, 3, 2, 1) if shortest % (p * RUN) == 0)
    integer = (
        m <= _INTEGER_ROWS[min(info.mxu_column_size, 256)][folds]
        and info.int8_ops_per_second > info.bf16_ops_per_second
    )
    width = math.gcd(columns, 512 if integer else 256)
    return Blocks(
        rows=rows, columns=columns, parts=parts, cores=cores, integer=integer, folds=folds,
        width=width,
    )  # fmt: skip


def _arranged(bits: int, blocks: Blocks) -> bool:
    """Whether x is multiplied otherwise than as it comes: cut into limbs, folded or permuted."""
    return blocks.integer or blocks.folds > 1 or bits != 8


def refusal(problem: Problem, chip: str | None = None) -> str | None:
    """Why this kernel cannot serve; None if it can.

    Args:
      problem: what it is asked for.
      chip: short name; does not matter.

    Returns:
      The reason.
    """
    del chip
    p, unit = problem, unit_rows(problem.k, problem.bits)
    if p.store_dtype == "float16":
        return "scales or zero points are float16, no type of the vector unit; bfloat16 is"
    if p.dtype != "bfloat16":
        return f"x is {p.dtype}; the matrix unit multiplies bfloat16"
    if unit % RUN:
        return (
            f"{p.k} rows of {p.bits}-bit codes are slabs of {unit} rows; "
            f"vector registers hold multiples of {RUN}"
        )
    if p.group_size % RUN and p.group_size != p.k:
        return f"group_size {p.group_size} is not a multiple of {RUN}"
    return None


def _kernel(
    layer_ref: Any, x_ref: Any, *refs: Any, problem: Problem, blocks: Blocks, fetch: Planes | None,
    m: int,
) -> None:  # fmt: skip
    """One block of columns of y."""
    bits, group_size, left = problem.bits, problem.group_size, list(refs)
    planes = [left.pop(0) for _ in PLANES[bits]]
    scales_ref, zeros_ref = left.pop(0), left.pop(0) if problem.zero_dtype else None
    columns_ref = left.pop(0) if problem.coded else None
    y_ref, sums_ref, rows_ref, *fetched = left
    left_ref = fetched.pop(0) if _arranged(bits, blocks) else x_ref
    k = x_ref.shape[1]
    arrive = _fetch_ahead(fetch, planes, fetched, layer_ref[0]) if fetch else None
    integer, folds, unit = blocks.integer, blocks.folds, problem.zero_unit

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        write_sums(x_ref, sums_ref, group_size, m)
        if integer:
            write_limbs(x_ref, left_ref, m, group_size, folds)
        elif left_ref is not x_ref:
            write_bfloat16(x_ref, left_ref, group_size, folds, permuted=bits != 8)

    # A float32 row is broadcast while it is loaded, for nothing, though libtpu 0.0.42 keeps 4 KB of
    # fast memory for each.
    rows_ref[...] = opened(scales_ref[...], None, problem.scales)[0]
    if arrive is not None:
        planes = arrive()
    for start in range(0, blocks.columns, blocks.width):
        lanes = slice(start, start + blocks.width)
        load = functools.partial(_load, planes, unit_rows(k, bits), lanes)
        total = _scaled_sum(left_ref, load, rows_ref, lanes, bits, group_size, blocks)
        if integer:
            total = join_limbs(x_ref, total, m)
        kept = None if zeros_ref is None else zeros_ref[:, lanes]
        zeros: Any = opened(scales_ref[:, lanes], kept, problem.scales)[1]
        # In what zero points count in: exact, as that is a power of two.
        if zeros is None:
            zeros = 2.0 ** (bits - 1) / unit
        zeros = rows_ref[:, lanes] * (zeros + offset(bits, integer=integer) / unit)
        rest = exact_dot(sums_ref[:, : zeros.shape[0]], zeros, m) * unit
        rows = min(total.shape[0], rest.shape[0])
        total = total[:rows] + rest[:rows]
        if columns_ref is not None:
            total = total * _row(columns_ref, layer_ref[0], lanes)
        y_ref[:rows, lanes] = total.astype(y_ref.dtype)


def _load(
    planes: Any, shortest: int, lanes: slice, plane: int, row: int, carrier: int, size: int
) -> jax.Array:
    """Words of a plane, see `unpack.Load`."""
    start = row * shortest + carrier
    return pltpu.bitcast(planes[plane][start : start + size, lanes], jnp.int32)


def _scaled_sum(
    left_ref: Any, load: Load, rows_ref: Any, lanes: slice, bits: int, group_size: int,
    blocks: Blocks,
) -> jax.Array:  # fmt: skip
    """``sum_g s[g] * (left_g codes_g)`` of some columns."""
    integer, folds = blocks.integer, blocks.folds
    height = left_ref.shape[0] // folds
    words = functools.cache(functools.partial(merged, functools.cache(load)))
    total = jnp.zeros((height, lanes.stop - lanes.start), jnp.float32)
    for piece in pieces(left_ref.shape[1], bits, folds * group_size):
        found = words(piece.unit, piece.carrier, piece.size, bits)
        product = jnp.dot(
            left_ref[:, piece.row : piece.row + piece.size],
            as_int8(*found) if integer else as_bfloat16(*found),
            precision=lax.Precision.DEFAULT,
            preferred_element_type=jnp.int32 if integer else jnp.float32,
        )
        for group in range(piece.row // group_size, pl.cdiv(piece.row + piece.size, group_size)):
            at = group % folds * height
            part = product[at : at + height].astype(jnp.float32)
            total = total + part * rows_ref[group : group + 1, lanes]
    return total


def _fetch_ahead(fetch: Planes, planes: Any, fetched: Any, layer: Any) -> Callable[[], list[Any]]:
    """Starts copying the next block (and a core's first one); gives what waits for this one."""
    core, i, j = (pl.program_id(axis) for axis in range(3))
    tall, wide = pl.num_programs(1), pl.num_programs(2)
    slot = (i * wide + j) % 2

    @pl.when((i == 0) & (j == 0))
    def _() -> None:
        fetch.start(planes, fetched, layer, core * wide, 0)

    @pl.when((i + 1 < tall) | (j + 1 < wide))
    def _() -> None:
        following = jnp.where(j + 1 < wide, j + 1, 0)
        fetch.start(planes, fetched, layer, core * wide + following, 1 - slot)

    def arrive() -> list[Any]:
        fetch.wait(planes, fetched, layer, slot)
        return [buffer.at[slot] for buffer in fetched[: len(planes)]]

    return arrive


def _rows_of_layers(layers: int, columns: int, steps: int) -> pl.BlockSpec:
    """A block of several layers' rows, `_row` finds one: a single row does not make a block.

    XLA would take longer to cut the row out than the kernel to read them all.
    """
    rows = min(layers, _ROWS)
    return pl.BlockSpec(
        (rows, columns), lambda core, i, j, layer: (layer[0] // rows, core * steps + j)
    )


def _row(rows_ref: Any, layer: Any, lanes: slice) -> jax.Array:
    """The layer's row of a block of layers, ``float32[1, lanes]``."""
    rows = rows_ref[:, lanes].astype(jnp.float32)
    mine = lax.broadcasted_iota(jnp.int32, (rows.shape[0], 1), 0) == lax.rem(layer, rows.shape[0])
    return jnp.sum(jnp.where(mine, rows, 0.0), axis=0, keepdims=True)


def packed_matmul(
    x: jax.Array,
    planes: Sequence[jax.Array],
    scales: Scales,
    zeros: jax.Array | None,
    layer: jax.Array,
    *,
    problem: Problem,
    tiles: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """``y = x @ (s (q - z))`` for one layer of a stack.

    Args:
      x: ``bfloat16[m, k]``, finite.
      planes: ``uint8[L, k * width // 8, n]`` for each width in ``PLANES[bits]``.
      scales: ``[L, k // group_size, n]``, or coded.
      zeros: as ``scales``, or uint8, or None.
      layer: ``int32[]``.
      problem: what to do; `refusal` tells what is served.
      tiles: block sizes; None for `default_blocks`.
      interpret: run by the TPU interpreter.

    Returns:
      ``y[m, n]`` in ``problem.y_dtype``.
    """
    m, k, n, group_size = problem.m, problem.k, problem.n, problem.group_size
    sizes = tiles or default_blocks(problem)
    columns = sizes.columns
    steps = pl.cdiv(n, columns * sizes.cores)

    def block_of(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (pl.squeezed, rows, columns), lambda core, i, j, layer: (layer[0], 0, core * steps + j)
        )

    operands = [x, *planes]
    specs = [pl.BlockSpec((sizes.rows, k), lambda core, i, j, layer: (i, 0))]
    heights = tuple(plane.shape[1] for plane in planes)
    # The last one of blocks that do not divide the columns is cut by Pallas' own pipeline.
    fetch = None
    if n % columns == 0:
        fetch = Planes(heights=heights, columns=columns, parts=sizes.parts)
    specs += [block_of(rows) if fetch is None else pl.BlockSpec(memory_space=pl.ANY)
              for rows in heights]  # fmt: skip
    codes, of_columns = taken_apart(scales)
    small = [a for a in (codes, zeros) if a is not None]
    operands += small
    specs += [block_of(k // group_size)] * len(small)
    if of_columns is not None:
        operands.append(of_columns)
        specs.append(_rows_of_layers(of_columns.shape[0], columns, steps))
    placed = m if sizes.integer else sizes.rows
    sums = pl.cdiv(k // group_size, LANES) * LANES
    triple = pl.cdiv(3 * placed, 8) * 8
    kernel = functools.partial(_kernel, problem=problem, blocks=sizes, fetch=fetch, m=placed)
    left = pltpu.VMEM((sizes.folds * sizes.rows, k), jnp.bfloat16)
    if sizes.integer:
        left = pltpu.VMEM((sizes.folds * triple, k), jnp.int8)
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
                pltpu.VMEM((triple, sums), jnp.bfloat16),
                pltpu.VMEM((k // group_size, columns), jnp.float32),
                *([left] if _arranged(problem.bits, sizes) else []),
                *(fetch.scratch() if fetch else []),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((m, n), problem.y_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=limit(chip_info()),
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="packed_matmul",
    )(layer.reshape(1), *operands)

"""``y = x Q`` from packed codes for Hopper, Mosaic GPU: weights are WGMMA's register operand.

The product is computed as ``yᵀ = Qᵀ xᵀ``: a warpgroup reads a block of carriers from shared memory
into the registers that WGMMA takes its first operand from, 64 output channels by as many rows as a
step is deep, masks a field and converts it; x stays in shared memory, where WGMMA reads it itself.
Few rows of x then cost little: they are WGMMA's short side (a multiple of 8), not its 64.

Codes become numbers as in `unpack`: a constant above them makes 128 + q (1024 + q in float16),
and the zero point takes the constant. Planes of 3 and 5 bits would have to be joined first, in more
registers than are left: they are refused. Carriers lie with output channels minor, so that each
thread loads its bytes one by one; a byte is four codes, two, or one.

Copies run ahead of the products by `Tiles.stages` steps. Nobody measured this kernel: it serves
where it is asked for by name, see `tiles.MOSAIC_ROWS`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import unpack
from pallas_kernels.gpu.limits import check_addressable
from pallas_kernels.gpu.packed_matmul import granule, unservable
from pallas_kernels.grid import Scales, opened, taken_apart
from pallas_kernels.layout import PLANES
from pallas_kernels.problem import Problem

_COLUMNS = 128
# The index that jax 0.10's load wants beside the reference; later ones want none.
_WHOLE: tuple[Any, ...] = ((),) if jax.version.__version_info__ < (0, 11) else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Block sizes of one call.

    Attributes:
      rows: of x per program: 32 or 64.
      depth: carrier rows per step: 32 or 64, divides the group and the slab.
      splits: programs that share a block of columns; their sums are added by XLA.
      stages: steps whose copies are in flight.
    """

    rows: int
    depth: int
    splits: int
    stages: int = 4


def blocks(problem: Problem) -> Tiles:
    """The default block sizes; a guess, derived like `packed_matmul.blocks`.

    Args:
      problem: What is asked for.

    Returns:
      What `packed_matmul` uses if it is given none.
    """
    m, k, bits = problem.m, problem.k, problem.bits
    rows = 64 if m > 32 else 32
    depth = min(64, granule(problem))
    steps = k // unpack.slabs(bits) // depth
    programs = problem.n // _COLUMNS * pl.cdiv(m, rows)
    splits = max(1, min(pl.cdiv(4 * 132, programs), steps, k * bits // (128 * m)))
    return Tiles(rows=rows, depth=depth, splits=max(s for s in _divisors(steps) if s <= splits))


def _divisors(steps: int) -> list[int]:
    return [i for i in range(1, steps + 1) if steps % i == 0]


def refusal(problem: Problem, chip: str | None) -> str | None:
    """Why this kernel cannot serve a problem.

    Args:
      problem: The problem.
      chip: Short name of the GPU, None if unknown.

    Returns:
      The reason, None if it can.
    """
    p = problem
    if chip != "h100":
        return f"it is written for Hopper's WGMMA, this is {chip or 'a GPU of unknown kind'}"
    if len(PLANES[p.bits]) > 1:
        return f"{p.bits}-bit codes are two bit planes, and it has no registers left to join them"
    if p.dtype not in {"bfloat16", "float16"}:
        return f"WGMMA multiplies bfloat16 or float16, x is {p.dtype}"
    if p.n % _COLUMNS:
        return f"it computes {_COLUMNS} columns at a time, {p.n} are no multiple of that"
    return unservable(p, least=32)


def _swizzled(columns: int, bits: int) -> tuple[Any, ...]:
    """How WGMMA wants a block in shared memory whose rows are that long."""
    swizzle = plgpu.find_swizzle(columns * bits)
    return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)


def _load(ref: Any, layout: Any, interpret: bool) -> jax.Array:
    """A block in registers."""
    if interpret:
        return ref[...]
    return plgpu.load(ref, *_WHOLE, layout=layout, optimized=False)


def _load_transposed(ref: Any, interpret: bool) -> jax.Array:
    """Carriers with output channels first, spread over threads like WGMMA's first operand."""
    if interpret:
        return ref[...].T
    # The layout of WGMMA's operand but for one element at a time: neighbours lie in other rows.
    one_by_one = plgpu.Layout._WGMMA_ACC_32BIT
    return _load(ref.transpose((1, 0)), one_by_one, interpret)


def _across(vector: jax.Array, axis: int, shape: tuple[int, int]) -> jax.Array:
    return jax.lax.broadcast_in_dim(vector, shape, [axis])


def _kernel(*refs: Any, problem: Problem, tiles: Tiles, interpret: bool) -> None:
    """One block of columns, one block of rows, one run of steps."""
    layer_gmem, *inputs, out_gmem, out_smem = refs
    column, row, split = (jax.lax.axis_index(name) for name in ("columns", "rows", "splits"))
    columns = pl.ds(column * _COLUMNS, _COLUMNS)
    rows = pl.ds(row * tiles.rows, tiles.rows)
    each = problem.k // unpack.slabs(problem.bits) // tiles.depth // tiles.splits
    at = layer_gmem[0], rows, columns
    specs, operands = _blocks_of(*inputs, at=at, first=split * each, problem=problem, tiles=tiles)
    start = jnp.zeros((_COLUMNS, tiles.rows), jnp.float32)
    if not interpret:
        start = plgpu.layout_cast(start, plgpu.Layout.WGMMA)
    out_smem[...] = plgpu.emit_pipeline(
        lambda _, *blocks: _step(*blocks, problem=problem, interpret=interpret), grid=(each,),
        in_specs=specs, max_concurrent_steps=min(tiles.stages, each), init_carry=start,
    )(*operands)  # fmt: skip
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[split, columns, rows])
    plgpu.wait_smem_to_gmem(0)


def _blocks_of(
    x: Any, plane: Any, scales: Any, sums: Any, *zeros: Any, at: Any, first: Any,
    problem: Problem, tiles: Tiles,
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """What each step copies: the carriers, then per slab x, scales, sums of x and zero points."""
    layer, rows, columns = at
    slabs, depth = unpack.slabs(problem.bits), tiles.depth
    specs = [plgpu.BlockSpec((depth, _COLUMNS), lambda t: (first + t, 0))]
    operands = [plane.at[layer, :, columns]]

    def add(shape: tuple[int, int], of_run: Any, ref: Any, transforms: Any = ()) -> None:
        for f in range(slabs):
            # Runs of `depth` rows, counted over all slabs.
            before = f * (problem.k // slabs // depth) + first
            index = functools.partial(lambda before, t: of_run(before + t), before)
            specs.append(plgpu.BlockSpec(shape, index, transforms=transforms))
            operands.append(ref)

    def by_group(run: Any) -> Any:
        return run * depth // problem.group_size, 0

    add((tiles.rows, depth), lambda run: (0, run), x.at[rows, :], _swizzled(depth, 16))
    add((1, _COLUMNS), by_group, scales.at[layer, :, columns])
    add((1, tiles.rows), lambda run: (run, 0), sums.at[:, rows])
    for ref in zeros:
        add((1, _COLUMNS), by_group, ref.at[layer, :, columns])
    return specs, operands


def _step(plane_smem: Any, *blocks: Any, problem: Problem, interpret: bool) -> jax.Array:
    """Adds what one step's carriers contribute; the last of the blocks is the sum so far."""
    *others, acc = blocks
    bits = problem.bits
    carriers = _load_transposed(plane_smem, interpret)
    shape, slabs = acc.shape, unpack.slabs(bits)
    for f in range(slabs):
        x_smem, scale_smem, sums_smem, *zero_smem = others[f::slabs]
        codes = _numbers(carriers, f, bits, x_smem.dtype)
        part = _product(codes, x_smem, shape, interpret)
        by_column = plgpu.Layout.WGMMA.reduce(1)
        kept = [_load(smem.at[0], by_column, interpret) for smem in (scale_smem, *zero_smem)]
        scale, z = opened(kept[0], kept[1] if zero_smem else None, problem.scales)
        sums = _load(sums_smem.at[0], plgpu.Layout.WGMMA.reduce(0), interpret)
        offset = _offset(bits, x_smem.dtype)
        if z is not None:
            z = z * problem.zero_unit
            part = part - _across(z + offset, 0, shape) * _across(sums, 1, shape)
        else:
            part = part - _across(sums * (2.0 ** (bits - 1) + offset), 1, shape)
        acc = acc + part * _across(scale, 0, shape)
    return acc


def _numbers(carriers: jax.Array, field: int, bits: int, dtype: Any) -> jax.Array:
    """``q`` plus `_offset`, for the field of each carrier; `unpack` says why these are numbers."""
    if not _offset(bits, dtype):
        return carriers.astype(dtype)
    wide = carriers.astype(jnp.uint16)
    wide = wide >> jnp.uint16(bits * field) if field else wide
    wide = wide if bits == 8 else wide & jnp.uint16(2**bits - 1)
    magic = 0x4300 if dtype == jnp.bfloat16 else 0x6400
    return jax.lax.bitcast_convert_type(wide | jnp.uint16(magic), dtype)


def _offset(bits: int, dtype: Any) -> float:
    """What is added to codes; nothing where they do not fit below bfloat16's exponent."""
    if dtype == jnp.bfloat16:
        return 0.0 if bits == 8 else 128.0
    return 1024.0


def _product(codes: jax.Array, x_smem: Any, shape: tuple[int, int], interpret: bool) -> jax.Array:
    """``codes xᵀ`` in float32."""
    if interpret:
        # The interpreter has no WGMMA of an operand in registers, and none of a transposed one.
        return jnp.dot(codes, x_smem[...].T, preferred_element_type=jnp.float32)
    codes = plgpu.layout_cast(codes, plgpu.Layout.WGMMA)

    def multiply(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, codes, x_smem.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def packed_matmul(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scales: Scales,
    zeros: jax.Array | None,
    layer: jax.Array,
    *,
    problem: Problem,
    tiles: Tiles | None = None,
    interpret: Any = None,
) -> jax.Array:
    """``y = x @ (s (q - z))``, accumulated in float32; arguments as `dispatch` normalises them.

    Args:
      x: ``[m, k]``, bfloat16 or float16.
      planes: One ``uint8[L, k * bits // 8, n]``.
      scales: ``[L, k // group_size, n]``, or coded.
      zeros: As scales, or uint8, or None.
      layer: ``int32[]``, which of the L.
      problem: What to do; `refusal` tells what is served.
      tiles: Block sizes; None is `blocks`.
      interpret: Parameters of Pallas' simulation of a GPU, for tests.

    Returns:
      ``y[m, n]`` in ``problem.y_dtype``.

    Raises:
      ValueError: A stack of planes is between 2 and 4 GiB.
    """
    m, k, n = problem.m, problem.k, problem.n
    check_addressable(planes)
    tiles = tiles or blocks(problem)
    padded = pl.cdiv(m, tiles.rows) * tiles.rows
    x = jnp.pad(x, ((0, padded - m), (0, 0)))
    codes, of_columns = taken_apart(scales)
    operands = [layer.reshape(1), x, *planes, codes]
    runs = x.reshape(padded, k // tiles.depth, tiles.depth)
    operands += [jnp.sum(runs, axis=2, dtype=jnp.float32).T, *([] if zeros is None else [zeros])]
    out = plgpu.kernel(
        functools.partial(_kernel, problem=problem, tiles=tiles, interpret=bool(interpret)),
        out_type=jax.ShapeDtypeStruct((tiles.splits, n, padded), jnp.float32),
        scratch_types=[
            plgpu.SMEM((_COLUMNS, tiles.rows), jnp.float32, transforms=_swizzled(tiles.rows, 32))
        ],
        grid=(n // _COLUMNS, padded // tiles.rows, tiles.splits),
        grid_names=("columns", "rows", "splits"),
        # Layouts are given here; jax 0.12 would infer them, and finds none for this way of loading.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(*operands)  # fmt: skip
    y = jnp.sum(out, axis=0).T[:m]
    if of_columns is not None:
        row = jax.lax.dynamic_index_in_dim(of_columns, layer, keepdims=True)
        y = y * row.astype(jnp.float32)
    return y.astype(problem.y_dtype)

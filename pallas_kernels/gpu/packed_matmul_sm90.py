"""``y = x Q`` from packed codes for Hopper, Mosaic GPU: weights are WGMMA's register operand.

The product is computed as ``yᵀ = Qᵀ xᵀ``: a warpgroup reads a block of carriers from shared memory
into the registers that WGMMA takes its first operand from, 64 output channels by as many rows as a
step is deep, masks a field and converts it; x stays in shared memory, where WGMMA reads it itself.
Few rows of x then cost little: they are WGMMA's short side (a multiple of 8), not its 64.

A field is masked in place, not shifted down: ``w & 0xF0`` is 16 q, exact in bfloat16, and the
group's scale takes the 1/16. Planes of 3 and 5 bits would have to be shifted and joined, which this
backend cannot do on bytes: they are refused. Carriers lie with output channels minor, so that each
thread loads its bytes one by one; a byte is a quarter (2 bits), half or whole of a weight's codes.

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
from pallas_kernels.gpu.packed_matmul import granule
from pallas_kernels.layout import PLANES

_COLUMNS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Block sizes of one call.

    Attributes:
      rows: of x per program: a power of two from 8 to 128.
      depth: carrier rows per step: 32 or 64, divides the group and the slab.
      splits: programs that share a block of columns; their sums are added by XLA.
      stages: steps whose copies are in flight.
    """

    rows: int
    depth: int
    splits: int
    stages: int = 4


def blocks(*, m: int, k: int, n: int, bits: int, group_size: int) -> Tiles:
    """The default block sizes; a guess, derived like `packed_matmul.blocks`.

    Args:
      m: Rows of x.
      k: Input channels.
      n: Output channels.
      bits: Width of a code.
      group_size: Rows that share a scale.

    Returns:
      What `packed_matmul` uses if it is given none.
    """
    rows = min(128, max(8, 1 << (m - 1).bit_length()))
    depth = min(64, granule(k=k, bits=bits, group_size=group_size))
    steps = k // unpack.slabs(bits) // depth
    programs = n // _COLUMNS * pl.cdiv(m, rows)
    splits = max(1, min(pl.cdiv(4 * 132, programs), steps, k * bits // (128 * m)))
    return Tiles(rows=rows, depth=depth, splits=max(s for s in _divisors(steps) if s <= splits))


def _divisors(steps: int) -> list[int]:
    return [i for i in range(1, steps + 1) if steps % i == 0]


def refusal(
    *, m: int, k: int, n: int, bits: int, group_size: int, dtype: Any, chip: str | None
) -> str | None:
    """Why this kernel cannot serve a problem.

    Args:
      m: Rows of x.
      k: Input channels.
      n: Output channels.
      bits: Width of a code.
      group_size: Rows that share a scale.
      dtype: Of x.
      chip: Short name of the GPU, None if unknown.

    Returns:
      The reason, None if it can.
    """
    if chip != "h100":
        return f"it is written for Hopper's WGMMA, this is a {chip or 'GPU of unknown kind'}"
    if len(PLANES[bits]) > 1:
        return f"{bits}-bit codes are two bit planes, which it cannot join in its byte registers"
    if jnp.dtype(dtype) not in {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        return f"WGMMA multiplies bfloat16 or float16, x is {jnp.dtype(dtype).name}"
    if n % _COLUMNS:
        return f"it computes {_COLUMNS} columns at a time, {n} are no multiple of that"
    run = granule(k=k, bits=bits, group_size=group_size)
    if run < 32:
        return (
            f"{k} rows of {bits}-bit codes in groups of {group_size} share a scale and a bit field "
            f"for only {run} rows at a time, it needs 32"
        )
    if m < 1 or n < 1:
        return f"nothing to compute: {m} rows, {n} columns"
    return None


def _swizzled(columns: int, bits: int) -> tuple[Any, ...]:
    """How WGMMA wants a block in shared memory whose rows are that long."""
    swizzle = plgpu.find_swizzle(columns * bits)
    return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)


def _load(ref: Any, layout: Any, interpret: bool) -> jax.Array:
    """A block in registers."""
    if interpret:
        return ref[...]
    return plgpu.load(ref, (), layout=layout, optimized=False)


def _across(vector: jax.Array, axis: int, shape: tuple[int, int]) -> jax.Array:
    return jax.lax.broadcast_in_dim(vector, shape, [axis])


def _kernel(*refs: Any, bits: int, group_size: int, k: int, tiles: Tiles, counts: Any,
            interpret: bool) -> None:  # fmt: skip
    """One block of columns, one block of rows, one run of steps."""
    inputs, _ = refs[: sum(counts)], None
    out_gmem, out_smem, *scratch = refs[sum(counts) :]
    layer_gmem, x_gmem, plane, scales, sums, *rest = inputs
    slabs = unpack.slabs(bits)
    slab, each = k // slabs, k // slabs // tiles.depth // tiles.splits
    column, row, split = (jax.lax.axis_index(name) for name in ("columns", "rows", "splits"))
    layer = layer_gmem[0]
    shape = (_COLUMNS, tiles.rows)
    first = split * each

    def body(_: Any, *args: Any) -> jax.Array:
        *blocks, acc = args
        carriers = _load(
            plgpu.transpose_ref(blocks[0], (1, 0)), plgpu.Layout._WGMMA_ACC_32BIT, interpret
        )
        for f in range(slabs):
            x_smem, scale_smem, sums_smem, *zero_smem = blocks[1 + f :: slabs]
            mask = (2**bits - 1) << (bits * f)
            part = _product(carriers, mask, x_smem, shape, scratch, interpret)
            by_column = plgpu.Layout.WGMMA.reduce(1)
            scale = _load(scale_smem.at[0], by_column, interpret).astype(jnp.float32)
            scale = scale * 2.0 ** (-bits * f)
            sums = _load(sums_smem.at[0], plgpu.Layout.WGMMA.reduce(0), interpret)
            sums = _across(sums * 2.0 ** (bits * f), 1, shape)
            if zero_smem:
                z = _load(zero_smem[0].at[0], by_column, interpret).astype(jnp.float32)
                part = part - _across(z, 0, shape) * sums
            else:
                part = part - 2.0 ** (bits - 1) * sums
            acc = acc + part * _across(scale, 0, shape)
        return acc

    def spec(block: tuple[int, int], index: Any, transforms: Any = ()) -> Any:
        return plgpu.BlockSpec(block, index, transforms=transforms)

    def at_group(f: int) -> Any:
        return lambda t: ((f * slab + (first + t) * tiles.depth) // group_size, 0)

    def at_step(f: int) -> Any:
        return lambda t: (f * slab // tiles.depth + first + t, 0)

    every = range(slabs)
    depth, x_tiling = tiles.depth, _swizzled(tiles.depth, 16)
    specs = [spec((depth, _COLUMNS), lambda t: (first + t, 0))]
    specs += [
        spec((tiles.rows, depth), lambda t, f=f: (0, f * slab // depth + first + t), x_tiling)
        for f in every
    ]
    specs += [spec((1, _COLUMNS), at_group(f)) for f in every]
    columns = pl.ds(column * _COLUMNS, _COLUMNS)
    rows = pl.ds(row * tiles.rows, tiles.rows)
    operands = [plane.at[layer, :, columns]]
    operands += [x_gmem.at[rows, :]] * slabs + [scales.at[layer, :, columns]] * slabs
    specs += [spec((1, tiles.rows), at_step(f)) for f in every]
    operands += [sums.at[:, rows]] * slabs
    for zeros in rest:
        specs += [spec((1, _COLUMNS), at_group(f)) for f in every]
        operands += [zeros.at[layer, :, columns]] * slabs
    start = jnp.zeros(shape, jnp.float32)
    if not interpret:
        start = plgpu.layout_cast(start, plgpu.Layout.WGMMA)
    acc = plgpu.emit_pipeline(
        body, grid=(each,), in_specs=specs, max_concurrent_steps=min(tiles.stages, each),
        init_carry=start,
    )(*operands)  # fmt: skip
    out_smem[...] = acc
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[split, columns, rows])
    plgpu.wait_smem_to_gmem(0)


def _product(
    carriers: jax.Array, mask: int, x_smem: Any, shape: tuple[int, int], scratch: Any,
    interpret: bool,
) -> jax.Array:  # fmt: skip
    """``(carriers & mask) xᵀ`` in float32."""
    codes = carriers if mask == 255 else carriers & jnp.uint8(mask)
    codes: Any = codes.astype(x_smem.dtype)
    if interpret:
        # The interpreter knows this operand in shared memory only.
        scratch[0][...] = codes
        codes = scratch[0]
    else:
        codes = plgpu.layout_cast(codes, plgpu.Layout.WGMMA)

    def multiply(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, codes, plgpu.transpose_ref(x_smem, (1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def packed_matmul(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scales: jax.Array,
    zeros: jax.Array | None,
    layer: jax.Array,
    *,
    bits: int,
    group_size: int,
    tiles: Tiles | None = None,
    interpret: Any = None,
) -> jax.Array:
    """``y = x @ (s (q - z))``, accumulated in float32; arguments as `dispatch` normalises them.

    Args:
      x: ``[m, k]``, bfloat16 or float16.
      planes: One ``uint8[L, k * bits // 8, n]``.
      scales: ``[L, k // group_size, n]``.
      zeros: As scales, or uint8, or None.
      layer: ``int32[]``, which of the L.
      bits: Width of a code: 2, 4 or 8.
      group_size: Rows that share a scale.
      tiles: Block sizes; None is `blocks`.
      interpret: Parameters of Pallas' simulation of a GPU, for tests.

    Returns:
      ``y[m, n]`` in x's dtype.

    Raises:
      ValueError: A stack of planes is between 2 and 4 GiB.
    """
    (m, k), n = x.shape, scales.shape[-1]
    check_addressable(planes)
    tiles = tiles or blocks(m=m, k=k, n=n, bits=bits, group_size=group_size)
    padded = pl.cdiv(m, tiles.rows) * tiles.rows
    x = jnp.pad(x, ((0, padded - m), (0, 0)))
    operands = [layer.reshape(1), x, *planes, scales]
    runs = x.reshape(padded, k // tiles.depth, tiles.depth)
    operands += [jnp.sum(runs, axis=2, dtype=jnp.float32).T, *([] if zeros is None else [zeros])]
    scratch = [plgpu.SMEM((_COLUMNS, tiles.rows), jnp.float32, transforms=_swizzled(tiles.rows, 32))]
    if interpret:
        scratch.append(plgpu.SMEM((_COLUMNS, tiles.depth), x.dtype))
    out = plgpu.kernel(
        functools.partial(
            _kernel, bits=bits, group_size=group_size, k=k, tiles=tiles, counts=(len(operands),),
            interpret=bool(interpret),
        ),
        out_type=jax.ShapeDtypeStruct((tiles.splits, n, padded), jnp.float32),
        scratch_types=scratch,
        grid=(n // _COLUMNS, padded // tiles.rows, tiles.splits),
        grid_names=("columns", "rows", "splits"),
        compiler_params=plgpu.CompilerParams(),
    )(*operands)  # fmt: skip
    return jnp.sum(out, axis=0).T[:m].astype(x.dtype)

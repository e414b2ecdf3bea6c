"""The prompt's product with a weight, and the weight packed, from one read of the weight.

The rounding hides behind the matmul: the matrix unit works on one part of a block while the vector
unit rounds another (see `pallas_kernels.tpu.rounding`, which says what it takes to make the
compiler see it that way). The activations are copied to fast memory once per core, in chunks, and
the first column of blocks starts on the first chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import quantize_pack as alone
from pallas_kernels.tpu.rounding import LANES, SUBLANES, Matmul, Rounder, emit

_ALIGN = 16
"""Rows of x are padded to whole registers of bfloat16."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks(alone.Blocks):
    """What one step of the grid works on.

    Attributes:
      depth: rows of the weight in one product.
      height: most rows of x in one product.
      resident: x stays in fast memory; else it is read once for each block of columns.
    """

    depth: int = 256
    height: int = 512
    resident: bool = True


def default_blocks(m: int, k: int, n: int, *, group_size: int, itemsize: int) -> Blocks:
    """The heuristic.

    Args:
      m: rows of x.
      k: rows of the codes.
      n: columns.
      group_size: rows that share a scale.
      itemsize: bytes of a number of x.

    Returns:
      Sizes for the chip that is compiled for.
    """
    memory = alone.chip_info().vmem_capacity_bytes
    resident = m * k * itemsize <= memory // 2
    columns = 256 if n > LANES else LANES
    rows = alone.block_rows(k, group_size, max(1024, min(4096, 4096 * 512 // m)))
    return Blocks(
        rows=rows, columns=columns, cores=alone.block_cores(n, columns), resident=resident
    )


def refusal(
    *, m: int, k: int, n: int, group_size: int, dtype: Any, store_dtype: Any = jnp.float32,
    rank: int = 0, **_: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot serve; None if it can.

    Args:
      m: rows of x.
      k: rows of the codes.
      n: columns.
      group_size: rows that share a scale.
      dtype: of the activations.
      store_dtype: of scales and float zero points.
      rank: of the low-rank part, 0 for none.

    Returns:
      The reason.
    """
    if m > 4096:
        return f"{m} rows of activations: the sums of at most 4096 fit into fast memory"
    return alone.unservable(k=k, n=n, group_size=group_size, dtypes=(dtype, store_dtype), rank=rank)


def _held(weight: jax.Array, token: jax.Array) -> jax.Array:
    """The same weight, but not before the token is read.

    The matrix unit is loaded with squares of 128 or 256 rows; holding one register of each does.
    """
    first = SUBLANES * 4 // weight.dtype.itemsize
    parts = []
    for start in range(0, weight.shape[0], LANES):
        head = pltpu.bitcast(weight[start : start + first], jnp.int32) | token
        parts.append(pltpu.bitcast(head, weight.dtype))
        parts.append(weight[start + first : min(start + LANES, weight.shape[0])])
    return jnp.concatenate(parts)


def _matmuls(
    rounder: Rounder, x: Any, weight: Any, sums: Any, y: Any, blocks: Blocks
) -> list[Matmul]:
    """The block's share of y, in products of ``depth`` rows."""
    s = rounder.spec
    m = x.shape[0]
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def product(rows: slice, at: slice, first: bool, last: bool) -> None:
        part = weight[at, :]
        if weight is rounder.w:
            if s.d_in < s.k:
                keep = rounder.present(at.start, at.stop - at.start)[:, :1]
                part = jnp.where(keep, part.astype(jnp.float32), 0.0)
            part = _held(part.astype(x.dtype), rounder.token())
        total = jnp.dot(x[rows, at], part, precision=precision, preferred_element_type=jnp.float32)
        if first and s.steps > 1:
            total += jnp.where(rounder.step == 0, 0.0, sums[rows, :])
        elif not first:
            total += sums[rows, :]
        if last and s.steps == 1:
            y[rows, :] = total.astype(y.dtype)
        else:
            sums[rows, :] = total

    found: list[Matmul] = []
    for start in range(0, s.rows, blocks.depth):
        at = slice(start, min(start + blocks.depth, s.rows))
        for top in range(0, m, blocks.height):
            rows = slice(top, min(top + blocks.height, m))
            ends = start == 0, at.stop == s.rows
            needed = 0 if weight is rounder.w else at.stop
            found.append((needed, functools.partial(product, rows, at, *ends)))
    return found


def prefill_quantize(
    x: jax.Array,
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
    quantized: bool = False,
    tiles: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, alone.Packed]:
    """``x @ w``, and w packed; see `quantize_pack` for the arguments it shares.

    Args:
      x: ``[m, d_in]``, bfloat16 or float32.
      w: ``[L, d_in, n]``, bfloat16 or float32.
      channel_scale: D, ``[d_in]``, or None.
      importance: ``[d_in]`` or None.
      down: A, ``[d_in, r]``, or None.
      up: B, ``[r, n]``, or None.
      layer: int32[], which weight of the stack.
      bits: width of a code: 2, 3, 4, 5 or 8.
      group_size: rows that share a scale, a multiple of 32.
      zero_point: one of `grid.ZERO_POINTS`.
      store_dtype: of scales and float zero points.
      shrinks: factors on a group's range to choose from.
      quantized: multiply ``x / D`` with what the codes stand for, instead of x with w.
      tiles: block sizes; None for `default_blocks`.
      interpret: False, or `pltpu.InterpretParams`.

    Returns:
      ``(y[m, n] in x.dtype, (planes, scales, zeros))``.
    """
    m, d_in = x.shape
    n = w.shape[2]
    k = pl.cdiv(d_in, group_size) * group_size
    padded = pl.cdiv(m, _ALIGN) * _ALIGN
    blocks = tiles or default_blocks(padded, k, n, group_size=group_size, itemsize=x.dtype.itemsize)
    if quantized and channel_scale is not None:
        x = (x.astype(jnp.float32) / channel_scale.astype(jnp.float32)).astype(x.dtype)
    x = jnp.pad(x, ((0, padded - m), (0, k - d_in)))
    call = alone.prepare(
        w, channel_scale, importance, down, up, blocks, bits=bits, group_size=group_size,
        zero_point=zero_point, store_dtype=jnp.dtype(store_dtype), shrinks=tuple(shrinks),
    )  # fmt: skip
    kernel, x_spec, scratch = _kernel(call, x, blocks, quantized)
    outs = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=call.grid, in_specs=[x_spec, *call.in_specs],
            out_specs=[
                pl.BlockSpec(
                    (padded, blocks.columns), lambda c, i, s, layer: (0, call.column(c, i))
                ),
                *call.out_specs,
            ],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct((padded, n), x.dtype), *call.out_shape],
        compiler_params=alone.compiler_params(), interpret=interpret, name="prefill_quantize",
    )(layer.reshape(1).astype(jnp.int32), x, *call.operands)  # fmt: skip
    y, *packed = outs
    return y[:m], alone.unflatten(packed, bits)


def _kernel(
    call: alone.Call, x: jax.Array, blocks: Blocks, quantized: bool
) -> tuple[Callable[..., None], pl.BlockSpec, list[Any]]:
    """The kernel, how it takes x, and its scratch."""
    s = call.spec
    m = x.shape[0]
    scratch = s.scratch()
    own = len(scratch)
    scratch.append(pltpu.VMEM((s.rows, s.columns) if quantized else (16, LANES), x.dtype))
    scratch.append(pltpu.VMEM((m, s.columns), jnp.float32))
    if blocks.resident:
        x_spec = pl.BlockSpec(memory_space=pl.ANY)
        scratch.append(pltpu.VMEM((s.steps, m, s.rows), x.dtype))
        scratch.append(pltpu.SemaphoreType.DMA((s.steps,)))
    else:
        x_spec = pl.BlockSpec((m, s.rows), lambda c, i, s, layer: (0, s))

    def fetch(refs: tuple[Any, ...], x_ref: Any) -> Any:
        """The block's columns of x."""
        if not blocks.resident:
            return x_ref
        kept, arrived = refs

        def copy(step: Any) -> Any:
            start = step * s.rows if s.steps > 1 else 0
            if s.steps > 1 and not isinstance(step, int):
                start = pl.multiple_of(jnp.asarray(start), LANES)
            return pltpu.make_async_copy(
                x_ref.at[:, pl.ds(start, s.rows)], kept.at[step], arrived.at[step]
            )

        @pl.when(alone.is_first())
        def _() -> None:
            for step in range(s.steps):
                copy(step).start()

        step = 0 if s.steps == 1 else pl.program_id(2)
        pl.when(pl.program_id(1) == 0)(lambda: copy(step).wait())
        return kept.at[step]

    def kernel(layer_ref: Any, x_ref: Any, *refs: Any) -> None:
        at = len(call.operands)
        operands, y, rest = list(refs[:at]), refs[at], list(refs[at + 1 :])
        held = len(call.out_shape) + own
        rounded, sums, *extra = rest[held:]
        zero = jnp.minimum(layer_ref[0], 0)
        rounder = call.rounder(zero, operands, rest[:held], rounded if quantized else None)
        block = fetch(tuple(extra), x_ref)
        pl.when(alone.is_first())(rounder.prepare)
        weight = rounded if quantized else rounder.w
        matmuls = _matmuls(rounder, block, weight, sums, y, blocks)
        pieces = rounder.pieces()
        if s.steps == 1:
            pieces += rounder.pack()
        emit(pieces, matmuls)
        if s.steps > 1:

            @pl.when(pl.program_id(2) == s.steps - 1)
            def _() -> None:
                y[...] = sums[...].astype(y.dtype)
                emit(rounder.pack(), [])

    return kernel, x_spec, scratch

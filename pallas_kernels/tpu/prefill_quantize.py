"""The prompt's product with a weight, and the weight packed, from one read of the weight.

The rounding hides behind the matmul: the matrix unit works on one part of a block while the vector
unit rounds another (see `pallas_kernels.tpu.schedule`, which says what it takes to make the
compiler see it that way). The activations are copied to fast memory once per core.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.problem import Problem
from pallas_kernels.reference import LowRank, Packed
from pallas_kernels.tpu import memory
from pallas_kernels.tpu import quantize_pack as alone
from pallas_kernels.tpu.blocks import LANES, SUBLANES
from pallas_kernels.tpu.fetch import Activations
from pallas_kernels.tpu.rounding import Rounder
from pallas_kernels.tpu.schedule import Matmul, emit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks(alone.Blocks):
    """What one step of the grid works on.

    Attributes:
      depth: rows of the weight in one product.
      height: most rows of x in one product.
      resident: x stays in fast memory; else it is read once for each block of columns.
      spread: see `schedule.emit`.
    """

    depth: int = 256
    height: int = 512
    resident: bool = True
    spread: float = 0.85


def default_blocks(
    problem: Problem, chip: str | None = None, *, w_itemsize: int | None = None
) -> Blocks | None:
    """The heuristic: x stays in fast memory, in blocks as large as `quantize_pack`'s, if it fits.

    Products are as small as lets the matrix unit load its next square of the weight while it works
    on one; the smaller they are, the more evenly the rounding spreads between them.

    Args:
      problem: what is asked for.
      chip: short name; None is the one that is compiled for.
      w_itemsize: bytes of a number of the weight; None is as of x.

    Returns:
      Sizes, None if none fit.
    """
    info = memory.chip_info(chip)
    tall = info.mxu_column_size > LANES

    def choices() -> Iterator[tuple[Blocks, int]]:
        for resident in (True, False):
            for spec in alone.shapes(problem):
                blocks = Blocks(
                    rows=spec.rows, columns=spec.columns, resident=resident,
                    cores=alone.block_cores(spec.n, spec.columns, info.num_cores),
                    depth=512 if tall else 256, height=256 if tall else 128,
                    spread=0.75 if tall else 0.85,
                )  # fmt: skip
                itemsize = w_itemsize or spec.itemsize
                yield blocks, memory.needed(spec, w_itemsize=itemsize, resident=resident)

    return memory.first_fitting(choices(), info)


def refusal(problem: Problem, chip: str | None = None) -> str | None:
    """Why this kernel cannot serve; None if it can.

    Args:
      problem: what it is asked for.
      chip: short name; None is the one that is compiled for.

    Returns:
      The reason.
    """
    m = problem.m
    if m > 4096:
        return f"{m} rows of activations: the sums of at most 4096 fit into fast memory"
    why = alone.unservable(problem)
    if why is None and default_blocks(problem, chip) is None:
        return f"{m} rows of x beside it: {alone.too_large(problem.k, chip)}"
    return why


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
    rounder: Rounder, take: Callable[[slice, int], jax.Array], weight: Any, sums: Any, y: Any,
    blocks: Blocks, chunk: int,
) -> list[Matmul]:  # fmt: skip
    """The block's share of y, in products of ``depth`` rows of the weight."""
    s = rounder.spec
    m = y.shape[0]
    precision = lax.Precision.HIGHEST if y.dtype == jnp.float32 else lax.Precision.DEFAULT

    def operand(at: slice) -> jax.Array:
        part = weight[at, :]
        if weight is not rounder.w:
            return part
        if s.d_in < s.k:
            keep = rounder.present(at.start, at.stop - at.start)[:, :1]
            part = jnp.where(keep, part.astype(jnp.float32), 0.0)
        return _held(part.astype(y.dtype), rounder.token())

    def product(rows: slice, start: int, stop: int) -> None:
        total = sums[rows, :] if start else jnp.zeros((), jnp.float32)
        if not start and s.steps > 1:
            total = jnp.where(rounder.step == 0, 0.0, sums[rows, :])
        for at in range(start, stop, chunk):
            total += jnp.dot(
                take(rows, at), operand(slice(at, at + chunk)),
                precision=precision, preferred_element_type=jnp.float32,
            )  # fmt: skip
        if stop == s.rows and s.steps == 1:
            y[rows, :] = total.astype(y.dtype)
        else:
            sums[rows, :] = total

    found: list[Matmul] = []
    depth = max(blocks.depth // chunk, 1) * chunk
    for start in range(0, s.rows, depth):
        stop = min(start + depth, s.rows)
        for top in range(0, m, blocks.height):
            rows = slice(top, min(top + blocks.height, m))
            needed = 0 if weight is rounder.w else stop
            found.append((needed, functools.partial(product, rows, start, stop)))
    return found


def prefill_quantize(
    x: jax.Array,
    w: jax.Array,
    channel_scale: jax.Array | None,
    importance: jax.Array | None,
    low_rank: LowRank | None,
    layer: jax.Array,
    *,
    problem: Problem,
    tiles: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, Packed]:
    """``x @ w``, and w packed.

    Args:
      x: ``[m, d_in]``, bfloat16 or float32.
      w: see `quantize_pack`, as the arguments after it.
      channel_scale: see `quantize_pack`.
      importance: see `quantize_pack`.
      low_rank: see `quantize_pack`.
      layer: see `quantize_pack`.
      problem: see `quantize_pack`. Where it is `quantized`, ``x / D`` is multiplied with what the
        codes stand for, instead of x with w.
      tiles: block sizes; None for `default_blocks`.
      interpret: False, or `pltpu.InterpretParams`.

    Returns:
      ``(y[m, n] in x.dtype, (planes, scales, zeros))``.
    """
    blocks = tiles or default_blocks(problem, w_itemsize=w.dtype.itemsize)
    assert blocks is not None, "refused before"
    call = alone.prepare(w, channel_scale, importance, low_rank, layer, blocks, problem)
    m, n, padded = problem.m, problem.n, call.spec.padded_m
    if problem.quantized and channel_scale is not None:
        x = (x.astype(jnp.float32) / channel_scale.astype(jnp.float32)[None]).astype(x.dtype)
    x = jnp.pad(x, ((0, padded - m), (0, problem.k - problem.d_in)))
    activations = Activations(
        steps=call.spec.steps, rows=call.spec.rows, m=padded, dtype=x.dtype,
        resident=blocks.resident,
    )  # fmt: skip
    kernel, scratch = _kernel(call, activations, blocks)
    outs = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=call.grid, in_specs=[activations.spec(), *call.in_specs],
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
    return y[:m], alone.unflatten(packed, call)


def _kernel(
    call: alone.Call, activations: Activations, blocks: Blocks
) -> tuple[Callable[..., None], list[Any]]:
    """The kernel, and its scratch."""
    s, m, dtype = call.spec, activations.m, activations.dtype
    own = s.scratch()
    scratch = [
        *own,
        pltpu.VMEM((s.rows, s.columns) if s.quantized else (2 * SUBLANES, LANES), dtype),
        pltpu.VMEM((m, s.columns), jnp.float32),
        *activations.scratch(),
    ]

    def kernel(layer_ref: Any, x_ref: Any, *refs: Any) -> None:
        at = len(call.operands)
        operands, y, rest = list(refs[:at]), refs[at], list(refs[at + 1 :])
        held = len(call.out_shape) + len(own)
        rounded, sums, *kept = rest[held:]
        zero = jnp.minimum(layer_ref[0], 0)
        rounder = call.rounder(zero, operands, rest[:held], rounded if s.quantized else None)

        @pl.when(alone.is_first())
        def _() -> None:
            activations.start(x_ref, kept)
            rounder.prepare()

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            activations.wait(x_ref, kept, rounder.step)

        take = functools.partial(activations.take, x_ref, kept, rounder.step)
        weight = rounded if s.quantized else rounder.w
        matmuls = _matmuls(rounder, take, weight, sums, y, blocks, activations.chunk)
        pieces = rounder.pieces()
        if s.steps == 1:
            pieces += rounder.pack()
        emit(pieces, matmuls, blocks.spread)
        if s.steps > 1:

            @pl.when(pl.program_id(2) == s.steps - 1)
            def _() -> None:
                y[...] = sums[...].astype(y.dtype)
                emit(rounder.pack(), [])

    return kernel, scratch

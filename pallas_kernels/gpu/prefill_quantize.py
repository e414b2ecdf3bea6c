"""The prompt's product with a weight and the weight packed, in one kernel; Triton backend.

A program owns a block of rows of x and a block of columns, and walks over the whole depth: each
group of weights is multiplied from the registers that it was loaded to. With more rows than fit a
program's accumulators (128), several programs share a block of columns; they are neighbours in the
launch order, run at the same time and read the weight from the second-level cache behind whichever
of them comes first. The groups to be quantized are dealt out among them in turn, so that every
group is quantized once and no program has more of that work than the others.

Device memory traffic: the weight once (as far as the cache keeps neighbours together), x and y as
in any matrix product, the packed weight written once; nothing is written to be read again. From
the second-level cache the weight is read once per 128 rows of x. ``quantized=True`` multiplies
with the codes, so that every program quantizes every group and only the stores are dealt out.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.gpu import quantize_pack as qp
from pallas_kernels.gpu import unpack
from pallas_kernels.gpu.limits import SHARED_BYTES
from pallas_kernels.gpu.triton import pallas_call, plgpu
from pallas_kernels.layout import PLANES
from pallas_kernels.problem import Problem
from pallas_kernels.reference import LowRank, Packed, column_scales

_EXACT = lax.Precision.HIGHEST


def refusal(problem: Problem, chip: str | None) -> str | None:
    """Why this kernel cannot serve a problem.

    Args:
      problem: The problem.
      chip: Short name of the GPU, None if unknown.

    Returns:
      The reason, None if it can.
    """
    why, group_size = qp.refusal(problem, chip), problem.group_size
    if why is None and group_size <= 8:
        return f"tensor cores multiply at least 16 rows at a time, a group has {group_size}"
    if why is None and group_size > 256:
        return f"x and a group of {group_size} rows do not fit into shared memory, 256 do"
    return why


def blocks(problem: Problem) -> tuple[int, int]:
    """The default rows of x and columns of the weight per program.

    A group's columns of x take at most two thirds of the shared memory; the weights, as an operand
    of the tensor cores, take up to 32 KiB of it. Exact products of float32, and a deep group whose
    codes are multiplied, need more registers: larger blocks than these spill (by ptxas' figures).

    Args:
      problem: What is asked for.

    Returns:
      Powers of two: rows from 16 to 128, columns from 16 to 64.
    """
    wide = problem.itemsize == 4
    depth = 1 << (problem.group_size - 1).bit_length()
    most, columns = 128, min(64, qp.block_columns(problem))
    if wide:
        most, columns = 64, min(32, columns)
    if depth > 128 and (problem.quantized or wide):
        most, columns = 64, 16
    fitting = 2 * SHARED_BYTES // 3 // (depth * problem.itemsize)
    return max(16, min(most, 1 << (problem.m - 1).bit_length(), fitting)), columns


def _load_x(ref: Any, row: Any, rows: Any, real_rows: Any, place: qp.Place, facts: qp.Facts) -> Any:
    real = place.real(row)
    mask = None if real is None else real[None, :]
    if real_rows is not None:
        mask = real_rows[:, None] if mask is None else real_rows[:, None] & mask
    return qp.load(ref, (rows, pl.ds(row, facts.depth)), mask)


def _times_codes(
    x: jax.Array, codes: jax.Array, grid: Any, refs: Any, row: Any, place: Any, facts: Any
) -> jax.Array:
    """``(x / D) (s (q - z))`` of one group."""
    scales, zeros = grid
    x = x.astype(jnp.float32)
    if "channel_scale" in refs:
        real = place.real(row)
        x = x / qp.load(refs["channel_scale"], (pl.ds(row, facts.depth),), real, 1.0)[None, :]
    x = x.astype(refs["x"].dtype)
    offset = 2.0 ** (facts.bits - 1) if facts.zero_point == "none" else 0.0
    part = _dot(x, (codes - offset).astype(x.dtype))
    if facts.zero_point != "none":
        part = part - jnp.sum(x.astype(jnp.float32), axis=1)[:, None] * zeros[None, :]
    return part * scales[None, :]


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    precision = _EXACT if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.dot(x, w, preferred_element_type=jnp.float32, precision=precision)


def _kernel(
    layer_ref: Any, x_ref: Any, w_ref: Any, *rest: Any, facts: qp.Facts, block: int
) -> None:
    refs = dict(zip(facts.given, rest, strict=False), x=x_ref)
    y_ref, *outputs = rest[len(facts.given) :]
    count = len(PLANES[facts.stored_bits])
    place, layer = qp.Place(facts, pl.program_id(1)), layer_ref[0]
    sharer, sharing = pl.program_id(0), pl.cdiv(facts.m, block)
    first = sharer * block
    rows = pl.ds(first, block)
    ids = first + jnp.arange(block, dtype=jnp.int32)
    real_rows = ids < facts.m if facts.m % block else None
    size = (facts.depth, facts.columns)

    def of_group(w: Any, row: Any) -> Any:
        w = qp.residual(w, refs, row, place, facts)
        return qp.quantize(w, refs, row, place, facts)

    def store_and_put(slab: int, row: Any, found: Any, carriers: Any) -> Any:
        codes, scales, zeros = found
        qp.write_grid(scales, zeros, row, place, facts, refs, outputs[count:])
        return qp.put(codes, slab, carriers, facts)

    def step(t: Any, acc: Any) -> Any:
        mine = lax.rem(t, sharing) == sharer
        carriers = [jnp.zeros(size, jnp.int32)] * len(facts.parts)
        for slab in range(unpack.slabs(facts.stored_bits)):
            row = slab * facts.slab + t * facts.group_size
            at = (layer, pl.ds(row, facts.depth), place.columns)
            w = qp.load(w_ref, at, place.both(place.real(row)))
            x = _load_x(x_ref, row, rows, real_rows, place, facts)
            found = None
            if facts.quantized:
                found = of_group(w, row)
                acc = acc + _times_codes(x, found[0], found[1:], refs, row, place, facts)
            else:
                acc = acc + _dot(x, w.astype(x.dtype))

            def write(carriers: Any, slab: int = slab, row: Any = row, w: Any = w,
                      found: Any = found) -> Any:  # fmt: skip
                return store_and_put(slab, row, found or of_group(w, row), carriers)

            carriers = _when(mine, sharing, write, carriers)

        def finish(carriers: Any) -> Any:
            qp.write_carriers(carriers, t, place, facts, outputs[:count])
            return carriers

        _when(mine, sharing, finish, carriers)
        return acc

    zero = jnp.zeros((block, facts.columns), jnp.float32)
    acc = lax.fori_loop(0, facts.slab // facts.group_size, step, zero)
    mask = place.both(real_rows)
    plgpu.store(y_ref.at[rows, place.columns], acc.astype(y_ref.dtype), mask=mask)


def _when(mine: Any, sharing: int, do: Any, carriers: Any) -> Any:
    """Does it in the program whose turn it is."""
    if sharing == 1:
        return do(carriers)
    return lax.cond(mine, do, lambda carriers: carriers, carriers)


def prefill_quantize(
    x: jax.Array,
    w: jax.Array,
    channel_scale: jax.Array | None,
    importance: jax.Array | None,
    low_rank: LowRank | None,
    layer: jax.Array,
    *,
    problem: Problem,
    tiles: tuple[int, int] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Packed]:
    """The prompt's product with one layer, and that layer packed.

    Args:
      x: ``[m, d_in]``; not divided by the channel scale.
      w: See `quantize_pack.quantize_pack`, as the arguments after it.
      channel_scale: See `quantize_pack.quantize_pack`.
      importance: See `quantize_pack.quantize_pack`.
      low_rank: See `quantize_pack.quantize_pack`.
      layer: See `quantize_pack.quantize_pack`.
      problem: See `quantize_pack.quantize_pack`. Where it is `quantized`, ``x / D`` is multiplied
        with the codes, instead of x with w; the low-rank part is left to the caller.
      tiles: Rows of x and columns per program, powers of two; None is `blocks`.
      interpret: Runs on the CPU, for tests.

    Returns:
      ``(y[m, n] in x's dtype, (planes, scales, zeros))``.
    """
    m, n = problem.m, problem.n
    of_columns = column_scales(w, channel_scale, low_rank, layer, problem=problem)
    given = qp.operands_of(channel_scale, importance, low_rank, of_columns, problem)
    block, columns = tiles or blocks(problem)
    facts = qp.Facts(**vars(problem), columns=columns, given=tuple(given), interpret=interpret)
    y, *outputs = pallas_call(
        functools.partial(_kernel, facts=facts, block=block),
        out_shape=[jax.ShapeDtypeStruct((m, n), x.dtype), *qp.outputs_of(facts)],
        grid=(pl.cdiv(m, block), pl.cdiv(n, columns)),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name=f"prefill_quantize_{problem.bits}bit",
    )(layer.reshape(1), x, w, *given.values())
    return y, qp.packed_of(outputs, given, facts)

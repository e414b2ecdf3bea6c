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
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.layout import PLANES
from pallas_kernels.tpu.activations import (
    LANES,
    exact_dot,
    join_limbs,
    write_limbs,
    write_permuted,
    write_sums,
)
from pallas_kernels.tpu.unpack import (
    RUN,
    as_bfloat16,
    as_int8,
    merged,
    offset,
    pieces,
    unit_rows,
)

_ROWS = 16
"""Rows of a register of bfloat16 numbers."""

_INTEGER_ROWS = 10
"""Most rows of x whose limbs fill one register of int8 numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """What one step of the grid works on.

    Attributes:
      rows: of x.
      columns: of the weight, all `k` rows of each; a multiple of 128.
      parts: pieces that a block of a plane is fetched in: a single transfer does not use all of
        the memory's bandwidth.
      cores: cores of the chip, among which the columns are divided.
      integer: multiply int8 numbers, see the module's docstring.
    """

    rows: int
    columns: int
    parts: int
    cores: int
    integer: bool = False


def _info() -> Any:
    """The chip that is compiled for; a v5e where there is none, as in the interpreter."""
    try:
        return pltpu.get_tpu_info()
    except ValueError:
        return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)


def default_blocks(m: int, k: int, n: int, *, bits: int, group_size: int) -> Blocks:
    """The heuristic: columns as wide as a sixth of the fast memory allows, up to 1024.

    A wider block has fewer steps and longer rows to fetch, but the first one's transfer is not
    hidden, so each core gets two steps where the weight is wide enough.

    Args:
      m: rows of x.
      k: rows of the weight.
      n: its columns.
      bits: width of a code.
      group_size: rows that share a scale.

    Returns:
      Sizes for the chip that is compiled for.
    """
    info = _info()
    bytes_per_column = k * bits // 8 + 8 * (k // group_size)
    columns = 1024
    while columns > LANES and (
        columns * bytes_per_column > info.vmem_capacity_bytes // 6
        or 2 * columns * info.num_cores > n
    ):
        columns //= 2
    cores = info.num_cores if pl.cdiv(n, columns) % info.num_cores == 0 else 1
    unit = unit_rows(k, bits)
    grain = max(LANES, group_size)
    parts = next((p for p in (4, 3, 2) if unit % (p * grain) == 0), 1)
    # Rows fill the registers of a bfloat16 array; those beyond m are dropped at the end.
    rows = min(pl.cdiv(m, _ROWS) * _ROWS, 64)
    integer = m <= _INTEGER_ROWS and info.int8_ops_per_second > info.bf16_ops_per_second
    return Blocks(rows=rows, columns=columns, parts=parts, cores=cores, integer=integer)


def _vmem_limit() -> int:
    return _info().vmem_capacity_bytes * 7 // 8


def refusal(
    *, m: int, k: int, n: int, bits: int, group_size: int, dtype: Any, **_: Any
) -> str | None:
    """Why this kernel cannot serve; None if it can.

    Args:
      m: rows of x.
      k: rows of the weight.
      n: its columns.
      bits: width of a code.
      group_size: rows that share a scale.
      dtype: of x.

    Returns:
      The reason.
    """
    del m, n
    unit = unit_rows(k, bits)
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"x is {jnp.dtype(dtype).name}; the matrix unit multiplies bfloat16"
    if unit % RUN:
        return (
            f"{k} rows of {bits}-bit codes are slabs of {unit} rows; "
            f"vector registers hold multiples of {RUN}"
        )
    if group_size % RUN and group_size != k:
        return f"group_size {group_size} is not a multiple of {RUN}"
    return None


def _kernel(
    layer_ref: Any, x_ref: Any, *refs: Any,
    bits: int, group_size: int, parts: int, symmetric: bool, integer: bool, m: int,
) -> None:  # fmt: skip
    """One block of columns of y."""
    del layer_ref
    n_plane = parts * len(PLANES[bits])
    plane_refs, scales_ref, refs = refs[:n_plane], refs[n_plane], refs[n_plane + 1 :]
    zeros_ref, refs = (None, refs) if symmetric else (refs[0], refs[1:])
    y_ref, left_ref, sums_ref, rows_ref = refs
    k = x_ref.shape[1]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        write_sums(x_ref, sums_ref, group_size, m)
        if integer:
            write_limbs(x_ref, left_ref, m)
        else:
            write_permuted(x_ref, left_ref)

    @functools.cache
    def load(plane: int, row: int, carrier: int, size: int) -> jax.Array:
        of_plane = plane_refs[plane * parts : (plane + 1) * parts]
        part, at = divmod(row * unit_rows(k, bits) + carrier, of_plane[0].shape[0])
        return pltpu.bitcast(of_plane[part][at : at + size, :], jnp.int32)

    words = functools.cache(functools.partial(merged, load))
    # A float32 row is broadcast while it is loaded, for nothing.
    rows_ref[...] = scales_ref[...].astype(jnp.float32)
    zeros = 2.0 ** (bits - 1) if zeros_ref is None else _as_float32(zeros_ref[...])
    left = x_ref if bits == 8 and not integer else left_ref
    sum_type = jnp.int32 if integer else jnp.float32
    total = jnp.zeros((left.shape[0], y_ref.shape[1]), jnp.float32)
    for piece in pieces(k, bits, group_size, parts):
        found = words(piece.unit, piece.carrier, piece.size, bits)
        codes = as_int8(*found) if integer else as_bfloat16(*found)
        product = jnp.dot(
            left[:, piece.row : piece.row + piece.size], codes, preferred_element_type=sum_type
        )
        group = piece.row // group_size
        total = total + product.astype(jnp.float32) * rows_ref[group : group + 1, :]
    if integer:
        total = join_limbs(x_ref, total, m)
    zeros = rows_ref[...] * (zeros + offset(bits, integer=integer))
    rest = exact_dot(sums_ref[:, : zeros.shape[0]], zeros, m)
    rows = min(total.shape[0], rest.shape[0])
    y_ref[:rows, :] = (total[:rows] + rest[:rows]).astype(y_ref.dtype)


def _as_float32(zeros: jax.Array) -> jax.Array:
    return (zeros.astype(jnp.int32) if zeros.dtype == jnp.uint8 else zeros).astype(jnp.float32)


def packed_matmul(
    x: jax.Array,
    planes: Sequence[jax.Array],
    scales: jax.Array,
    zeros: jax.Array | None,
    layer: jax.Array,
    *,
    bits: int,
    group_size: int,
    tiles: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """``y = x @ (s (q - z))`` for one layer of a stack.

    Args:
      x: ``bfloat16[m, k]``, finite.
      planes: ``uint8[L, k * width // 8, n]`` for each width in ``PLANES[bits]``.
      scales: ``[L, k // group_size, n]``.
      zeros: as ``scales``, or uint8, or None.
      layer: ``int32[]``.
      bits: width of a code.
      group_size: rows that share a scale; `refusal` tells which are served.
      tiles: block sizes; None for `default_blocks`.
      interpret: run by the TPU interpreter.

    Returns:
      ``y[m, n]``, bfloat16.
    """
    m, k = x.shape
    n = scales.shape[-1]
    sizes = tiles or default_blocks(m, k, n, bits=bits, group_size=group_size)
    columns, parts = sizes.columns, sizes.parts
    steps = pl.cdiv(n, columns * sizes.cores)

    def weight_spec(rows: int, part: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (pl.squeezed, rows, columns),
            lambda core, i, j, layer: (layer[0], part, core * steps + j),
        )

    operands, specs = [x], [pl.BlockSpec((sizes.rows, k), lambda core, i, j, layer: (i, 0))]
    for plane in planes:
        operands += [plane] * parts
        specs += [weight_spec(plane.shape[1] // parts, part) for part in range(parts)]
    for small in (scales, zeros):
        if small is not None:
            operands.append(small)
            specs.append(weight_spec(k // group_size, 0))
    placed = m if sizes.integer else sizes.rows
    sums = pl.cdiv(k // group_size, LANES) * LANES
    kernel = functools.partial(
        _kernel, bits=bits, group_size=group_size, parts=parts, symmetric=zeros is None,
        integer=sizes.integer, m=placed,
    )  # fmt: skip
    triple = pl.cdiv(3 * placed, 8) * 8
    left = (triple, k), jnp.int8
    if not sizes.integer:
        left = (sizes.rows, k), jnp.bfloat16
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
                pltpu.VMEM(*left),
                pltpu.VMEM((triple, sums), jnp.bfloat16),
                pltpu.VMEM((k // group_size, columns), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_vmem_limit(),
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="packed_matmul",
    )(layer.reshape(1), *operands)

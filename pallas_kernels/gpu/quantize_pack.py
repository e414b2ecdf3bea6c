"""Rounds a weight to its groups' grids and packs it, in one pass over it; Triton backend.

A program loads one group of rows from every slab of the narrowest plane, for one block of columns:
just what fills whole carriers. Each group stays in registers from its load to its codes, the clip
search included; nothing is read twice.

Where a slab does not hold whole groups (1152 rows in groups of 128 do not cut into eighths), a
group's codes fall into two fields of different carriers; then the kernel writes bytes and XLA packs
them: a byte per weight more is written and read.

Division is the GPU's approximate one (2 ulp): scales can differ from the oracle's in the last bit
of a float32, codes where a weight lies that close to the middle between two.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import grid, search
from pallas_kernels.gpu import triton, unpack
from pallas_kernels.gpu.limits import SHARED_BYTES
from pallas_kernels.gpu.triton import pallas_call, plgpu
from pallas_kernels.layout import PLANES, pack
from pallas_kernels.problem import Problem
from pallas_kernels.reference import LowRank, Packed, column_scales, with_columns

_EXACT = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(Problem):
    """What the body of a quantizing kernel knows statically.

    Attributes:
      columns: per program.
      given: names of the optional operands that there are.
      interpret: whether no PTX can run.
    """

    columns: int
    given: tuple[str, ...]
    interpret: bool

    @property
    def stored_bits(self) -> int:
        """Width of what the kernel writes: 8 where XLA packs."""
        return self.bits if self.k % (unpack.slabs(self.bits) * self.group_size) == 0 else 8

    @property
    def slab(self) -> int:
        """Rows of a slab of the narrowest plane that is written."""
        return self.k // unpack.slabs(self.stored_bits)

    @property
    def depth(self) -> int:
        """Rows that are loaded for a group, a power of two."""
        return 1 << (self.group_size - 1).bit_length()

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(plane, part) of each carrier block that a program fills."""
        widths = PLANES[self.stored_bits]
        return [(i, part) for i, w in enumerate(widths) for part in range(w // min(widths))]


def refusal(problem: Problem, chip: str | None) -> str | None:
    """Why this kernel cannot serve a problem.

    Args:
      problem: The problem.
      chip: Short name of the GPU, None if unknown.

    Returns:
      The reason, None if it can.
    """
    why = triton.refusal(chip)
    if why is not None:
        return why
    group_size, rank = problem.group_size, problem.rank
    if group_size > 512:
        return f"a group of {group_size} rows does not fit into the registers, at most 512 do"
    rows = 1 << (group_size - 1).bit_length()
    if rank and 4 * _rank_block(rank) * (rows + block_columns(problem)) > SHARED_BYTES:
        return (
            f"low-rank factors of rank {rank} do not fit into shared memory beside a group of "
            f"{group_size} rows"
        )
    return None


def _rank_block(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def block_columns(problem: Problem) -> int:
    """The default columns per program.

    Registers hold, per weight of a group, its float32 and a carrier of every part (5 for 5 bits);
    16 weights for each of 256 threads leave room for both. With refits, the most that does not
    spill is 8.

    Args:
      problem: What is asked for.

    Returns:
      A power of two from 16 to 128.
    """
    weights = 4096 if len(PLANES[problem.bits]) > 1 else 8192
    if problem.refits:
        weights = 2048
    return min(128, max(16, weights >> (problem.group_size - 1).bit_length()))


def operands_of(
    channel_scale: jax.Array | None, importance: jax.Array | None, low_rank: LowRank | None,
    of_columns: jax.Array | None, problem: Problem,
) -> dict[str, jax.Array]:  # fmt: skip
    """The optional operands that there are, float32, by name; factors padded to `_rank_block`."""
    down, up = low_rank or (None, None)
    if down is not None and up is not None:
        # Zeros: a kernel may not read beyond an array, and Triton's products are of 16 and more.
        padding = _rank_block(problem.rank) - problem.rank
        down, up = jnp.pad(down, ((0, 0), (0, padding))), jnp.pad(up, ((0, padding), (0, 0)))
    given = {"channel_scale": channel_scale, "importance": None, "down": down, "up": up,
             "of_columns": None if of_columns is None else of_columns[0]}  # fmt: skip
    if problem.searched:
        given |= {"importance": importance, "shrinks": jnp.asarray(problem.shrinks, jnp.float32)}
    return {name: a.astype(jnp.float32) for name, a in given.items() if a is not None}


def outputs_of(facts: Facts) -> list[jax.ShapeDtypeStruct]:
    """Planes, scales and zero points."""
    rows = [(facts.k * width // 8, "uint8") for width in PLANES[facts.stored_bits]]
    rows += [(facts.k // facts.group_size, t) for t in (facts.scale_dtype, facts.zero_dtype) if t]
    return [jax.ShapeDtypeStruct((count, facts.n), dtype) for count, dtype in rows]


def packed_of(outputs: Any, given: dict[str, jax.Array], facts: Facts) -> Packed:
    """What a kernel wrote, as the public calls return it."""
    count = len(PLANES[facts.stored_bits])
    planes, (scales, *zeros) = tuple(outputs[:count]), outputs[count:]
    if facts.stored_bits != facts.bits:
        planes = pack(planes[0], bits=facts.bits)
    scales = with_columns(scales, given.get("of_columns"), facts)
    return planes, scales, zeros[0] if zeros else None


class Place:
    """Where a program is: its columns, and a group's rows.

    Attributes:
      columns: slice of all columns.
      inside: which of them exist, ``bool[1, columns]``; None is all.
      rows: offsets in a group, ``int32[depth]``.
    """

    def __init__(self, facts: Facts, block: Any):
        self._facts = facts
        start = block * facts.columns
        self.columns = pl.ds(start, facts.columns)
        ragged = facts.n % facts.columns != 0
        ids = start + jnp.arange(facts.columns, dtype=jnp.int32)
        self.inside = (ids < facts.n)[None, :] if ragged else None
        self.rows = jnp.arange(facts.depth, dtype=jnp.int32)

    def real(self, row: Any) -> jax.Array | None:
        """Which rows of the group from `row` on the weight has; None is all."""
        facts = self._facts
        if facts.d_in == facts.k and facts.depth == facts.group_size:
            return None
        return (self.rows < facts.group_size) & (row + self.rows < facts.d_in)

    def both(self, rows: jax.Array | None) -> jax.Array | None:
        """A mask of rows and columns."""
        if rows is None or self.inside is None:
            return self.inside if rows is None else rows[:, None]
        return rows[:, None] & self.inside


def load(ref: Any, at: Any, mask: jax.Array | None, other: float = 0.0) -> jax.Array:
    """A block, with `other` where masked out."""
    if mask is None:
        return plgpu.load(ref.at[at])
    return plgpu.load(ref.at[at], mask=mask, other=jnp.asarray(other, ref.dtype))


def residual(w: jax.Array, refs: dict[str, Any], row: Any, place: Place, facts: Facts) -> jax.Array:
    """``D (w - A B)`` of one group, float32; padding stays 0."""
    w = w.astype(jnp.float32)
    rows, real = pl.ds(row, facts.depth), place.real(row)
    if "down" in refs:
        ranks = pl.ds(0, refs["down"].shape[1])
        down = load(refs["down"], (rows, ranks), None if real is None else real[:, None])
        up = load(refs["up"], (ranks, place.columns), place.inside)
        w = w - jnp.dot(down, up, precision=_EXACT)
    if "channel_scale" in refs:
        w = w * load(refs["channel_scale"], (rows,), real)[:, None]
    return w


def quantize(
    w: jax.Array, refs: dict[str, Any], row: Any, place: Place, facts: Facts
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The codes of a group's residual, its scales and its zero points; all float32."""
    nearest = functools.partial(unpack.nearest, interpret=facts.interpret)
    form = facts.grid | {
        "nearest": nearest,
        "stored": functools.partial(unpack.as_stored, interpret=facts.interpret),
        "columns": load_row(refs["of_columns"], place) if "of_columns" in refs else None,
    }
    encode = functools.partial(grid.encode, bits=facts.bits, nearest=nearest)
    low, high = jnp.min(w, axis=0), jnp.max(w, axis=0)
    if not facts.searched:
        scales, zeros = grid.fit(low * facts.shrinks[0], high * facts.shrinks[0], **form)
        return encode(w, scales[None, :], zeros[None, :]), scales, zeros
    h, real = None, place.real(row)
    if "importance" in refs:
        h = load(refs["importance"], (pl.ds(row, facts.depth),), real)[:, None]
    elif real is not None:
        # A zero point that is no whole number makes an error of padding, which counts nowhere.
        h = real.astype(jnp.float32)[:, None]

    def total(rows: jax.Array) -> jax.Array:
        return jnp.sum(rows, axis=0)

    def measure(scales: jax.Array, zeros: jax.Array, refitted: bool) -> Any:
        s, z = scales[None, :], zeros[None, :]
        codes = encode(w, s, z)
        error = jnp.square(w - grid.decode(codes, s, z))
        sums = search.terms(w, codes, z, h, zero_point=facts.zero_point) if refitted else ()
        return total(error if h is None else h * error), tuple(map(total, sums))

    weights = None
    if facts.refits and facts.zero_point != "none":
        weights = (
            jnp.full_like(low, facts.group_size) if h is None else jnp.full_like(low, jnp.sum(h)),
            total(w if h is None else h * w),
        )
    scales, zeros = search.best(
        low, high, lambda i: refs["shrinks"][i], len(facts.shrinks), facts.refits, measure, weights,
        **form,
    )  # fmt: skip
    return encode(w, scales[None, :], zeros[None, :]), scales, zeros


def load_row(ref: Any, place: Place) -> jax.Array:
    """What there is per column, ``float32[columns]``; 1 beyond the last."""
    inside = None if place.inside is None else place.inside[0]
    return load(ref, (place.columns,), inside, other=1.0)


def write_grid(
    scales: jax.Array, zeros: jax.Array, row: Any, place: Place, facts: Facts,
    refs: dict[str, Any], outputs: Any,
) -> None:  # fmt: skip
    """Stores the scales and zero points of the group that starts at `row`."""
    group = row // facts.group_size
    columns = load_row(refs["of_columns"], place) if "of_columns" in refs else None
    for ref, kept in zip(outputs, grid.closed(scales, zeros, columns, **facts.grid), strict=True):
        at = ref.at[pl.ds(group, 1), place.columns]
        plgpu.store(at, kept[None, :], mask=place.inside)


def put(codes: jax.Array, slab: int, carriers: list[Any], facts: Facts) -> list[Any]:
    """Carriers with the codes of one slab in their fields; None is a carrier still empty."""
    whole = codes.astype(jnp.int32)
    carriers, base = list(carriers), 0
    widths = PLANES[facts.stored_bits]
    for i, (part, field) in enumerate(unpack.sources(slab, facts.stored_bits)):
        bits = (whole >> base) & (2 ** widths[i] - 1)
        bits = bits << (widths[i] * field)
        at = facts.parts.index((i, part))
        carriers[at] = bits if carriers[at] is None else carriers[at] | bits
        base += widths[i]
    return carriers


def write_carriers(carriers: list[Any], step: Any, place: Place, facts: Facts, refs: Any) -> None:
    """Stores the carriers of one group of every slab."""
    exists = None if facts.depth == facts.group_size else place.rows < facts.group_size
    for (plane, part), carrier in zip(facts.parts, carriers, strict=True):
        rows = pl.ds(part * facts.slab + step * facts.group_size, facts.depth)
        plgpu.store(
            refs[plane].at[rows, place.columns], carrier.astype(jnp.uint8), mask=place.both(exists)
        )


def _kernel(layer_ref: Any, w_ref: Any, *all_refs: Any, facts: Facts) -> None:
    refs = dict(zip(facts.given, all_refs, strict=False))
    outputs = all_refs[len(facts.given) :]
    count = len(PLANES[facts.stored_bits])
    place, step, layer = Place(facts, pl.program_id(0)), pl.program_id(1), layer_ref[0]
    carriers: list[Any] = [None] * len(facts.parts)
    for slab in range(unpack.slabs(facts.stored_bits)):
        row = slab * facts.slab + step * facts.group_size
        at = (layer, pl.ds(row, facts.depth), place.columns)
        w = load(w_ref, at, place.both(place.real(row)))
        w = residual(w, refs, row, place, facts)
        codes, scales, zeros = quantize(w, refs, row, place, facts)
        write_grid(scales, zeros, row, place, facts, refs, outputs[count:])
        carriers = put(codes, slab, carriers, facts)
    write_carriers(carriers, step, place, facts, outputs[:count])


def quantize_pack(
    w: jax.Array,
    channel_scale: jax.Array | None,
    importance: jax.Array | None,
    low_rank: LowRank | None,
    layer: jax.Array,
    *,
    problem: Problem,
    tiles: int | None = None,
    interpret: bool = False,
) -> Packed:
    """Rounds and packs one layer; see `reference.quantize_pack`.

    Args:
      w: ``[L, d_in, n]``.
      channel_scale: ``[d_in]`` or None.
      importance: ``[d_in]`` or None.
      low_rank: ``(A[d_in, r], B[r, n])`` or None.
      layer: ``int32[]``, which of the L.
      problem: What to do; `refusal` tells what is served.
      tiles: Columns per program, a power of two; None is `block_columns`.
      interpret: Runs on the CPU, for tests.

    Returns:
      ``(planes, scales, zeros)`` of that layer.
    """
    of_columns = column_scales(w, channel_scale, low_rank, layer, problem=problem)
    given = operands_of(channel_scale, importance, low_rank, of_columns, problem)
    columns = tiles or block_columns(problem)
    facts = Facts(**vars(problem), columns=columns, given=tuple(given), interpret=interpret)
    outputs = pallas_call(
        functools.partial(_kernel, facts=facts),
        out_shape=outputs_of(facts),
        grid=(pl.cdiv(facts.n, columns), facts.slab // facts.group_size),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name=f"quantize_pack_{facts.bits}bit",
    )(layer.reshape(1), w, *given.values())
    return packed_of(outputs, given, facts)

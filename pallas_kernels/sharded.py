"""The public calls on a weight that the devices of a mesh share.

A kernel is opaque to the compiler's partitioner. So each call is mapped over the devices, and every
one packs, or multiplies with, its own block of the weight: a run of columns, or a run of rows whose
partial products are summed. What surrounds the calls stays a program over whole arrays.

A block of rows is packed by itself (`layout` counts slabs from the rows that it is given). So
planes that were packed in some number of blocks are read in the same number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, layout, reference
from pallas_kernels.grid import Scales, kind_of, put_together, taken_apart
from pallas_kernels.reference import LowRank, Packed

BATCH = "data"
"""The mesh axis that the first axis of activations is dealt out over."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Mesh axes that a weight is dealt out over; () for none.

    Attributes:
      rows: those of its input channels.
      columns: those of its output channels.
      mesh: a mesh of its own; None for that of the program.
      experts: those of a stack of weights, which no call here is given; whoever takes one of them
        does so inside of a `shard_map`.
    """

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    mesh: Any = None
    experts: tuple[str, ...] = ()

    def here(self) -> Split | None:
        """The axes that have several devices on the weight's mesh; None without a mesh.

        Inside a `shard_map` there is none: every array is a device's own.
        """
        sizes = mesh_sizes(self.mesh)
        if all(size == 1 for size in sizes.values()):
            return None

        def shared(axes: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)

        return Split(shared(self.rows), shared(self.columns), self.mesh, shared(self.experts))

    @property
    def row_blocks(self) -> int:
        """How many blocks the rows are in, on its mesh."""
        return math.prod(mesh_sizes(self.mesh).get(axis, 1) for axis in self.rows)


def mesh_sizes(mesh: Any = None) -> dict[str, int]:
    """The axes of a mesh by name; {} without one, or inside a `shard_map`.

    Args:
      mesh: which; None for that of the program that is traced.

    Returns:
      How many devices each has.
    """
    traced = jax.sharding.get_abstract_mesh()
    mesh = traced if mesh is None else mesh
    return {} if mesh.empty or traced.manual_axes else dict(mesh.shape)


def rows_spec(shape: tuple[int, ...], split: Split, last: Any = None) -> P:
    """How activations lie: their first axis over the batch's devices if these divide it.

    Args:
      shape: of the activations.
      split: of the weight; the batch is not dealt out over what the weight is.
      last: mesh axes of their last axis, or None.

    Returns:
      The spec.
    """
    size = mesh_sizes(split.mesh).get(BATCH, 1)
    size = 1 if BATCH in (*split.rows, *split.columns) else size
    first = BATCH if len(shape) > 1 and size > 1 and shape[0] % size == 0 else None
    return P(*([first] + [None] * (len(shape) - 2))[: len(shape) - 1], last)


def weight_specs(weight: Any, split: Split) -> Any:
    """Specs of arrays that end in ``[rows, columns]``, and of coded scales.

    Args:
      weight: a tree of them.
      split: the axes.

    Returns:
      A tree of the same form.
    """
    rows, columns = split.rows or None, split.columns or None

    def spec(a: Any) -> Any:
        per_group, of_columns = taken_apart(a)
        kept = P(*[None] * (per_group.ndim - 2), rows, columns)
        own = None if of_columns is None else P(*[None] * (of_columns.ndim - 1), columns)
        return put_together(kept, own, kind_of(a))

    return jax.tree.map(spec, weight, is_leaf=lambda a: kind_of(a) != "float")


def _mapped(
    run: Callable[..., Any], split: Split, x: Any, weight: Any, channel: Any, factors: Any,
    layer: Any, out: Any,
) -> Any:  # fmt: skip
    """`run` of every device's blocks."""
    rows, columns = split.rows or None, split.columns or None
    specs = (
        None if x is None else rows_spec(x.shape, split, rows),
        weight_specs(weight, split),
        jax.tree.map(lambda _: P(rows), channel),
        None if factors is None else (P(rows, None), P(None, columns)),
        None if layer is None else P(),
    )
    mapped = jax.shard_map(run, mesh=split.mesh, in_specs=specs, out_specs=out, check_vma=False)
    return mapped(x, weight, channel, factors, layer)


def _summed(y: jax.Array, split: Split) -> jax.Array:
    return jax.lax.psum(y, split.rows) if split.rows else y


def packed_matmul(
    x: jax.Array,
    planes: Sequence[jax.Array],
    scales: Scales,
    zeros: jax.Array | None,
    channel_scale: jax.Array | None = None,
    low_rank: LowRank | None = None,
    *,
    split: Split | None = None,
    layer: jax.Array | int | None = None,
    **how: Any,
) -> jax.Array:
    """See `dispatch.packed_matmul`.

    Args:
      x: See there, as all the others; its first axis may be over the mesh axis `BATCH`.
      planes: See there; of each block of rows by itself.
      scales: See there.
      zeros: See there.
      channel_scale: See there.
      low_rank: See there.
      split: How the weight lies on the mesh of this program; None for on one device, or whole.
      layer: See there.
      **how: See there.

    Returns:
      See there; of a weight in blocks of rows, the sum of their products, each rounded to the
      result's type.
    """
    split = None if split is None else split.here()
    if split is None:
        return dispatch.packed_matmul(
            x, planes, scales, zeros, channel_scale, low_rank, layer=layer, **how
        )

    def run(x: Any, weight: Any, d: Any, factors: Any, layer: Any) -> jax.Array:
        planes, scales, zeros = weight
        y = dispatch.packed_matmul(x, planes, scales, zeros, d, factors, layer=layer, **how)
        return _summed(y, split)

    out = rows_spec(x.shape, split, split.columns or None)
    weight = (tuple(planes), scales, zeros)
    return _mapped(run, split, x, weight, channel_scale, low_rank, layer, out)


def _packed_specs(split: Split, how: dict[str, Any]) -> Any:
    """Specs of what the quantizers return, of one layer."""
    per_group = P(split.rows or None, split.columns or None)
    kind = how.get("scales", "float")
    of_columns = None if kind == "float" else P(split.columns or None)
    return per_group, put_together(per_group, of_columns, kind), per_group


def quantize_pack(
    w: jax.Array,
    channel_scale: jax.Array | None = None,
    importance: jax.Array | None = None,
    low_rank: LowRank | None = None,
    *,
    split: Split | None = None,
    layer: jax.Array | int | None = None,
    **how: Any,
) -> Packed:
    """See `dispatch.quantize_pack`.

    Args:
      w: See there, as all the others.
      channel_scale: See there.
      importance: See there.
      low_rank: See there.
      split: See `packed_matmul`.
      layer: See there.
      **how: See there.

    Returns:
      See there; each block of rows is packed by itself, the codes are those of the whole weight.
    """
    split = None if split is None else split.here()
    if split is None:
        return dispatch.quantize_pack(w, channel_scale, importance, low_rank, layer=layer, **how)

    def run(_: None, w: Any, channel: Any, factors: Any, layer: Any) -> Packed:
        d, importance = channel
        return dispatch.quantize_pack(
            w, d, importance, factors, layer=layer, row_axes=split.rows, **how
        )

    channel, out = (channel_scale, importance), _packed_specs(split, how)
    return _mapped(run, split, None, w, channel, low_rank, layer, out)


def prefill_quantize(
    x: jax.Array,
    w: jax.Array,
    channel_scale: jax.Array | None = None,
    importance: jax.Array | None = None,
    low_rank: LowRank | None = None,
    *,
    split: Split | None = None,
    layer: jax.Array | int | None = None,
    **how: Any,
) -> tuple[jax.Array, Packed]:
    """See `dispatch.prefill_quantize`.

    Args:
      x: See there, as all the others.
      w: See there.
      channel_scale: See there.
      importance: See there.
      low_rank: See there.
      split: See `packed_matmul`.
      layer: See there.
      **how: See there.

    Returns:
      See there, and `quantize_pack` and `packed_matmul`.
    """
    split = None if split is None else split.here()
    if split is None:
        return dispatch.prefill_quantize(
            x, w, channel_scale, importance, low_rank, layer=layer, **how
        )

    def run(x: Any, w: Any, channel: Any, factors: Any, layer: Any) -> tuple[jax.Array, Packed]:
        d, importance = channel
        y, packed = dispatch.prefill_quantize(
            x, w, d, importance, factors, layer=layer, row_axes=split.rows, **how
        )
        return _summed(y, split), packed

    channel = (channel_scale, importance)
    out = (rows_spec(x.shape, split, split.columns or None), _packed_specs(split, how))
    return _mapped(run, split, x, w, channel, low_rank, layer, out)


def _blocks(a: jax.Array, row_blocks: int) -> jax.Array:
    """``[..., k, n]`` as ``[..., row_blocks, k / row_blocks, n]``."""
    *lead, k, n = a.shape
    return a.reshape(*lead, row_blocks, k // row_blocks, n)


def pack(codes: jax.Array, *, bits: int, row_blocks: int = 1) -> tuple[jax.Array, ...]:
    """See `layout.pack`.

    Args:
      codes: See there.
      bits: See there.
      row_blocks: How many equal runs of rows are packed, each by itself.

    Returns:
      See there; the planes of each block one after another.
    """
    if row_blocks == 1:
        return layout.pack(codes, bits=bits)
    planes = layout.pack(_blocks(codes, row_blocks), bits=bits)
    return tuple(p.reshape(*codes.shape[:-2], -1, codes.shape[-1]) for p in planes)


def dequantize(
    planes: Sequence[jax.Array],
    scales: Scales,
    zeros: jax.Array | None,
    *,
    row_blocks: int = 1,
    **how: Any,
) -> jax.Array:
    """See `reference.dequantize`.

    Args:
      planes: See there, as all the others; of each block of rows by itself.
      scales: See there.
      zeros: See there.
      row_blocks: See `pack`.
      **how: See there.

    Returns:
      See there.
    """
    if row_blocks == 1:
        return reference.dequantize(planes, scales, zeros, **how)
    per_group, of_columns = taken_apart(scales)
    of_columns = None if of_columns is None else of_columns[..., None, :]
    weight = reference.dequantize(
        [_blocks(p, row_blocks) for p in planes],
        put_together(_blocks(per_group, row_blocks), of_columns, kind_of(scales)),
        None if zeros is None else _blocks(zeros, row_blocks),
        **how,
    )
    return weight.reshape(*weight.shape[:-3], -1, weight.shape[-1])


def by_columns(
    run: Callable[..., Any], weights: tuple[jax.Array, ...], *others: Any,
    splits: Sequence[Split | None],
) -> Any:  # fmt: skip
    """``run(weights, *others)`` for a computation in which the columns of a weight do not meet.

    On a mesh every device has columns of its own: a weight in blocks of rows is dealt out anew,
    over the same devices.

    Args:
      run: Returns arrays ``[.., n]`` for each weight.
      weights: ``[k, n]`` each.
      *others: Trees of arrays that every device needs whole.
      splits: Of each weight, see `packed_matmul`.

    Returns:
      What `run` does.
    """
    here = [None if split is None else split.here() for split in splits]
    if None in here:
        return run(weights, *others)
    dealt = tuple(P(None, (s.columns or s.rows) or None) for s in here if s is not None)
    specs = (dealt, *(P() for _ in others))
    mapped = jax.shard_map(
        run, mesh=next(s.mesh for s in here if s is not None), in_specs=specs, out_specs=dealt,
        check_vma=False,
    )  # fmt: skip
    return mapped(weights, *others)

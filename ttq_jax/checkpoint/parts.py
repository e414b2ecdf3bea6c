"""The parts of an array that this process's devices hold, as memory of the host to be filled."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ttq_jax.partition import param_specs
from ttq_jax.types import Params

_ALIGNMENT = 64

Index = tuple[tuple[int, int], ...]
"""A box of an array: per axis the first index, and the one after the last."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """An array that is filled in the host's memory, and then lies on its devices.

    Attributes:
      shape: of the whole array.
      sharding: where it will lie; None for JAX's default device.
      boxes: its parts, each once; one box, the whole array, without a sharding.
    """

    shape: tuple[int, ...]
    sharding: NamedSharding | None
    boxes: dict[Index, np.ndarray]

    def on_devices(self) -> jax.Array:
        """The filled array."""
        if self.sharding is None:
            (only,) = self.boxes.values()
            return jax.device_put(only, may_alias=True)
        part = lambda index: self.boxes[_box(index, self.shape)]  # noqa: E731
        return jax.make_array_from_callback(self.shape, self.sharding, part)


def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialized memory that JAX can adopt on a CPU without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def parts_of(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None) -> Parts:
    """Room for an array, of a sharded one only for what this process holds.

    Args:
      shape: of the whole array.
      dtype: of the array.
      sharding: where it will lie; None for JAX's default device.

    Returns:
      Parts to fill.
    """
    boxes = {tuple((0, n) for n in shape)}
    if sharding is not None:
        found = sharding.addressable_devices_indices_map(shape).values()
        boxes = {_box(index, shape) for index in found if index is not None}
    room = {box: allocate(tuple(stop - start for start, stop in box), dtype) for box in boxes}
    return Parts(shape, sharding, room)


def placed(tree: Any, specs: Any, mesh: Mesh | None) -> Any:
    """Arrays of the host's memory on their devices.

    Args:
      tree: of arrays, the same in every process.
      specs: the same tree of specs.
      mesh: None for JAX's default device.

    Returns:
      The tree.
    """
    if mesh is None:
        return jax.tree.map(lambda a: jax.device_put(a, may_alias=True), tree)

    def one(a: np.ndarray, spec: PartitionSpec) -> jax.Array:
        return jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), lambda i: a[i])

    return jax.tree.map(one, tree, specs)


def shardings(shapes: Params, mesh: Mesh | None) -> Any:
    """Where the arrays of a model lie.

    Args:
      shapes: its tree of shapes.
      mesh: None for JAX's default device.

    Returns:
      {path: sharding or None}, a path being the keys from the root.
    """
    specs = jax.tree.leaves_with_path(param_specs(shapes))
    return {
        tuple(str(k.key) for k in path): None if mesh is None else NamedSharding(mesh, spec)
        for path, spec in specs
    }

"""Where a loaded array goes: to the default device, to a mesh, or into the host's memory.

Of an array on a mesh, a process reads the parts that its own devices hold. In the host's memory are
the kernels of the blocks, pinned, so that a device fetches them without a copy by the processor; on
a mesh each device's parts are in the memory of its own host. A program reads one layer of them at a
time (`types.Stacked`). Norms, biases and the vocabulary's tables are read at every token and stay
on the device.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.errors import shown
from ttq_jax.partition import param_specs
from ttq_jax.types import Params

Memory = Literal["device", "host"]
PINNED = "pinned_host"

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
    sharding: Sharding | None
    boxes: dict[Index, np.ndarray]

    def on_devices(self) -> jax.Array:
        """The filled array."""
        if self.sharding is None or isinstance(self.sharding, SingleDeviceSharding):
            (only,) = self.boxes.values()
            return jax.device_put(only, self.sharding, may_alias=True)
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


def parts_of(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None) -> Parts:
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


def streams(path: tuple[str, ...]) -> bool:
    """Whether an array of the parameter tree is one that the host's memory can hold."""
    return path[0] == "layers" and path[-1] == "kernel"


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A leaf's path, as `jax.tree_util` gives it, in the names that `streams` reads.

    Args:
      path: from the root of the parameter tree.

    Returns:
      A name for each key; "" for those of no dictionary, as inside a packed weight.
    """
    return tuple(str(getattr(key, "key", "")) for key in path)


def check_memory(memory: Any) -> None:
    """Refuses what `load`'s `dense_memory` cannot be.

    Args:
      memory: "device" or "host".

    Raises:
      CheckpointError: another word.
    """
    if memory not in get_args(Memory):
        raise CheckpointError(f"dense_memory: expected device or host, got {shown(memory)}")


def _reads_host(device: jax.Device) -> None:
    """Refuses a device that cannot read the host's memory.

    Raises:
      CheckpointError: it cannot.
    """
    kinds = [memory.kind for memory in device.addressable_memories()]
    if PINNED not in kinds:
        raise CheckpointError(
            f"dense_memory: expected a device that reads the host's memory ({PINNED}), but "
            f"{device.device_kind} has {', '.join(kinds)} alone; load without dense_memory"
        )


def pinned_memory() -> Sharding:
    """The host's memory beside JAX's default device.

    Returns:
      Where it is.

    Raises:
      CheckpointError: that device cannot read it.
    """
    there = jax.device_put(np.float32(0)).sharding
    (device,) = there.device_set
    _reads_host(device)
    return there.with_memory_kind(PINNED)


def shardings(shapes: Params, mesh: Mesh | None, memory: Memory = "device") -> Any:
    """Where the arrays of a model lie.

    Args:
      shapes: its tree of shapes.
      mesh: None for JAX's default device.
      memory: of the blocks' kernels; on a mesh "host" is, for each device, that of its own host.

    Returns:
      {path: sharding or None}, a path being the keys from the root.

    Raises:
      CheckpointError: the device cannot read the host's memory.
    """
    pinned = None
    if memory == "host" and mesh is None:
        pinned = pinned_memory()
    elif memory == "host" and mesh is not None:
        _reads_host(mesh.local_devices[0])
    specs = jax.tree.leaves_with_path(param_specs(shapes))

    def where(path: tuple[str, ...], spec: PartitionSpec) -> Sharding | None:
        if mesh is None:
            return pinned if streams(path) else None
        kind = PINNED if memory == "host" and streams(path) else None
        return NamedSharding(mesh, spec, memory_kind=kind)

    keys = [(names_of(path), spec) for path, spec in specs]
    return {path: where(path, spec) for path, spec in keys}

"""Where a loaded array goes: to the default device, or into the host's memory.

In the host's memory are the kernels of the blocks, pinned, so that a device fetches them without a
copy by the processor. A program reads one layer of them at a time (`types.Stacked`). Norms, biases
and the vocabulary's tables are read at every token and stay on the device.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import numpy as np

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.errors import shown

# (path in the tree, the array or a packed table's arrays) -> the same, placed
Place = Callable[[tuple[str, ...], Any], Any]
Memory = Literal["device", "host"]
PINNED = "pinned_host"


def streams(path: tuple[str, ...]) -> bool:
    """Whether an array of the parameter tree is one that the host's memory can hold."""
    return path[0] == "layers" and path[-1] == "kernel"


def on_default_device(path: tuple[str, ...], array: Any) -> Any:
    """Places everything on JAX's default device."""
    del path
    return jax.device_put(array, may_alias=True)


def placed_in(memory: Memory) -> Place:
    """How arrays are placed for `load`'s `dense_memory`.

    Args:
      memory: "device" or "host", see `load`.

    Returns:
      What `assemble` takes.

    Raises:
      CheckpointError: it is another word, or the default device cannot read the host's memory.
    """
    if memory not in get_args(Memory):
        raise CheckpointError(f"dense_memory: expected device or host, got {shown(memory)}")
    if memory == "device":
        return on_default_device
    there = jax.device_put(np.float32(0)).sharding
    (device,) = there.device_set
    kinds = [memory.kind for memory in device.addressable_memories()]
    if PINNED not in kinds:
        raise CheckpointError(
            f"dense_memory: expected a device that reads the host's memory ({PINNED}), but "
            f"{device.device_kind} has {', '.join(kinds)} alone; load without dense_memory"
        )
    pinned = there.with_memory_kind(PINNED)

    def place(path: tuple[str, ...], array: Any) -> Any:
        if not streams(path):
            return on_default_device(path, array)
        return jax.device_put(array, pinned, may_alias=True)

    return place

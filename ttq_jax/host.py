"""Arrays in the host's memory: a program fetches one layer of a stack when it reads it.

XLA gives every array a memory space; an operation on two of them is an error, so nothing here can
be forgotten silently. A fetch is asynchronous: the transfers of a layer begin together, and each is
awaited by the first operation that reads it.
"""

from typing import Any

import jax
import jax.numpy as jnp


def on_host(stack: Any) -> bool:
    """Whether an array is in the host's memory: one layer at a time is fetched to be read."""
    return jax.typeof(stack).memory_space == jax.memory.Space.Host


def fetched(array: jax.Array) -> jax.Array:
    """The array in the device's memory; itself if it is there."""
    return jax.device_put(array, jax.memory.Space.Device) if on_host(array) else array


def layer_of(stack: jax.Array, layer: Any) -> jax.Array:
    """One layer of a stack, in the device's memory."""
    one = jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False, allow_negative_indices=False)
    return fetched(one)


def on_device(stacks: dict[str, jax.Array], layer: Any) -> tuple[dict[str, jax.Array], Any]:
    """Stacks that a kernel on the device can index.

    Args:
      stacks: by projection, [L, …].
      layer: which layer is read.

    Returns:
      The same; of stacks in the host's memory the layer alone, [1, …], and its index there.
    """
    if not any(map(on_host, stacks.values())):
        return stacks, layer
    return {name: layer_of(stack, layer)[None] for name, stack in stacks.items()}, jnp.zeros(
        (), jnp.int32
    )

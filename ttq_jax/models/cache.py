"""The KV cache: made empty, then written slot by slot."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from ttq_jax.config import ModelConfig
from ttq_jax.partition import DATA, with_batch
from ttq_jax.types import Cache, MixedLinear, Params, QuantizedLinear

# A plain 0 beside an int32 index would be an int64 where 64-bit types are enabled.
_ZERO = np.int32(0)


def activation_dtype(params: Params) -> Any:
    """The dtype of a model's activations: that of everything in its tree that is not packed."""
    is_packed = lambda leaf: isinstance(leaf, QuantizedLinear | MixedLinear)  # noqa: E731
    leaves = jax.tree.leaves(params, is_leaf=is_packed)
    return next(leaf.dtype for leaf in leaves if not is_packed(leaf))


def empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike) -> Cache:
    """An empty cache.

    Args:
      config: the model's.
      batch: B.
      capacity: S, slots per row.
      dtype: of keys and values.

    Returns:
      A cache of zeros, all slots invalid.
    """
    shape = (config.n_layers, batch, capacity, config.n_kv_heads, config.head_dim)
    axes = (None, DATA, None, "kv", None)
    return Cache(
        k=with_batch(jnp.zeros(shape, dtype), axes),
        v=with_batch(jnp.zeros(shape, dtype), axes),
        positions=jnp.zeros((batch, capacity), jnp.int32),
        valid=jnp.zeros((batch, capacity), bool),
        used=jnp.zeros((), jnp.int32),
    )


def map_rows(change: Callable[[Array], Array], cache: Cache) -> Cache:
    """The cache with its rows changed.

    Args:
      change: takes and returns an array with the rows first.
      cache: of B rows.

    Returns:
      A cache of other rows.
    """
    stacked = jax.vmap(change)
    return Cache(
        k=stacked(cache.k),
        v=stacked(cache.v),
        positions=change(cache.positions),
        valid=change(cache.valid),
        used=change(cache.used) if cache.used.ndim else cache.used,
    )


def next_positions(cache: Cache, valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions of tokens that follow those in the cache.

    Args:
      cache: what was read so far.
      valid: which of the new tokens are real.

    Returns:
      Each real token's position in its sequence; padding gets some position >= 0.
    """
    before = jnp.sum(cache.valid, axis=1, keepdims=True, dtype=jnp.int32)
    return jnp.maximum(before + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)


def register(cache: Cache, positions: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> Cache:
    """Marks the next T slots as holding these tokens; their keys and values follow per layer."""

    def put(old: Array, new: Array) -> Array:
        if not cache.used.ndim:
            return jax.lax.dynamic_update_slice_in_dim(old, new, cache.used, axis=1)
        return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(
            old, new, cache.used, 0
        )

    return dataclasses.replace(
        cache,
        positions=put(cache.positions, positions),
        valid=put(cache.valid, valid),
        used=cache.used + positions.shape[1],
    )


def write_layer(
    stack: Array, layer: Int[Array, ""], slot: Int[Array, ""] | Int[Array, " B"], new: Array
) -> Array:
    """Writes one layer's new keys (or values) [B, T, K, H] into the stack [L, B, S, K, H]."""

    def write(stack: Array, new: Array, slot: Array) -> Array:
        start = (layer, _ZERO, slot, _ZERO, _ZERO)
        return jax.lax.dynamic_update_slice(stack, new[None].astype(stack.dtype), start)

    if not slot.ndim:
        return write(stack, new, slot)
    if len(slot) == 1:  # a slice is written in place everywhere, what a map makes of it is not
        return write(stack, new, slot[0])
    row = lambda stack, new, slot: write(stack[:, None], new[None], slot)[:, 0]  # noqa: E731
    return jax.vmap(row, (1, 0, 0), 1)(stack, new, slot)


def read_layer(
    stack: Array, layer: Int[Array, ""], slots: int, first: Int[Array, ""] | np.int32 = _ZERO
) -> Array:
    """Some slots of one layer, the first ones or those from `first` on: [B, slots, K, H]."""
    _, batch, _, heads, dim = stack.shape
    start = (layer, _ZERO, first, _ZERO, _ZERO)
    return jax.lax.dynamic_slice(stack, start, (1, batch, slots, heads, dim))[0]

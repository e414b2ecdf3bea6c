"""The key-value cache: made empty, then written slot by slot."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from ttq_jax.config import ModelConfig
from ttq_jax.types import Cache


def empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike) -> Cache:
    """A cache that nothing was written to.

    Args:
      config: the model's.
      batch: B.
      capacity: S, slots per row.
      dtype: of keys and values.

    Returns:
      A cache of zeros, all slots invalid.
    """
    shape = (config.n_layers, batch, capacity, config.n_kv_heads, config.head_dim)
    return Cache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        positions=jnp.zeros((batch, capacity), jnp.int32),
        valid=jnp.zeros((batch, capacity), bool),
        used=jnp.zeros((), jnp.int32),
    )


def next_positions(cache: Cache, valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions of tokens that follow what the cache holds.

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
    at = (0, cache.used)
    return dataclasses.replace(
        cache,
        positions=jax.lax.dynamic_update_slice(cache.positions, positions, at),
        valid=jax.lax.dynamic_update_slice(cache.valid, valid, at),
        used=cache.used + positions.shape[1],
    )


def write_layer(stack: Array, layer: Int[Array, ""], slot: Int[Array, ""], new: Array) -> Array:
    """Writes one layer's new keys (or values) [B, T, K, H] into the stack [L, B, S, K, H]."""
    return jax.lax.dynamic_update_slice(
        stack, new[None].astype(stack.dtype), (layer, 0, slot, 0, 0)
    )


def read_layer(stack: Array, layer: Int[Array, ""], slots: int) -> Array:
    """The first `slots` slots of one layer: [B, slots, K, H]."""
    _, batch, _, heads, dim = stack.shape
    return jax.lax.dynamic_slice(stack, (layer, 0, 0, 0, 0), (1, batch, slots, heads, dim))[0]

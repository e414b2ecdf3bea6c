"""The KV cache: made empty, then written slot by slot."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.errors import shown
from ttq_jax.partition import DATA, with_batch
from ttq_jax.types import Cache, EightBits, MixedLinear, Params, QuantizedLinear

# A plain 0 beside an int32 index would be an int64 where 64-bit types are enabled.
_ZERO = np.int32(0)

Stack = Array | EightBits
"""Keys or values of all layers, [L, B, S, K, H]."""

DTYPES = ("float32", "bfloat16", "int8")
"""What a user may have keys and values stored as."""


def activation_dtype(params: Params) -> Any:
    """The dtype of a model's activations: that of everything in its tree that is not packed."""
    is_packed = lambda leaf: isinstance(leaf, QuantizedLinear | MixedLinear)  # noqa: E731
    leaves = jax.tree.leaves(params, is_leaf=is_packed)
    return next(leaf.dtype for leaf in leaves if not is_packed(leaf))


def check_dtype(dtype: str | None) -> None:
    """Refuses what keys and values cannot be stored as.

    Args:
      dtype: a name; None for that of the activations.

    Raises:
      ConfigError: not one of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"cache_dtype: expected one of {', '.join(DTYPES)}, or None for the activations' own, "
            f"got {shown(dtype)}"
        )


def empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike) -> Cache:
    """An empty cache.

    Args:
      config: the model's.
      batch: B.
      capacity: S, slots per row.
      dtype: of keys and values; int8 keeps a scale for each head of each token beside them.

    Returns:
      A cache of zeros, all slots invalid.
    """
    heads = (config.n_layers, batch, capacity, config.n_kv_heads)
    axes = (None, DATA, None, "kv", None)

    def empty() -> Stack:
        zeros = with_batch(jnp.zeros((*heads, config.head_dim), dtype), axes)
        if zeros.dtype != jnp.int8:
            return zeros
        return EightBits(zeros, with_batch(jnp.zeros(heads, jnp.float32), axes[:-1]))

    return Cache(
        k=empty(),
        v=empty(),
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
        k=jax.tree.map(stacked, cache.k),
        v=jax.tree.map(stacked, cache.v),
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
    stack: Stack, layer: Int[Array, ""], slot: Int[Array, ""] | Int[Array, " B"], new: Array
) -> Stack:
    """Writes one layer's new keys (or values) [B, T, K, H] into the stack [L, B, S, K, H].

    Args:
      stack: of all layers.
      layer: which one.
      slot: the first one that is written, the same for every row, or of each.
      new: rounded as the stack stores them.

    Returns:
      The new stack.
    """

    def write(stack: Array, new: Array, slot: Array) -> Array:
        start: list[Any] = [layer, _ZERO, slot, *[_ZERO] * (stack.ndim - 3)]
        return jax.lax.dynamic_update_slice(stack, new[None].astype(stack.dtype), start)

    def write_all(stack: Array, new: Array) -> Array:
        if not slot.ndim:
            return write(stack, new, slot)
        if len(slot) == 1:  # a slice is written in place everywhere, what a map makes of it is not
            return write(stack, new, slot[0])
        row = lambda stack, new, slot: write(stack[:, None], new[None], slot)[:, 0]  # noqa: E731
        return jax.vmap(row, (1, 0, 0), 1)(stack, new, slot)

    return jax.tree.map(write_all, stack, _coded(new) if isinstance(stack, EightBits) else new)


def _coded(new: Float[Array, "*batch H"]) -> EightBits:
    """Rounded to the nearest of 255 multiples of a scale, the largest of which is exact."""
    new = new.astype(jnp.float32)
    scales = jnp.max(jnp.abs(new), axis=-1) / 127
    by = jnp.where(scales > 0, scales, 1.0)[..., None]
    return EightBits(jnp.round(new / by).astype(jnp.int8), scales)


def read_layer(
    stack: Stack, layer: Int[Array, ""], slots: int, first: Int[Array, ""] | np.int32 = _ZERO,
    dtype: DTypeLike | None = None,
) -> Array:  # fmt: skip
    """Some slots of one layer: [B, slots, K, H].

    Args:
      stack: of all layers.
      layer: which one.
      slots: how many.
      first: the first of them.
      dtype: of the result; None for that of a stack that is an array.

    Returns:
      Keys or values as they are stored.
    """

    def read(stack: Array) -> Array:
        start = (layer, _ZERO, first, *[_ZERO] * (stack.ndim - 3))
        sizes = (1, stack.shape[1], slots, *stack.shape[3:])
        return jax.lax.dynamic_slice(stack, start, sizes)[0]

    if isinstance(stack, EightBits):
        codes, scales = read(stack.codes), read(stack.scales)
        return (codes.astype(jnp.float32) * scales[..., None]).astype(dtype)
    return read(stack).astype(dtype or stack.dtype)

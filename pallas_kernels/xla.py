"""The portable implementation, plain XLA, tuned for CPUs: what runs where no kernel serves.

Arguments are checked and normalised by `pallas_kernels.dispatch`: activations are divided by the
channel scale already, and weights have a leading layer axis with the layer's number beside them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import reference
from pallas_kernels.reference import Packed


def _at(stacks: Any, layer: jax.Array) -> Any:
    """One layer of every stack."""
    return jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(
            a, layer, keepdims=False, allow_negative_indices=False
        ),
        stacks,
    )


def packed_matmul(
    x: jax.Array,
    planes: tuple[jax.Array, ...],
    scales: jax.Array,
    zeros: jax.Array | None,
    layer: jax.Array,
    *,
    bits: int,
    group_size: int,
) -> jax.Array:
    """``y = x @ (s (q - z))``, accumulated in float32.

    Args:
      x: ``[m, k]``.
      planes: ``uint8[L, k * width // 8, n]`` for each width in ``PLANES[bits]``.
      scales: ``[L, k // group_size, n]``.
      zeros: As scales, or uint8, or None.
      layer: ``int32[]``.
      bits: Width of a code.
      group_size: Rows that share a scale.

    Returns:
      ``y[m, n]`` in x's dtype.
    """
    weight = _at((planes, scales, zeros), layer)
    y = reference.packed_matmul(x, *weight, bits=bits, group_size=group_size)
    return y.astype(x.dtype)


dense_matmul = packed_matmul


def quantize_pack(
    w: jax.Array,
    channel_scale: jax.Array | None,
    importance: jax.Array | None,
    down: jax.Array | None,
    up: jax.Array | None,
    layer: jax.Array,
    *,
    bits: int,
    group_size: int,
    zero_point: str,
    store_dtype: jax.typing.DTypeLike,
    shrinks: tuple[float, ...] = (1.0,),
) -> Packed:
    """Rounds and packs one layer; see `reference.quantize_pack`.

    Args:
      w: ``[L, d_in, n]``.
      channel_scale: ``[d_in]`` or None.
      importance: ``[d_in]`` or None.
      down: ``[d_in, r]`` or None.
      up: ``[r, n]`` or None.
      layer: ``int32[]``.
      bits: Width of a code.
      group_size: Rows that share a scale.
      zero_point: One of `grid.ZERO_POINTS`.
      store_dtype: Of scales and float zero points.
      shrinks: Factors on a group's range to choose from.

    Returns:
      ``(planes, scales, zeros)`` of that layer.
    """
    low_rank = None if down is None or up is None else (down, up)
    return reference.quantize_pack(
        _at(w, layer), channel_scale, importance, low_rank, bits=bits, group_size=group_size,
        zero_point=zero_point, store_dtype=store_dtype, shrinks=shrinks,
    )  # fmt: skip


def prefill_quantize(
    x: jax.Array,
    w: jax.Array,
    channel_scale: jax.Array | None,
    importance: jax.Array | None,
    down: jax.Array | None,
    up: jax.Array | None,
    layer: jax.Array,
    *,
    bits: int,
    group_size: int,
    zero_point: str,
    store_dtype: jax.typing.DTypeLike,
    shrinks: tuple[float, ...] = (1.0,),
    quantized: bool = False,
) -> tuple[jax.Array, Packed]:
    """The prompt's product with one layer, and that layer packed.

    Args:
      x: ``[m, d_in]``; not divided by the channel scale.
      w: ``[L, d_in, n]``.
      channel_scale: See `quantize_pack`, as the arguments after it.
      importance: See `quantize_pack`.
      down: See `quantize_pack`.
      up: See `quantize_pack`.
      layer: See `quantize_pack`.
      bits: See `quantize_pack`.
      group_size: See `quantize_pack`.
      zero_point: See `quantize_pack`.
      store_dtype: See `quantize_pack`.
      shrinks: See `quantize_pack`.
      quantized: Multiply ``x / D`` with the codes that were just packed, instead of x with w; the
        low-rank part is left to the caller.

    Returns:
      ``(y[m, n] in x's dtype, (planes, scales, zeros))``.
    """
    packed = quantize_pack(
        w, channel_scale, importance, down, up, layer, bits=bits, group_size=group_size,
        zero_point=zero_point, store_dtype=store_dtype, shrinks=shrinks,
    )  # fmt: skip
    if quantized:
        y = reference.packed_matmul(x, *packed, channel_scale, bits=bits, group_size=group_size)
    else:
        weight = _at(w, layer).astype(x.dtype)
        y = jnp.matmul(x, weight, preferred_element_type=jnp.float32)
    return y.astype(x.dtype), packed

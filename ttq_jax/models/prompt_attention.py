"""Attention while a prompt is read from an empty cache, by a kernel that writes no scores down.

A prompt attends to itself alone. Its real tokens stand together, so that order among them is order
among slots: a causal mask by index and "padding sees padding only" say what `attention.attend` says
with positions. That is what JAX's splash attention computes on TPUs, block by block, and it leaves
out the blocks that nobody sees: half of them, and nearly all under a short sliding window.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.choice import Target, current_target
from ttq_jax.config import ModelConfig
from ttq_jax.models.attention import attend
from ttq_jax.models.layer_constants import windows
from ttq_jax.types import Cache

FROM = 1024
"""Prompts of so many tokens are worth the kernel; below, scores are small."""

_BLOCK = 1024
_BLOCK_COMPUTE = 512
_HEAD_DIMS = (64, 128, 256)


def refusal(length: int, head_dim: int, target: Target) -> str | None:
    """Why the kernel cannot serve a prompt there.

    Args:
      length: T, padded.
      head_dim: H.
      target: what the program is traced for.

    Returns:
      The reason; None if it can.
    """
    if target.platform != "tpu":
        return f"splash attention runs on TPUs, this is a {target.platform.upper()}"
    if jax.sharding.get_abstract_mesh().axis_names:
        return "a mesh cannot cut the kernel's call"
    if head_dim not in _HEAD_DIMS:
        return f"heads of {head_dim}; the kernel has {', '.join(map(str, _HEAD_DIMS))}"
    if length < FROM:
        return f"{length} tokens; from {FROM} on it is faster"
    if length % _BLOCK:
        return f"{length} tokens are no multiple of {_BLOCK}"
    return None


def attend_slots(
    config: ModelConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    cache: Cache,
    *,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    window: Int[Array, ""],
) -> Float[Array, "B T N H"]:
    """Attention of new tokens to the cache's first S slots, by the kernel where it serves.

    Args:
      config: the model's.
      q: rotated queries of the new tokens.
      k: rotated keys of the slots.
      v: values of the slots.
      cache: with the new tokens registered.
      positions: of the new tokens.
      valid: which of them are real.
      window: of this layer.

    Returns:
      One mixed value per query head.
    """
    slots = k.shape[1]
    how: dict[str, Any] = {
        "window": window, "scale": config.query_scale, "cap": config.attn_softcap
    }  # fmt: skip
    # Tokens that fill every slot follow none.
    if slots == q.shape[1] and serves(slots, config.head_dim):
        return attend_prompt(q, k, v, valid=valid, windows=windows(config), **how)
    return attend(
        q, k, v, q_positions=positions, k_positions=cache.positions[:, :slots],
        k_valid=cache.valid[:, :slots], **how,
    )  # fmt: skip


def serves(length: int, head_dim: int) -> bool:
    """Whether the kernel reads a prompt on the device that is traced for; see `refusal`."""
    return refusal(length, head_dim, current_target()) is None


def attend_prompt(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    valid: Bool[Array, "B T"],
    window: Int[Array, ""],
    windows: tuple[int, ...],
    scale: float,
    cap: float | None,
    block: int = _BLOCK,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`attend` of a prompt to itself.

    Args:
      q: rotated queries; N is a multiple of K.
      k: rotated keys.
      v: values.
      valid: which tokens are real; those of a row are contiguous.
      window: of this layer, one of `windows`.
      windows: of all layers.
      scale: factor on the scores.
      cap: soft cap on the scores, or None.
      block: queries, and keys, at a time; divides T.
      interpret: simulate the kernel, where there is no TPU.

    Returns:
      One mixed value per query head, in q's dtype; finite in the padding.
    """
    heads_first = partial(jnp.swapaxes, axis1=1, axis2=2)
    operands = heads_first(q * jnp.asarray(scale, q.dtype)), heads_first(k), heads_first(v)

    def by(size: int) -> Array:
        run = _kernel(q.shape[2], q.shape[1], size, cap, block, interpret)
        return jax.vmap(run)(*operands, valid.astype(jnp.int32))

    if len(windows) == 1:
        return heads_first(by(windows[0]))
    which = jax.lax.argmax(jnp.asarray(windows, window.dtype) == window, 0, jnp.int32)
    return heads_first(jax.lax.switch(which, [partial(by, size) for size in windows]))


def _kernel(
    heads: int, length: int, window: int, cap: float | None, block: int, interpret: bool
) -> Callable[..., Array]:
    """(q[N, T, H], k[K, T, H], v[K, T, H], segments[T]) -> [N, T, H]."""
    # Pallas is slow to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        LocalMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha_single_device,
    )

    shape = (length, length)
    mask = CausalMask(shape) if window >= length else LocalMask(shape, (window - 1, 0), 0)
    sizes = BlockSizes(block_q=block, block_kv=block, block_kv_compute=min(block, _BLOCK_COMPUTE))
    kernel = make_splash_mha_single_device(
        MultiHeadMask([mask] * heads), block_sizes=sizes, is_mqa=False,
        attn_logits_soft_cap=cap, interpret=interpret,
    )  # fmt: skip
    return lambda q, k, v, segments: kernel(q, k, v, segment_ids=SegmentIds(segments, segments))

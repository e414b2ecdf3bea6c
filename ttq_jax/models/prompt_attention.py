"""Attention while a prompt is read from an empty cache, by a kernel that writes no scores down.

A prompt attends to itself alone. Its real tokens stand together, so that order among them is order
among slots: a causal mask by index and "padding sees padding only" say what `attention.attend` says
with positions. That is what JAX's splash attention computes on TPUs, block by block, and it leaves
out the blocks that nobody sees: half of them, and nearly all under a short sliding window. On GPUs
it is JAX's attention in Triton, see `triton_attention`.

A prompt in parts attends to itself part by part: each to itself and to those before, and their
softmaxes are joined by their sums. The TPUs' kernel does either where no layer slides.

On a mesh every device calls the kernel for its own prompts and heads: no head needs another one, so
nothing is exchanged.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import mesh_sizes
from pallas_kernels.choice import Target, current_target
from ttq_jax.config import ModelConfig
from ttq_jax.models import triton_attention
from ttq_jax.models.attention import attend, attend_part, join_parts
from ttq_jax.models.layer_constants import windows
from ttq_jax.partition import DATA, SPLITS, count, on_several, shared

FROM = 1024
"""Prompts of so many tokens are worth the kernel; below, scores are small."""

_BLOCK = 1024
_BLOCK_COMPUTE = 512
_HEAD_DIMS = (64, 128, 256)


KERNELS = {"tpu": "splash", "gpu": "triton"}
"""Which kernel a platform has."""


def refusal(config: ModelConfig, length: int, dtype: DTypeLike, target: Target) -> str | None:
    """Why the platform's kernel cannot serve a prompt there.

    Args:
      config: the model's; its heads are dealt out over the mesh of the program.
      length: T, padded.
      dtype: of queries, keys and values.
      target: what the program is traced for.

    Returns:
      The reason; None if it can.
    """
    if target.platform not in KERNELS:
        return f"attention's kernels run on TPUs and GPUs, this is a {target.platform.upper()}"
    if length < FROM:
        return f"{length} tokens; from {FROM} on it is faster"
    for heads, name in ((config.n_heads, "q"), (config.n_kv_heads, "k")):
        if heads % (devices := count(SPLITS[name].columns)):
            return f"{heads} heads of {name}, which {devices} devices cannot share equally"
    if target.platform == "gpu":
        return triton_attention.refusal(config, length, dtype, target.chip)
    if config.head_dim not in _HEAD_DIMS:
        return f"heads of {config.head_dim}; the kernel has {', '.join(map(str, _HEAD_DIMS))}"
    if length % _BLOCK:
        return f"{length} tokens are no multiple of {_BLOCK}"
    return None


def attend_slots(
    config: ModelConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    k_positions: Int[Array, "B S"],
    k_valid: Bool[Array, "B S"],
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
      k_positions: of the slots, the new tokens' among them.
      k_valid: which slots may be seen.
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
    if slots == q.shape[1] and serves(config, slots, q.dtype):
        if current_target().platform == "gpu":
            run = partial(triton_attention.attend_prompt, scale=config.query_scale)
            return _by_device(run, q, k, v, valid)
        return attend_prompt(q, k, v, valid=valid, windows=windows(config), **how)
    return attend(q, k, v, q_positions=positions, k_positions=k_positions, k_valid=k_valid, **how)


def attend_chunk(
    config: ModelConfig,
    q: Float[Array, "B n N H"],
    stored: Callable[[Any, int], tuple[Array, Array, Array, Array]],
    first: Int[Array, ""],
    size: int,
    *,
    positions: Int[Array, "B n"],
    valid: Bool[Array, "B n"],
    window: Int[Array, ""],
) -> Float[Array, "B n N H"]:
    """Attention of a part of a prompt to itself and to the parts before it, one after another.

    What is computed at a time does not grow with the prompt; parts that no query can see, behind a
    sliding window or still to come, are left out.

    Args:
      config: the model's.
      q: rotated queries of the part.
      stored: (first slot, how many) -> k, v, k_positions and k_valid of `attend_slots`.
      first: the part's first slot; the prompt begins at slot 0.
      size: of the parts before it.
      positions: of the part's tokens.
      valid: which of them are real.
      window: of this layer.

    Returns:
      One mixed value per query head.
    """
    by_kernel = serves_parts(config, q.shape[1], size, q.dtype)
    how: dict[str, Any] = {"scale": config.query_scale, "cap": config.attn_softcap}

    def part(at: Any, count: int, own: bool = False) -> tuple[Array, Array]:
        k, v, k_positions, k_valid = stored(at, count)
        if by_kernel:
            return attend_part_by_kernel(q, k, v, valid=valid, k_valid=k_valid, own=own, **how)
        return attend_part(
            q, k, v, q_positions=positions, k_positions=k_positions, k_valid=k_valid,
            window=window, **how,
        )  # fmt: skip

    def further(i: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        return join_parts(so_far, part(i * size, size))

    oldest = jnp.maximum(first - window + 1, 0) // size
    mixed, _ = jax.lax.fori_loop(oldest, first // size, further, part(first, q.shape[1], own=True))
    return mixed.astype(q.dtype)


def serves(config: ModelConfig, length: int, dtype: DTypeLike) -> bool:
    """Whether a kernel reads a prompt on the device that is traced for; see `refusal`."""
    return refusal(config, length, dtype, current_target()) is None


def serves_parts(config: ModelConfig, length: int, size: int, dtype: DTypeLike) -> bool:
    """Whether a kernel reads a part of a prompt on the device that is traced for.

    Args:
      config: the model's; behind a sliding window a part may be seen in part, which the kernel
        would have to know before the program runs.
      length: tokens of the part.
      size: of the parts before it.
      dtype: of queries, keys and values.

    Returns:
      See `refusal`; never on a GPU.
    """
    if current_target().platform == "gpu" or windows(config) != (np.iinfo(np.int32).max,):
        return False
    return serves(config, length, dtype) and serves(config, size, dtype)


def attend_part_by_kernel(
    q: Float[Array, "B n N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    valid: Bool[Array, "B n"],
    k_valid: Bool[Array, "B S"],
    own: bool,
    scale: float,
    cap: float | None,
    block: int = _BLOCK,
    interpret: bool = False,
) -> tuple[Float[Array, "B n N H"], Float[Array, "B n N"]]:
    """`attention.attend_part` to one part of a prompt without sliding windows.

    Args:
      q: see `attend_prompt`.
      k: rotated keys of the part.
      v: its values.
      valid: which queries are real.
      k_valid: which keys are.
      own: whether the queries are the same part's; else a later one's, which see all of it.
      scale: see `attend_prompt`.
      cap: see there.
      block: queries, and keys, at a time; divides n and S.
      interpret: see `attend_prompt`.

    Returns:
      See `attend_part`.
    """
    heads_first = partial(jnp.swapaxes, axis1=1, axis2=2)
    far = np.iinfo(np.int32).max if own else None

    def mix(q: Array, k: Array, v: Array, valid: Array, k_valid: Array) -> tuple[Array, Array]:
        shape = q.shape[1], k.shape[1]
        run = _kernel(q.shape[2], shape, far, cap, block, interpret, sums=True)
        mixed, (sums,) = jax.vmap(run)(
            heads_first(q * jnp.asarray(scale, q.dtype)), heads_first(k), heads_first(v),
            valid.astype(jnp.int32), k_valid.astype(jnp.int32),
        )  # fmt: skip
        return heads_first(mixed).astype(jnp.float32), heads_first(sums)

    return _by_device(mix, q, k, v, valid, k_valid)


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
    length = q.shape[1]

    def mix(q: Array, k: Array, v: Array, valid: Array, window: Array) -> Array:
        operands = heads_first(q * jnp.asarray(scale, q.dtype)), heads_first(k), heads_first(v)
        segments = valid.astype(jnp.int32)

        def by(size: int) -> Array:
            run = _kernel(q.shape[2], (length, length), size, cap, block, interpret)
            return jax.vmap(run)(*operands, segments, segments)

        if len(windows) == 1:
            return heads_first(by(windows[0]))
        which = jax.lax.argmax(jnp.asarray(windows, window.dtype) == window, 0, jnp.int32)
        return heads_first(jax.lax.switch(which, [partial(by, size) for size in windows]))

    return _by_device(mix, q, k, v, valid, window)


def _by_device(run: Callable[..., Any], q: Array, k: Array, v: Array, *others: Array) -> Any:
    """``run(q, k, v, *others)`` [B, T, N, …], each device's own prompts and heads by themselves.

    A device has the query heads of its key-value heads, or some of those of one: `partition` deals
    them out so. The others are [B, …] or scalars.
    """
    if not on_several():
        return run(q, k, v, *others)
    sizes = mesh_sizes()
    data = sizes.get(DATA, 1)
    rows = DATA if data > 1 and q.shape[0] % data == 0 else None
    queries = P(rows, None, shared() or None)
    keys = P(rows, None, "kv" if sizes.get("kv", 1) > 1 else None)
    specs = (queries, keys, keys, *(P(rows) if other.ndim else P() for other in others))
    mapped = jax.shard_map(run, in_specs=specs, out_specs=queries, check_vma=False)
    return mapped(q, k, v, *others)


def _kernel(
    heads: int, shape: tuple[int, int], window: int | None, cap: float | None, block: int,
    interpret: bool, *, sums: bool = False,
) -> Callable[..., Any]:  # fmt: skip
    """(q[N, T, H], k[K, S, H], v[K, S, H], segments[T], segments[S]) -> [N, T, H].

    Without a window every query sees every key. With `sums`, the logarithms of the queries' sums of
    exponentials are returned beside it.
    """
    # Pallas is slow to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        FullMask,
        LocalMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha_single_device,
    )

    mask: Any
    if window is None:
        mask = FullMask(shape)
    elif window >= shape[0]:
        mask = CausalMask(shape)
    else:
        mask = LocalMask(shape, (window - 1, 0), 0)
    sizes = BlockSizes(block_q=block, block_kv=block, block_kv_compute=min(block, _BLOCK_COMPUTE))
    kernel = make_splash_mha_single_device(
        MultiHeadMask([mask] * heads), block_sizes=sizes, is_mqa=False,
        attn_logits_soft_cap=cap, interpret=interpret, save_residuals=sums,
    )  # fmt: skip

    def run(q: Array, k: Array, v: Array, of_q: Array, of_k: Array) -> Any:
        # Whatever JAX's switches say: the kernel's indices are int32, and Mosaic refuses more than
        # one pass over bfloat16.
        wide = q.dtype == jnp.float32
        passes = contextlib.nullcontext() if wide else jax.default_matmul_precision("default")
        with jax.enable_x64(False), passes:
            return kernel(q, k, v, segment_ids=SegmentIds(of_q, of_k))

    return run

"""Attention to a prompt on NVIDIA GPUs, by JAX's own flash attention in Triton.

It has the causal mask and segments, which padding needs, but no window, no soft cap, and no keys of
another part of the prompt; those stay with `attention.attend`.

cuDNN's attention (`jax.nn.dot_product_attention` with implementation="cudnn") is not used, since
nothing shows beforehand that it would work. cuDNN makes its kernel on the device, while the program
is compiled there: if it refuses, the program does not compile, and nothing can take over. For a GPU
that is not there XLA passes the call on unmade, even for a T4, which cuDNN does not serve. And JAX
asks the process's own device, not the one that is compiled for, which head widths are allowed.
Triton kernels are compiled to machine code for an absent GPU, and run simulated.
"""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from pallas_kernels.gpu import triton
from ttq_jax.config import ModelConfig
from ttq_jax.models.layer_constants import windows

# Queries and keys at a time. With heads of 128 they fit the shared memory of every GPU from
# compute capability 8.0 on; which are fastest was not measured.
BLOCKS = (128, 64)
_WARPS = 8
_HEAD_DIMS = (64, 80, 96, 128)
_DTYPES = ("bfloat16", "float16")


def refusal(config: ModelConfig, length: int, dtype: DTypeLike, chip: str | None) -> str | None:
    """Why the kernel cannot serve a prompt there.

    Args:
      config: the model's.
      length: T, padded.
      dtype: of queries, keys and values.
      chip: the GPU's short name, None if unknown.

    Returns:
      The reason; None if it can.
    """
    if why := triton.refusal(chip):
        return why
    if _attention() is None:
        return f"jax {jax.__version__} has no attention in Triton, jax 0.10.2 to 0.12 have it"
    if jnp.dtype(dtype).name not in _DTYPES:
        return f"{jnp.dtype(dtype).name} products, which the kernel would round to TF32"
    if config.head_dim not in _HEAD_DIMS:
        return f"heads of {config.head_dim}; the kernel has {', '.join(map(str, _HEAD_DIMS))}"
    if config.attn_softcap is not None:
        return "scores with a soft cap, which the kernel does not have"
    if (window := min(windows(config))) < length:
        return f"a sliding window of {window} tokens, which the kernel does not have"
    if length % max(BLOCKS):
        return f"{length} tokens are no multiple of {max(BLOCKS)}"
    return None


def attend_prompt(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    valid: Bool[Array, "B T"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`attention.attend` of a prompt to itself, without a window and a cap.

    Args:
      q: rotated queries; N is a multiple of K.
      k: rotated keys.
      v: values.
      valid: which tokens are real; those of a row are contiguous.
      scale: factor on the scores.
      interpret: simulate the kernel, where there is no GPU.

    Returns:
      One mixed value per query head, in q's dtype; finite in the padding.
    """
    kernel = _attention()
    run = partial(
        kernel.mha, sm_scale=scale, causal=True, num_warps=_WARPS, interpret=interpret,
        block_sizes=kernel.BlockSizes(block_q=BLOCKS[0], block_k=BLOCKS[1]),
    )  # fmt: skip
    # A map over the queries of a group, so that keys and values are not copied for each of them.
    all_of = jax.vmap(run, (3, None, None, None), 3)
    batch, length, heads, width = q.shape
    groups = q.reshape(batch, length, k.shape[2], heads // k.shape[2], width)
    call = all_of if interpret else triton.quietly(all_of)
    # In 32 bits, whatever `jax_enable_x64` says: the kernel's indices are int32.
    with jax.enable_x64(False):
        mixed = call(groups, k, v, valid.astype(jnp.int32))
    return mixed.reshape(q.shape)


def _attention() -> Any:
    """JAX's module; None on a JAX without it."""
    try:
        with warnings.catch_warnings():
            # jax 0.12 names another package in its place, and keeps it.
            warnings.simplefilter("ignore", DeprecationWarning)
            from jax.experimental.pallas.ops.gpu import attention
    except ImportError:
        return None
    return attention

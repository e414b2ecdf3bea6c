"""Grouped-query attention over explicit positions.

Masks come from positions and validity, never from indices, so that left padding, right padding,
a cache with holes and a sliding window are the same few lines:

    keys        a a a . . b          . = padding, b = first generated token
    positions   0 1 2 - - 3
    query b     x x x     x          sees a real key at most at its own position,
                                     and at most `window` - 1 tokens back
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ttq_jax.models.layers import softcap

# Long prompts are attended to this many queries at a time, so that their scores stay in cache.
QUERY_BLOCK = 128


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    k_valid: Bool[Array, "B S"],
    window: Int[Array, ""],
    scale: float,
    cap: float | None,
) -> Float[Array, "B T N H"]:
    """Softmax attention; scores and sums in float32.

    Args:
      q: rotated queries; N is a multiple of K.
      k: rotated keys.
      v: values.
      q_positions: position of each query in its sequence.
      k_positions: position of each key in its sequence.
      k_valid: False for keys that no query may see.
      window: a query sees keys fewer than this many tokens back.
      scale: factor on the scores.
      cap: soft cap on the scores, or None.

    Returns:
      One mixed value per query head, in q's dtype. A query that may see no key (padding) returns
      some finite mixture.
    """
    batch, length, n_heads, head_dim = q.shape
    if length > QUERY_BLOCK and length % QUERY_BLOCK == 0:

        def block(args: tuple[Array, Array]) -> Array:
            return attend(
                args[0], k, v, q_positions=args[1], k_positions=k_positions, k_valid=k_valid,
                window=window, scale=scale, cap=cap,
            )  # fmt: skip

        def split(x: Array) -> Array:
            return jnp.moveaxis(x.reshape(batch, -1, QUERY_BLOCK, *x.shape[2:]), 1, 0)

        mixed = jax.lax.map(block, (split(q), split(q_positions)))
        return jnp.moveaxis(mixed, 0, 1).reshape(q.shape)
    n_kv = k.shape[2]
    q = q.reshape(batch, length, n_kv, n_heads // n_kv, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = softcap(scores * scale, cap)
    back = q_positions[:, :, None] - k_positions[:, None, :]
    seen = k_valid[:, None, :] & (back >= 0) & (back < window)
    # The lowest finite number, not -inf: a padding query sees no key, and its softmax must stay
    # finite or its NaN would reach real queries as 0 · NaN in the next layer.
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", probs, v, preferred_element_type=jnp.float32)
    return mixed.reshape(batch, length, n_heads, head_dim).astype(q.dtype)

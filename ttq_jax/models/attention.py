"""Grouped-query attention over explicit positions.

Masks come from positions and validity, never from indices, so that left padding, right padding,
a cache with holes and a sliding window are the same few lines:

    keys        a a a . . b          . = padding, b = first generated token
    positions   0 1 2 - - 3
    query b     x x x     x          sees a real key at most at its own position,
                                     and at most `window` - 1 tokens back
"""

from collections.abc import Callable
from typing import Any

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

    def block(q: Array, positions: Array) -> Array:
        mixed, _ = _attend(
            q, k, v, q_positions=positions, k_positions=k_positions, k_valid=k_valid,
            window=window, scale=scale, cap=cap,
        )  # fmt: skip
        return mixed.astype(q.dtype)

    return _in_blocks(block, q, q_positions)


def attend_part(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_positions: Int[Array, "B T"],
    **rest: Any,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`attend` to some of the keys, to be joined with others by `join_parts`.

    Args:
      q: see `attend`.
      k: see there.
      v: see there.
      q_positions: see there.
      **rest: as of `attend`.

    Returns:
      The mixed values in float32, and the logarithm of each query's sum of exponentials.
    """

    def block(q: Array, positions: Array) -> tuple[Array, Array]:
        return _attend(q, k, v, q_positions=positions, **rest)

    return _in_blocks(block, q, q_positions)


def join_parts(
    one: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]],
    other: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """What `attend_part` would return for the keys of both together.

    Args:
      one: of some keys.
      other: of other keys.

    Returns:
      The same, of all.
    """
    (x, p), (y, q) = one, other
    # The larger is finite even where no key was seen, so that no infinity meets another.
    top = jnp.maximum(p, q)
    u, w = jnp.exp(p - top), jnp.exp(q - top)
    total = u + w
    return x * (u / total)[..., None] + y * (w / total)[..., None], top + jnp.log(total)


def _in_blocks(run: Callable[[Array, Array], Any], q: Array, positions: Array) -> Any:
    """What `run` makes of queries [B, T, …] and their positions, a block of them at a time."""
    batch, length = positions.shape
    if length <= QUERY_BLOCK or length % QUERY_BLOCK:
        return run(q, positions)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, -1, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    def together(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, length, *x.shape[3:])

    made = jax.lax.map(lambda at: run(*at), (split(q), split(positions)))
    return jax.tree.map(together, made)


def _attend(
    q: Array, k: Array, v: Array, *, q_positions: Array, k_positions: Array, k_valid: Array,
    window: Array, scale: float, cap: float | None,
) -> tuple[Array, Array]:  # fmt: skip
    """The mixed values in float32, and the logarithm of each query's sum of exponentials."""
    batch, length, n_heads, head_dim = q.shape
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
    sums = jnp.moveaxis(jax.nn.logsumexp(scores, axis=-1), -1, 1)
    shape = (batch, length, n_heads)
    return mixed.reshape(*shape, head_dim), sums.reshape(shape)

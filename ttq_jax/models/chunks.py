"""A prompt in parts: what a layer's weights read at a time, so that its activations stay small.

Each layer reads all parts before the next layer begins. So its moments are those of the whole
prompt, summed part by part, and it is quantized once, when they are complete. What is alive at a
time is one part's projections, hidden units and scores; of the whole prompt only the residual
stream and the cache. The price is that every part reads the layer's weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ttq_jax.config import ConfigError
from ttq_jax.errors import expect
from ttq_jax.models.attention import QUERY_BLOCK


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How `decoder.forward` reads tokens in parts.

    Attributes:
      size: tokens of each row per part, see `check_size`.
      project: (valid[B, n] of a part) -> a `Project`; what it keeps is summed over the parts.
      finish: (site, the sums, the site's weights, the layer's part of `per_layer`) -> what is kept
        of the site.
    """

    size: int
    project: Callable[[Array], Any]
    finish: Callable[..., Any]


def check_size(size: int) -> None:
    """Refuses a number of tokens that attention would not read in blocks.

    Args:
      size: tokens per part; 0 for whole prompts.

    Raises:
      ConfigError: below 0, or above a block of queries and no multiple of it.
      Error: no whole number.
    """
    expect("prefill_chunk", size, (int, np.integer), "a whole number of tokens")
    if size < 0 or (size > QUERY_BLOCK and size % QUERY_BLOCK):
        raise ConfigError(
            f"prefill_chunk: expected up to {QUERY_BLOCK} tokens or a multiple of {QUERY_BLOCK}, "
            f"such as 2048, or 0 for whole prompts, got {size}"
        )


def over_chunks(
    run: Callable[[Array, Any, Any], tuple[Array, Any, Any]], x: Float[Array, "B T D"], carry: Any,
    size: int,
) -> tuple[Float[Array, "B T D"], Any, Any]:  # fmt: skip
    """Runs something over the parts of every row, the last of which may be shorter.

    Args:
      run: (x[B, n, D] of a part, its first token's index, what the part before left) -> (the new x,
        what is left to the next part, what is summed over the parts).
      x: of all tokens.
      carry: what is left to the first part.
      size: n.

    Returns:
      The new x, what the last part left, and the sums.
    """

    def step(i: Any, state: tuple, n: int = size) -> tuple:
        x, carry, sums = state
        first = i * size
        part, carry, more = run(jax.lax.dynamic_slice_in_dim(x, first, n, axis=1), first, carry)
        # In place, so that the stream is in memory once.
        x = jax.lax.dynamic_update_slice_in_dim(x, part, first, axis=1)
        return x, carry, jax.tree.map(jnp.add, sums, more)

    whole, rest = divmod(x.shape[1], size)
    shapes = jax.eval_shape(run, x[:, :size], jnp.zeros((), jnp.int32), carry)[2]
    sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    state = jax.lax.fori_loop(np.int32(0), np.int32(whole), step, (x, carry, sums))
    return step(jnp.asarray(whole, jnp.int32), state, rest) if rest else state

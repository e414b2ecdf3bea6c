"""Stage 5: the decode loop.

Of the model's blocks it reads the packed weights and the cache, nothing else.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ttq_jax.config import ModelConfig
from ttq_jax.models.decoder import forward, logits, unstack
from ttq_jax.sampling import Sampling, sample
from ttq_jax.types import Cache, Params, QuantizedLinear


def decode(
    params: Params,
    cache: Cache,
    hidden: Float[Array, "B D"],
    key: Array,
    limit: Int[Array, ""],
    *,
    config: ModelConfig,
    sampling: Sampling,
    capacity: int,
    eos_ids: tuple[int, ...],
) -> tuple[Int[Array, "B capacity"], Int[Array, "B"]]:
    """Generates until every row ended or reached the limit.

    Args:
      params: the tree to decode from.
      cache: the prompts', with at least `capacity` free slots.
      hidden: each prompt's last hidden state, which predicts the first token.
      key: a PRNG key.
      limit: most tokens per row, from 1 to capacity; dynamic, so that it does not recompile.
      config: the model's.
      sampling: how tokens are chosen.
      capacity: columns of the output.
      eos_ids: tokens that end a row.

    Returns:
      Tokens, and per row how many of them count: up to the end token, which does not.
    """
    run = partial(_loop, config=config, sampling=sampling, capacity=capacity, eos_ids=eos_ids)
    kinds = jax.tree.leaves(params["layers"], is_leaf=lambda w: isinstance(w, QuantizedLinear))
    if any(isinstance(w, QuantizedLinear) for w in kinds):
        return run(params, cache, hidden, key, limit)

    # An unquantized tree is decoded at the speed of memory, where a CPU gains from `unstack`;
    # packed layers are small enough for the scan, which compiles much faster.
    def apart(params: Params, *rest: Any) -> tuple[Array, Array]:
        return run(unstack(params), *rest)

    return jax.lax.platform_dependent(params, cache, hidden, key, limit, cpu=apart, default=run)


def _loop(
    params: Params, cache: Cache, hidden: Array, key: Array, limit: Array, *,
    config: ModelConfig, sampling: Sampling, capacity: int, eos_ids: tuple[int, ...],
) -> tuple[Array, Array]:  # fmt: skip
    """The loop itself."""
    batch = hidden.shape[0]
    ends = jnp.asarray(eos_ids, jnp.int32)

    def choose(step: Array, hidden: Array) -> Array:
        return sample(jax.random.fold_in(key, step), logits(config, params, hidden), sampling)

    def is_end(token: Array) -> Array:
        return jnp.any(token[:, None] == ends, axis=1)

    def running(state: tuple) -> Array:
        step, _, _, _, done, _ = state
        return (step < limit) & ~jnp.all(done)

    def one_token(state: tuple) -> tuple:
        step, token, cache, out, done, counts = state
        valid = jnp.ones((batch, 1), bool)
        hidden, cache, _ = forward(config, params, token[:, None], valid, cache)
        token = choose(step, hidden[:, 0])
        done = done | is_end(token)
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, step))
        return step + 1, token, cache, out, done, counts + (~done).astype(jnp.int32)

    first = choose(jnp.zeros((), jnp.int32), hidden)
    done = is_end(first)
    out = jnp.zeros((batch, capacity), jnp.int32).at[:, 0].set(first)
    state = (jnp.ones((), jnp.int32), first, cache, out, done, (~done).astype(jnp.int32))
    _, _, _, out, _, counts = jax.lax.while_loop(running, one_token, state)
    return out, counts

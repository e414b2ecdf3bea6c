"""Stage 5: the decode loop.

It reads the packed weights of the blocks and the KV cache. Only a refresh reads the unquantized
weights again.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ttq_jax.config import ModelConfig
from ttq_jax.models.decoder import forward, logits, plain, unstack
from ttq_jax.prefill import observing
from ttq_jax.quant.moments import Reads
from ttq_jax.sampling import Sampling, sample
from ttq_jax.types import Cache, Moments, Params, QuantizedLinear


@dataclasses.dataclass(frozen=True)
class Refresh:
    """Quantizing again while decoding, from moments that include the generated tokens.

    Attributes:
      every: tokens between two refreshes, >= 1.
      reads: which moments of the generated tokens are observed.
      moments: per site, of everything read before decoding.
      quantize: (moments, old tree) -> new tree.
    """

    every: int
    reads: Reads
    moments: dict[str, Moments]
    quantize: Callable[[dict[str, Moments], Params], Params]


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
    refresh: Refresh | None = None,
) -> tuple[Int[Array, "B capacity"], Int[Array, " B"], Bool[Array, ""], dict[str, Moments]]:
    """Generates until every row has ended or reached the limit.

    Args:
      params: the tree to decode from.
      cache: the prompts', with at least `capacity` free slots.
      hidden: each prompt's last hidden state, which predicts the first token.
      key: a PRNG key.
      limit: most tokens per row, from 1 to capacity; dynamic, so another limit compiles nothing.
      config: the model's.
      sampling: how tokens are chosen.
      capacity: columns of the output.
      eos_ids: tokens that end a row.
      refresh: how to quantize again while decoding; None for never.

    Returns:
      The tokens; per row, how many of them come before the end token; whether the logit of every
      token that was chosen is finite; and the moments of everything read, {} without a refresh.
    """
    run = partial(
        _loop, config=config, sampling=sampling, capacity=capacity, eos_ids=eos_ids,
        refresh=refresh,
    )  # fmt: skip
    kinds = jax.tree.leaves(params["layers"], is_leaf=lambda w: isinstance(w, QuantizedLinear))
    if any(isinstance(w, QuantizedLinear) for w in kinds):
        return run(params, cache, hidden, key, limit)

    # Decoding an unquantized tree is bound by memory bandwidth, where a CPU gains from `unstack`.
    # Packed layers are small enough for the scan, which compiles much faster.
    def apart(params: Params, *rest: Any) -> tuple[Array, Array, Array, dict[str, Moments]]:
        return run(unstack(params), *rest)

    return jax.lax.platform_dependent(params, cache, hidden, key, limit, cpu=apart, default=run)


def _loop(
    params: Params, cache: Cache, hidden: Array, key: Array, limit: Array, *,
    config: ModelConfig, sampling: Sampling, capacity: int, eos_ids: tuple[int, ...],
    refresh: Refresh | None,
) -> tuple[Array, Array, Array, dict[str, Moments]]:  # fmt: skip
    """The loop itself."""
    batch = hidden.shape[0]
    ends = jnp.asarray(eos_ids, jnp.int32)

    def choose(step: Array, hidden: Array) -> tuple[Array, Array]:
        scores = logits(config, params, hidden)
        token = sample(jax.random.fold_in(key, step), scores, sampling)
        # NaN and infinity win the choice, so the chosen logit stands for all.
        return token, jnp.isfinite(jnp.take_along_axis(scores, token[:, None], axis=1)[:, 0])

    def is_end(token: Array) -> Array:
        return jnp.any(token[:, None] == ends[None], axis=1)

    def running(state: tuple) -> Array:
        step, _, _, _, done, _, _ = state
        return (step < limit) & ~jnp.all(done)

    def one_token(tree: Params, state: tuple) -> tuple[tuple, dict[str, Any]]:
        step, token, cache, out, done, counts, fine = state
        valid = jnp.ones((batch, 1), bool)
        # What follows a row's end is computed and never used.
        project = observing(~done[:, None], refresh.reads) if refresh else plain
        hidden, cache, seen = forward(config, tree, token[:, None], valid, cache, project=project)
        token, finite = choose(step, hidden[:, 0])
        fine = fine & jnp.all(finite | done)
        done = done | is_end(token)
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], step, axis=1)
        return (step + 1, token, cache, out, done, counts + (~done).astype(jnp.int32), fine), seen

    first, finite = choose(jnp.zeros((), jnp.int32), hidden)
    done = is_end(first)
    out = jnp.zeros((batch, capacity), jnp.int32).at[:, 0].set(first)
    counts = (~done).astype(jnp.int32)
    state: tuple = (jnp.ones((), jnp.int32), first, cache, out, done, counts, jnp.all(finite))
    moments: dict[str, Moments] = {}
    if refresh is None:
        state = jax.lax.while_loop(running, lambda s: one_token(params, s)[0], state)
    else:
        state, moments = _refreshed(params, refresh, running, one_token, state)
    return state[3], state[5], state[6], moments


def _refreshed(
    params: Params, refresh: Refresh, running: Callable[[tuple], Array],
    one_token: Callable[[Params, tuple], tuple[tuple, dict[str, Any]]], state: tuple,
) -> tuple[tuple, dict[str, Moments]]:  # fmt: skip
    """The loop in stretches of `refresh.every` tokens, with a refresh after each."""

    def stretch(carry: tuple) -> tuple:
        tree, moments, state = carry
        end = state[0] + refresh.every

        def step(inner: tuple) -> tuple:
            state, moments = inner
            state, seen = one_token(tree, state)
            return state, jax.tree.map(jnp.add, moments, seen)

        state, moments = jax.lax.while_loop(
            lambda inner: running(inner[0]) & (inner[0][0] < end), step, (state, moments)
        )
        tree = jax.lax.cond(running(state), refresh.quantize, lambda _, tree: tree, moments, tree)
        return tree, moments, state

    carry = (params, refresh.moments, state)
    _, moments, state = jax.lax.while_loop(lambda carry: running(carry[2]), stretch, carry)
    return state, moments

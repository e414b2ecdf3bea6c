"""Stage 5: the decode loop.

It reads the packed weights of the blocks and the KV cache. Only a refresh reads the unquantized
weights again. `begin` and `advance` are the loop in two parts: `decode` runs both to the end, a
stream calls `advance` again and again with a larger limit.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from ttq_jax.config import ModelConfig
from ttq_jax.host import on_host
from ttq_jax.models.decoder import forward, logits, plain, unstack
from ttq_jax.quant.moments import Reads
from ttq_jax.sampling import Sampling, sample
from ttq_jax.sites import observing
from ttq_jax.types import Cache, Leaf, Moments, Params, QuantizedLinear


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


@struct.dataclass
class Decoding:
    """How far an answer is: what one step hands to the next.

    Attributes:
      step: int32[]; tokens chosen so far, per row.
      token: int32[B]; the last one.
      cache: of the prompts and of every chosen token but the last.
      out: int32[B, capacity]; the chosen tokens.
      done: bool[B]; whether a row has ended.
      counts: int32[B]; tokens before a row's end.
      finite: bool[]; whether the logit of every token that was chosen is finite.
    """

    step: Leaf
    token: Leaf
    cache: Cache
    out: Leaf
    done: Leaf
    counts: Leaf
    finite: Leaf


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
    how: dict[str, Any] = {"config": config, "sampling": sampling, "eos_ids": eos_ids}
    state = begin(params, cache, hidden, key, capacity=capacity, **how)
    _, moments, state = advance(params, state, key, limit, refresh=refresh, **how)
    return state.out, state.counts, state.finite, moments


def _choose(
    params: Params, hidden: Array, step: Array, key: Array, *, config: ModelConfig,
    sampling: Sampling, eos_ids: tuple[int, ...],
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The next token of each row, whether it ends the row, and whether its logit is finite."""
    scores = logits(config, params, hidden)
    token = sample(jax.random.fold_in(key, step), scores, sampling)
    # NaN and infinity win the choice, so the chosen logit stands for all.
    finite = jnp.isfinite(jnp.take_along_axis(scores, token[:, None], axis=1)[:, 0])
    end = jnp.any(token[:, None] == jnp.asarray(eos_ids, jnp.int32)[None], axis=1)
    return token, end, finite


def begin(
    params: Params,
    cache: Cache,
    hidden: Float[Array, "B D"],
    key: Array,
    *,
    config: ModelConfig,
    sampling: Sampling,
    capacity: int,
    eos_ids: tuple[int, ...],
) -> Decoding:
    """Chooses the first token of each row.

    Args:
      params: see `decode`, as all the others.
      cache: the prompts'.
      hidden: each prompt's last hidden state.
      key: a PRNG key.
      config: the model's.
      sampling: how tokens are chosen.
      capacity: columns of the output.
      eos_ids: tokens that end a row.

    Returns:
      An answer of one token.
    """
    first, done, finite = _choose(
        params, hidden, jnp.zeros((), jnp.int32), key, config=config, sampling=sampling,
        eos_ids=eos_ids,
    )  # fmt: skip
    out = jnp.zeros((hidden.shape[0], capacity), jnp.int32).at[:, 0].set(first)
    counts = (~done).astype(jnp.int32)
    return Decoding(jnp.ones((), jnp.int32), first, cache, out, done, counts, jnp.all(finite))


def advance(
    params: Params,
    state: Decoding,
    key: Array,
    limit: Int[Array, ""],
    *,
    config: ModelConfig,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    refresh: Refresh | None = None,
) -> tuple[Params | None, dict[str, Moments], Decoding]:
    """Goes on until every row has ended or reached the limit.

    In one call or in several with growing limits, the tokens are the same.

    Args:
      params: the tree to decode from; with a refresh, the last call's.
      state: of `begin`, or of the last call.
      key: the same in every call.
      limit: see `decode`.
      config: see `decode`.
      sampling: see `decode`.
      eos_ids: see `decode`.
      refresh: see `decode`; its `moments` are the last call's.

    Returns:
      The tree and the moments for the next call, None and {} without a refresh; and the answer.
    """
    run = partial(_loop, config=config, sampling=sampling, eos_ids=eos_ids, refresh=refresh)
    kinds = jax.tree.leaves(params["layers"], is_leaf=lambda w: isinstance(w, QuantizedLinear))
    if any(isinstance(w, QuantizedLinear) or on_host(w) for w in kinds):
        return run(params, state, key, limit)

    # Decoding an unquantized tree is bound by memory bandwidth, where a CPU gains from `unstack`.
    # Packed layers are small enough for the scan, which compiles much faster. Layers in the host's
    # memory are fetched by the scan, one at a time.
    def apart(params: Params, *rest: Any) -> tuple[Params | None, dict[str, Moments], Decoding]:
        return run(unstack(params), *rest)

    return jax.lax.platform_dependent(params, state, key, limit, cpu=apart, default=run)


def _loop(
    params: Params, state: Decoding, key: Array, limit: Array, *, config: ModelConfig,
    sampling: Sampling, eos_ids: tuple[int, ...], refresh: Refresh | None,
) -> tuple[Params | None, dict[str, Moments], Decoding]:  # fmt: skip
    """The loop itself."""
    valid = jnp.ones((state.token.shape[0], 1), bool)

    def running(state: Decoding) -> Array:
        return (state.step < limit) & ~jnp.all(state.done)

    def one_token(tree: Params, old: Decoding) -> tuple[Decoding, dict[str, Any]]:
        # What follows a row's end is computed and never used.
        project = observing(~old.done[:, None], refresh.reads) if refresh else plain
        hidden, cache, seen = forward(
            config, tree, old.token[:, None], valid, old.cache, project=project
        )
        token, end, finite = _choose(
            params, hidden[:, 0], old.step, key, config=config, sampling=sampling, eos_ids=eos_ids
        )
        done = old.done | end
        new = Decoding(
            step=old.step + 1,
            token=token,
            cache=cache,
            out=jax.lax.dynamic_update_slice_in_dim(old.out, token[:, None], old.step, axis=1),
            done=done,
            counts=old.counts + (~done).astype(jnp.int32),
            finite=old.finite & jnp.all(finite | old.done),
        )
        return new, seen

    if refresh is None:
        return None, {}, jax.lax.while_loop(running, lambda s: one_token(params, s)[0], state)
    return _refreshed(params, refresh, running, one_token, state)


def _refreshed(
    params: Params, refresh: Refresh, running: Callable[[Decoding], Array],
    one_token: Callable[[Params, Decoding], tuple[Decoding, dict[str, Any]]], state: Decoding,
) -> tuple[Params, dict[str, Moments], Decoding]:  # fmt: skip
    """The loop in stretches of `refresh.every` tokens after the first, a refresh between them."""

    def stretch(carry: tuple) -> tuple:
        tree, moments, state = carry
        # A stretch that a limit has cut short goes on without a refresh.
        read = (state.step - 1) % refresh.every
        end = state.step + refresh.every - read
        due = (read == 0) & (state.step > 1)
        tree = jax.lax.cond(due, refresh.quantize, lambda _, tree: tree, moments, tree)

        def step(inner: tuple) -> tuple:
            state, moments = inner
            state, seen = one_token(tree, state)
            return state, jax.tree.map(jnp.add, moments, seen)

        state, moments = jax.lax.while_loop(
            lambda inner: running(inner[0]) & (inner[0].step < end), step, (state, moments)
        )
        return tree, moments, state

    carry = (params, refresh.moments, state)
    return jax.lax.while_loop(lambda carry: running(carry[2]), stretch, carry)

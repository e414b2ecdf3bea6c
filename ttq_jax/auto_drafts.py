"""Speculative decoding whose cycles choose how many tokens to draft, see `draft_costs`.

One program: the drafts are a loop whose length is chosen while it runs, and each number of drafts
has a verification of its own, so that none reads more tokens than there are.

When tokens are sampled, draft and verifier draw a place's token with the same noise: both take the
largest of logit plus Gumbel noise, and a draft is kept if it is the verifier's token. So an answer
has the unquantized model's distribution, and depends on neither the drafts nor their number: a seed
reproduces it whatever times were measured (Daliri et al., 2025, drafter-invariant decoding). For
that, at most twice as many drafts are rejected as in `speculation`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ttq_jax.config import ModelConfig
from ttq_jax.draft_costs import choose, faded
from ttq_jax.models.decoder import forward, logits, unstack
from ttq_jax.sampling import Sampling, filtered, likeliest
from ttq_jax.speculation import (
    Speculation,
    draw_each,
    keep,
    keys_of,
    leading,
    places,
    scores_of,
    verify,
)
from ttq_jax.types import Cache, Params


def advance(
    params: Params,
    packed: Params,
    state: Speculation,
    key: Array,
    limit: Int[Array, ""],
    costs: Float[Array, " n"],
    *,
    lengths: tuple[int, ...],
    config: ModelConfig,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
) -> Speculation:
    """Goes on until every row has ended or reached the limit.

    Args:
      params: the dense tree, which verifies.
      packed: the tree that drafts.
      state: of `speculation.begin` with these lengths, or of the last call.
      key: a PRNG key, the same in every call.
      limit: most tokens per row; dynamic.
      costs: of a cycle with each number of drafts, positive; dynamic.
      lengths: the numbers to choose from, rising, 0 to `speculation.MOST`.
      config: the model's.
      sampling: how tokens are chosen, of both trees.
      eos_ids: tokens that end a row.

    Returns:
      The answers.
    """
    how: dict[str, Any] = {"config": config, "sampling": sampling}

    def run(params: Params, packed: Params, state: Speculation, *rest: Array) -> Any:
        key, limit, costs = rest

        def running(state: Speculation) -> Array:
            return jnp.any(~state.done & (state.made < limit))

        def cycle(state: Speculation) -> Speculation:
            active = ~state.done & (state.made < limit)
            # Chosen from earlier cycles alone, so that this one's drafts cannot sway it.
            left = jnp.max(jnp.where(active, limit - state.made, 1))
            which = choose(state.evidence, costs, left, lengths)
            drafts = jnp.asarray(lengths, jnp.int32)[which]
            row = jnp.arange(len(state.token), dtype=jnp.int32)
            keys = jax.vmap(partial(keys_of, key, count=lengths[-1] + 1))(row, state.made)
            drafted, cache = _draft(packed, state, keys, drafts, **how)
            tokens, chosen, cache = _verify(
                params, state, drafted, cache, keys, which, lengths=lengths, **how
            )
            agreed = leading((tokens[:, :-1] == drafted) & (places(lengths[-1]) < drafts))
            new = keep(state, agreed, tokens, chosen, cache, limit, eos_ids, drafts)
            return _counted(state, new, active, agreed, which, drafts)

        return jax.lax.while_loop(running, cycle, state)

    # See `decode.advance`.
    apart = lambda params, *rest: run(unstack(params), *rest)  # noqa: E731
    operands = params, packed, state, key, limit, costs
    return jax.lax.platform_dependent(*operands, cpu=apart, default=run)


def _pick(keys: Array, scores: Array, sampling: Sampling) -> Int[Array, "B T"]:
    """The token of each place."""
    if sampling.temperature == 0:
        return likeliest(scores)
    return jax.vmap(draw_each, (1, 1, None), 1)(keys, filtered(scores, sampling), 0)


def _draft(
    packed: Params, state: Speculation, keys: Array, drafts: Array, *, config: ModelConfig,
    sampling: Sampling,
) -> tuple[Int[Array, "B most"], Cache]:  # fmt: skip
    """So many tokens of the packed tree, zeros after them, and the cache."""
    valid = jnp.ones((len(state.token), 1), bool)

    def one(i: Array, carry: tuple) -> tuple:
        token, cache, drafted = carry
        hidden, cache, _ = forward(config, packed, token[:, None], valid, cache)
        scores = logits(config, packed, hidden)
        token = _pick(jax.lax.dynamic_slice_in_dim(keys, i, 1, axis=1), scores, sampling)
        drafted = jax.lax.dynamic_update_slice_in_dim(drafted, token, i, axis=1)
        return token[:, 0], cache, drafted

    none = jnp.zeros((len(state.token), keys.shape[1] - 1), jnp.int32)
    carry = (state.token, state.cache, none)
    _, cache, drafted = jax.lax.fori_loop(np.int32(0), drafts, one, carry)
    return drafted, cache


def _verify(
    params: Params, state: Speculation, drafted: Array, cache: Cache, keys: Array, which: Array, *,
    lengths: tuple[int, ...], config: ModelConfig, sampling: Sampling,
) -> tuple[Int[Array, "B T"], Float[Array, "B T"], Cache]:  # fmt: skip
    """The unquantized model's token at every place, its logit, zeros after them; and the cache."""

    def one(drafts: int, carry: tuple) -> tuple:
        scores, cache = verify(config, params, state, drafted[:, :drafts], carry[2])
        tokens = _pick(keys[:, : drafts + 1], scores, sampling)
        after = ((0, 0), (0, keys.shape[1] - tokens.shape[1]))
        return jnp.pad(tokens, after), jnp.pad(scores_of(scores, tokens), after), cache

    # A loop of one turn or none for each number, for XLA copies the cache into the branches of a
    # conditional, and not into loops.
    made = jnp.zeros(keys.shape, jnp.int32), jnp.zeros(keys.shape, jnp.float32), cache
    for i, drafts in enumerate(lengths):
        turns = (which == i).astype(jnp.int32)
        body = lambda _, carry, drafts=drafts: one(drafts, carry)  # noqa: E731
        made = jax.lax.fori_loop(np.int32(0), turns, body, made)
    return made


def _counted(
    old: Speculation, new: Speculation, active: Array, agreed: Array, which: Array, drafts: Array
) -> Speculation:
    """The state after a cycle, with what the next choice is made from."""
    made = new.made - old.made
    # Of a row that was cut before its first rejected draft, none counts as rejected.
    rejected = (active & (agreed < drafts) & (made > agreed)).astype(jnp.int32)
    here = active[:, None] & (places(old.lengths.shape[1]) == which)
    return dataclasses.replace(
        new,
        evidence=faded(old.evidence, new.kept - old.kept, rejected),
        lengths=old.lengths + here.astype(jnp.int32),
    )

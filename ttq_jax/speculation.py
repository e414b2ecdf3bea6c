"""Speculative decoding: the packed weights draft, the unquantized ones verify.

A cycle drafts K tokens with the packed tree, one after the other. One pass of the unquantized tree
then reads the last token and the drafts. The drafts that it agrees with are kept, up to the first
that it does not, and one more token is taken from it. So the answer is the unquantized model's:
token for token when greedy, in distribution when sampled (Leviathan et al., 2023). The draft is
made from the prompt, like every tree of this package.

    slots of a row    prompt . . | answer so far | t d1 d2 … dK     t: the last token, not yet read
    after the cycle   prompt . . | answer so far   t d1 | t         d2 was another: it is forgotten

Drafts start from the verifier's keys and values: its pass writes over those of the drafts. Rows
accept different numbers of drafts, so each has its own next slot.
"""

import dataclasses
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from ttq_jax.checkpoint import Model
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.decode import Decoding
from ttq_jax.draft_costs import AUTO, Lengths, Speculate, chooses
from ttq_jax.errors import expect
from ttq_jax.host import on_host
from ttq_jax.models.decoder import forward, logits, unstack
from ttq_jax.models.layer_constants import grows
from ttq_jax.prefill import prefill, reading
from ttq_jax.quant.head import head_bits
from ttq_jax.quant.recipe import Recipe
from ttq_jax.sampling import Sampling, filtered, likeliest
from ttq_jax.types import Cache, Leaf, Moments, Offline, Params, Prompts

MOST = 16
"""Drafts per cycle, at most."""


@struct.dataclass
class Speculation:
    """How far the answers are: what one cycle hands to the next.

    Attributes:
      made: int32[B]; tokens chosen so far.
      token: int32[B]; the last one.
      cache: of the prompts and of every chosen token but the last; a next slot for each row.
      out: int32[B, capacity]; the chosen tokens.
      done: bool[B]; whether a row has ended.
      counts: int32[B]; tokens before a row's end.
      finite: bool[]; whether the logit of every token that was chosen is finite.
      drafted: int32[B]; drafts so far.
      kept: int32[B]; of them, those that are in the answer.
      passes: int32[B]; of the verifier so far.
      evidence: float32[2]; see `draft_costs.faded`; None where no cycle chooses.
      lengths: int32[B, n]; of the passes, those after each number of drafts; likewise.
    """

    made: Leaf
    token: Leaf
    cache: Cache
    out: Leaf
    done: Leaf
    counts: Leaf
    finite: Leaf
    drafted: Leaf
    kept: Leaf
    passes: Leaf
    evidence: Leaf = None
    lengths: Leaf = None


def check(drafts: Speculate, recipe: Recipe | None, model: Model | None = None) -> None:
    """Refuses what cannot be drafted or verified.

    Args:
      drafts: K, 0 for plain decoding; "auto" or costs, where each cycle chooses.
      recipe: how the drafting tree is made.
      model: None as long as it is not loaded.

    Raises:
      ConfigError: K out of range, or with a recipe or a model that it does not go with.
      Error: another type.
    """
    auto, number = chooses(drafts), cast(int, drafts)
    if not auto:
        what = f'a whole number, "{AUTO}" or DraftCosts(…)'
        expect("speculate", drafts, (int, np.integer), what)
        if not 0 <= number <= MOST:
            raise ConfigError(f"speculate: expected 0 to {MOST} drafts per cycle, got {drafts}")
        if not number:
            return
    if recipe is None:
        raise ConfigError(
            "speculation: expected a recipe whose quantized weights draft, got the unquantized "
            "model; choose another recipe, such as fast"
        )
    if recipe.source.refresh:
        raise ConfigError(
            "speculation: a refresh would quantize again from tokens that are not verified yet; "
            "set moments.refresh to 0"
        )
    if auto and recipe.batch != "pooled":
        raise ConfigError(
            f"speculate: {AUTO} chooses one number of drafts for the whole batch, and prompts with "
            "weights of their own go through cycles of their own; set batch to pooled, or give the "
            "number"
        )
    if model is None:
        return
    if auto and jax.process_count() > 1:
        raise ConfigError(
            f"speculate: {AUTO} needs one process, for times differ from process to process, got "
            f"{jax.process_count()}; give a number"
        )
    if auto and any(map(on_host, jax.tree.leaves(model.params["layers"]))):
        raise ConfigError(
            f"speculate: {AUTO} has nothing to weigh where the unquantized weights come from the "
            "host's memory for every pass: the more drafts share one, the better; give a number, "
            "such as 8"
        )
    if head_bits(model.params) is not None:
        raise ConfigError(
            "speculation: the verifier needs the unquantized tables, and this model's were packed "
            "while it was loaded; load it without head="
        )
    if grows(model.config):
        raise ConfigError(
            "speculation: this model turns every key by the length of the text, so that rejected "
            "drafts would change what was read before them; it cannot be sped up this way"
        )


def read(
    params: Params, prompts: Prompts, cache: Cache, *, config: ModelConfig, recipe: Recipe,
    offline: Offline, chunk: int = 0,
) -> tuple[Float[Array, "B T D"], Cache, Params, dict[str, Moments], Array | None]:  # fmt: skip
    """`prefill` whose cache and hidden states are the unquantized model's.

    Args:
      params: the dense tree, with dense tables.
      prompts: see `prefill`.
      cache: see there.
      config: see there.
      recipe: see there; if it reads prompts with quantized weights, they are read once more.
      offline: see there.
      chunk: see there.

    Returns:
      See `prefill`; the tree has dense tables, and `drafter` gives it the recipe's.
    """
    hidden, filled, packed, moments, unreached = prefill(
        params, prompts, cache, config=config, recipe=dataclasses.replace(recipe, head=None),
        offline=dataclasses.replace(offline, head=None), chunk=chunk,
    )  # fmt: skip
    if recipe.prefill == "quantized":
        length = prompts.tokens.shape[1]
        how: Any = {"slots": length, "chunks": reading(chunk, length)}
        hidden, filled, _ = forward(config, params, prompts.tokens, prompts.valid, cache, **how)
    return hidden, filled, packed, moments, unreached


def drafter(packed: Params, offline: Offline) -> Params:
    """The tree that drafts: its tables are the recipe's too.

    Args:
      packed: from `read`.
      offline: from `prepare`, with the tables that the recipe packs.

    Returns:
      The tree.
    """
    return {**packed, **(offline.head or {})}


def begin(first: Decoding, drafts: Lengths) -> Speculation:
    """From an answer of one token, chosen by the unquantized model.

    Args:
      first: of `decode.begin`; its cache has as many slots more than the answer as a cycle drafts.
      drafts: of each cycle, or what it chooses from.

    Returns:
      The same answer.
    """
    none = jnp.zeros_like(first.token)
    rows = jnp.full_like(first.token, first.cache.used)
    chosen: dict[str, Any] = {}
    if isinstance(drafts, tuple):
        counts = jnp.zeros((len(first.token), len(drafts)), jnp.int32)
        chosen = {"evidence": jnp.zeros(2, jnp.float32), "lengths": counts}
    return Speculation(
        made=none + 1, token=first.token, cache=dataclasses.replace(first.cache, used=rows),
        out=first.out, done=first.done, counts=first.counts, finite=first.finite,
        drafted=none, kept=none, passes=none, **chosen,
    )  # fmt: skip


@jax.jit
def stats(state: Any) -> Int[Array, "*B n"] | None:
    """The numbers of `Drafts.of` for each row; None for an answer without drafts."""
    if not isinstance(state, Speculation):
        return None
    four = jnp.stack([state.drafted, state.kept, state.passes, state.made - 1], axis=-1)
    return four if state.lengths is None else jnp.concatenate([four, state.lengths], axis=-1)


def advance(
    params: Params,
    packed: Params,
    state: Speculation,
    key: Array,
    limit: Int[Array, ""],
    *,
    drafts: int,
    config: ModelConfig,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
) -> Speculation:
    """Goes on until every row has ended or reached the limit.

    Args:
      params: the dense tree, which verifies.
      packed: the tree that drafts, from `drafter`.
      state: of `begin`, or of the last call.
      key: a PRNG key, the same in every call.
      limit: most tokens per row, up to the capacity; dynamic.
      drafts: K, 1 to `MOST`.
      config: the model's.
      sampling: how tokens are chosen, of both trees.
      eos_ids: tokens that end a row.

    Returns:
      The answers.
    """

    def run(params: Params, packed: Params, state: Speculation, key: Array, limit: Array) -> Any:
        def running(state: Speculation) -> Array:
            return jnp.any(~state.done & (state.made < limit))

        def cycle(state: Speculation) -> Speculation:
            row = jnp.arange(len(state.token), dtype=jnp.int32)
            keys = jax.vmap(partial(keys_of, key, count=drafts + 1))(row, state.made)
            drafted, by, cache = _draft(config, packed, state, keys[:, :-1], sampling)
            scores, cache = verify(config, params, state, drafted, cache)
            agreed, tokens = _accept(scores, drafted, by, keys, sampling)
            chosen = scores_of(scores, tokens)
            return keep(state, agreed, tokens, chosen, cache, limit, eos_ids, drafts)

        return jax.lax.while_loop(running, cycle, state)

    # See `decode.advance`.
    if any(map(on_host, jax.tree.leaves(params["layers"]))):
        return run(params, packed, state, key, limit)
    apart = lambda params, *rest: run(unstack(params), *rest)  # noqa: E731
    return jax.lax.platform_dependent(params, packed, state, key, limit, cpu=apart, default=run)


def keys_of(key: Array, row: Array, made: Array, *, count: int) -> Array:
    """Keys of a row's next tokens: by its place in the batch and the token's in the answer."""
    at = made + jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, row)))(at)


def draw_each(keys: Array, logits: Array, what: int) -> Array:
    """A token for each key and its logits; `what` tells draws of one key apart."""
    one = lambda key, row: jax.random.categorical(jax.random.fold_in(key, what), row)  # noqa: E731
    return jax.vmap(one)(keys, logits).astype(jnp.int32)


def _draft(
    config: ModelConfig, packed: Params, state: Speculation, keys: Array, sampling: Sampling
) -> tuple[Int[Array, "B K"], Float[Array, "B K V"] | None, Cache]:
    """K tokens of the packed tree, the logits that they were drawn from, and the cache."""
    valid = jnp.ones((len(state.token), 1), bool)

    def one(carry: tuple, keys: Array) -> tuple:
        token, cache = carry
        hidden, cache, _ = forward(config, packed, token[:, None], valid, cache)
        scores = logits(config, packed, hidden[:, 0])
        if sampling.temperature == 0:
            token = likeliest(scores)
            return (token, cache), (token, None)
        scores = filtered(scores, sampling)
        token = draw_each(keys, scores, 0)
        return (token, cache), (token, scores)

    carry = (state.token, state.cache)
    made: Any
    (_, cache), made = jax.lax.scan(one, carry, jnp.swapaxes(keys, 0, 1))
    drafted, by = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), made)
    return drafted, by, cache


def verify(
    config: ModelConfig, params: Params, state: Speculation, drafted: Array, cache: Cache
) -> tuple[Float[Array, "B T V"], Cache]:
    """The unquantized model's logits after the last token and every draft."""
    tokens = jnp.concatenate([state.token[:, None], drafted], axis=1)
    before = dataclasses.replace(state.cache, k=cache.k, v=cache.v)
    hidden, cache, _ = forward(config, params, tokens, jnp.ones(tokens.shape, bool), before)
    return logits(config, params, hidden), cache


def _accept(
    scores: Array, drafted: Array, by: Array | None, keys: Array, sampling: Sampling
) -> tuple[Int[Array, " B"], Int[Array, "B T"]]:
    """How many drafts of each row are accepted; and the tokens, of which so many and one count."""
    if by is None:
        tokens = likeliest(scores)
        return leading(tokens[:, :-1] == drafted), tokens
    p = jax.nn.softmax(filtered(scores, sampling), axis=-1)
    q = jax.nn.softmax(by, axis=-1)
    # Of one type, whether 64-bit ones are enabled or not.
    draw = lambda key: jax.random.uniform(jax.random.fold_in(key, 1), dtype=jnp.float32)  # noqa: E731
    uniform = jax.vmap(jax.vmap(draw))
    of = lambda probs: jnp.take_along_axis(probs, drafted[..., None], axis=-1)[..., 0]  # noqa: E731
    agreed = leading(uniform(keys[:, :-1]) * of(q) < of(p[:, :-1]))
    # In place of the first rejected draft, what the draft's distribution lacks of the verifier's;
    # after the last accepted one, there is no draft.
    at = lambda probs: jnp.take_along_axis(probs, agreed[:, None, None], axis=1)[:, 0]  # noqa: E731
    lacks = jnp.maximum(at(p) - at(jnp.pad(q, ((0, 0), (0, 1), (0, 0)))), 0.0)
    # Rounding may leave nothing of two equal distributions.
    lacks = jnp.where(jnp.sum(lacks, axis=-1, keepdims=True) > 0, lacks, at(p))
    own = jnp.take_along_axis(keys, agreed[:, None], axis=1)[:, 0]
    last = draw_each(own, jnp.log(lacks), 2)
    first = places(scores.shape[1]) < agreed[:, None]
    return agreed, jnp.where(first, jnp.pad(drafted, ((0, 0), (0, 1))), last[:, None])


def places(count: int) -> Int[Array, "1 n"]:
    """0, 1, …, beside rows."""
    return jnp.arange(count, dtype=jnp.int32)[None]


def leading(agrees: Array) -> Int[Array, " B"]:
    """How many of each row's drafts are accepted before the first that is not."""
    return jnp.sum(jnp.cumprod(agrees, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)


def scores_of(scores: Array, tokens: Array) -> Float[Array, "B T"]:
    """The logits of these tokens."""
    return jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]


def keep(
    state: Speculation, agreed: Array, tokens: Array, chosen: Array, cache: Cache, limit: Array,
    eos_ids: tuple[int, ...], drafts: int | Array,
) -> Speculation:  # fmt: skip
    """The answers with a cycle's tokens, cut at a row's end and at the limit.

    Args:
      state: before the cycle.
      agreed: int32[B]; drafts that the verifier accepts, at most `drafts`.
      tokens: int32[B, T]; of which `agreed` and one count, T > drafts.
      chosen: float32[B, T]; their logits.
      cache: after the verification.
      limit: see `advance`.
      eos_ids: see there.
      drafts: of this cycle.

    Returns:
      The state after it.
    """
    count = tokens.shape[1]
    active = ~state.done & (state.made < limit)
    ends = jnp.any(tokens[..., None] == jnp.asarray(eos_ids, jnp.int32)[None, None], axis=-1)
    upto = jnp.where(jnp.any(ends, axis=1), jax.lax.argmax(ends, 1, jnp.int32) + 1, count)
    new = jnp.minimum(jnp.minimum(agreed + 1, upto), limit - state.made)
    new = jnp.where(active, new, 0)
    done = state.done | (active & (new == upto) & jnp.any(ends, axis=1))

    at = places(state.out.shape[1]) - state.made[:, None]
    found = jnp.take_along_axis(tokens, jnp.clip(at, 0, count - 1), axis=1)
    out = jnp.where((at >= 0) & (at < new[:, None]), found, state.out)
    last = jnp.take_along_axis(tokens, jnp.maximum(new - 1, 0)[:, None], axis=1)[:, 0]

    finite = jnp.all(jnp.isfinite(chosen) | (places(count) >= new[:, None]))

    used = state.cache.used + new
    read = places(cache.valid.shape[1]) < used[:, None]
    cache = dataclasses.replace(cache, used=used, valid=cache.valid & read)
    return dataclasses.replace(
        state,
        made=state.made + new,
        token=jnp.where(active, last, state.token),
        cache=cache,
        out=out,
        done=done,
        counts=state.counts + new - (done & ~state.done).astype(jnp.int32),
        finite=state.finite & finite,
        drafted=state.drafted + jnp.where(active, drafts, 0),
        kept=state.kept + jnp.minimum(agreed, new),
        passes=state.passes + active.astype(jnp.int32),
    )

"""Continuations under weights made from the prompt: scores given texts, or generates one.

Scoring is the causal protocol of `perplexity` for texts that share a prompt: it is read once, and
the weights are quantized once. The first token of each continuation is predicted by the
prompt's last state, as in generation.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ttq_jax.checkpoint import Model
from ttq_jax.config import ModelConfig
from ttq_jax.evaluation.perplexity import read_refreshing
from ttq_jax.finite import raise_not_finite
from ttq_jax.generate import generate_tokens
from ttq_jax.models.cache import activation_dtype, empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.partition import on_its_mesh, put, whole
from ttq_jax.prefill import last_hidden, prefill, requantize
from ttq_jax.prompts import SMALLEST_BUCKET, bucket, check_ids, pad_prompts
from ttq_jax.quant.head import joined
from ttq_jax.quant.recipe import Recipe
from ttq_jax.sampling import Sampling
from ttq_jax.types import Cache, Offline, Params, Prompts

# Read side by side, each with a copy of the prompt's cache.
_TOGETHER = 8
_SHORTEST = 16


def _copies(cache: Cache, n: int) -> Cache:
    """The cache of one row, n times."""
    return dataclasses.replace(
        cache,
        k=jax.tree.map(lambda a: jnp.repeat(a, n, axis=1), cache.k),
        v=jax.tree.map(lambda a: jnp.repeat(a, n, axis=1), cache.v),
        positions=jnp.repeat(cache.positions, n, axis=0),
        valid=jnp.repeat(cache.valid, n, axis=0),
    )


@partial(jax.jit, static_argnames=("config", "recipe"))
def score_padded(
    params: Params,
    prompts: Prompts,
    rows: Int[Array, "N C"],
    lengths: Int[Array, " N"],
    offline: Offline,
    *,
    config: ModelConfig,
    recipe: Recipe | None,
) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """Scores continuations of one prompt, one XLA program, compiled once per shape and recipe.

    Args:
      params: the dense tree.
      prompts: the prompt, a padded batch of one.
      rows: the continuations, padded on the right; C >= 2, N a power of two.
      lengths: how many tokens of each count.
      offline: what the recipe needs besides the prompt.
      config: the model's.
      recipe: how to quantize; None for the unquantized model.

    Returns:
      Per row the summed log-likelihood of its tokens, nats, and whether each of them is the
      likeliest at its position.
    """
    count, width = rows.shape
    every = 0 if recipe is None else recipe.source.refresh
    # Weights that are refreshed on the way belong to one row.
    together = 1 if every else min(count, _TOGETHER)
    slots = prompts.tokens.shape[1] + width - 1 + every
    cache = empty_cache(config, 1, slots, activation_dtype(params))
    hidden, filled, packed, seen, _ = prefill(
        params, prompts, cache, config=config, recipe=recipe, offline=offline
    )
    first = jnp.broadcast_to(last_hidden(hidden, prompts), (together, 1, hidden.shape[-1]))

    def judge(at: tuple[Array, Array]) -> tuple[Array, Array]:
        log_probs = jax.nn.log_softmax(logits(config, packed, at[0]))
        return log_probs[at[1]], jax.lax.argmax(log_probs, 0, jnp.int32) == at[1]

    def score(some: tuple[Array, Array]) -> tuple[Array, Array]:
        tokens, lengths = some
        real = jnp.arange(width, dtype=jnp.int32)[None] < lengths[:, None]
        read = tokens[:, :-1]
        if recipe is not None and every:
            again = lambda moments: requantize(params, moments, recipe, offline)  # noqa: E731
            after = read_refreshing(config, recipe, packed, read[0], filled, seen, again)[None]
        else:
            # A row's last token is not read.
            after, _, _ = forward(config, packed, read, real[:, 1:], _copies(filled, together))
        states = jnp.concatenate([first, after], axis=1).reshape(-1, hidden.shape[-1])
        # A block of states at a time: V is large.
        judged = jax.lax.map(judge, (states, tokens.reshape(-1)), batch_size=64)
        log_probs, likeliest = (a.reshape(tokens.shape) for a in judged)
        return jnp.sum(jnp.where(real, log_probs, 0.0), 1), jnp.all(likeliest | ~real, 1)

    chunks = rows.reshape(-1, together, width), lengths.reshape(-1, together)
    scores, greedy = jax.lax.map(score, chunks)
    return whole((scores.reshape(-1), greedy.reshape(-1)))


@on_its_mesh
def score_continuations(
    model: Model,
    prompt: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    recipe: Recipe | None,
    offline: Offline,
) -> list[tuple[float, bool]]:
    """Scores continuations of one prompt, padded to buckets of a few lengths and counts.

    Args:
      model: the unquantized model.
      prompt: token ids, at least one; with the longest continuation less its last token they
        must fit the context.
      continuations: token ids, at least one continuation of at least one token.
      recipe: how to quantize; None for the unquantized model.
      offline: from `prepare`.

    Returns:
      Per continuation its log-likelihood, nats, and whether greedy decoding would give it.

    Raises:
      PromptError: the prompt is empty, or does not fit.
      NotFiniteError: a score is not finite.
    """
    for ids in (prompt, *continuations):
        check_ids(ids, model.config.vocab_size, model.tokenizer, "a prompt or continuation")
    longest = max(map(len, continuations))
    rows = np.zeros((bucket(len(continuations), smallest=1), bucket(longest, smallest=_SHORTEST)))
    rows, lengths = rows.astype(np.int32), np.zeros(len(rows), np.int32)
    for i, tokens in enumerate(continuations):
        rows[i, : len(tokens)], lengths[i] = tokens, len(tokens)
    prompts = pad_prompts(
        [prompt], max_positions=model.config.max_positions, max_new_tokens=longest - 1
    )
    params, offline = joined(model.params, recipe, offline)
    scores, greedy = jax.device_get(
        score_padded(
            params, prompts, *put((rows, lengths)), offline,
            config=model.config, recipe=recipe,
        )
    )  # fmt: skip
    if not np.isfinite(scores[: len(continuations)]).all():
        raise_not_finite(params, prompts, offline, config=model.config, recipe=recipe)
    return list(zip(scores.tolist(), greedy.tolist(), strict=True))[: len(continuations)]


def stretches(
    context: Sequence[int], scored: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Cuts a text so that each piece is scored by weights made from the text before it.

    One prompt for the whole text would be very short, or would contain what is scored.
    With pieces that double in length, the prompt of a token holds at least half of the text before
    it. The price is that the text is read twice, in prompts that fill their buckets.

    Args:
      context: token ids, at least one, not scored.
      scored: what follows it.

    Yields:
      (prompt, continuation): each prompt is all text before its continuation, and the
      continuations together are `scored`.
    """
    text, start = [*context, *scored], len(context)
    while start < len(text):
        end = min(bucket(start + 1), len(text))
        yield text[:start], text[start:end]
        start = end


@on_its_mesh
def continue_until(
    model: Model,
    prompt: Sequence[int],
    until: Sequence[str],
    limit: int,
    key: Array,
    *,
    recipe: Recipe | None,
    offline: Offline,
    sampling: Sampling,
) -> str:
    """Continues a prompt until one of some texts appears.

    Args:
      model: the unquantized model.
      prompt: token ids, at least one.
      until: texts that end the answer and are not part of it; may be special tokens.
      limit: most new tokens, >= 1; with the prompt they must fit the context.
      key: a PRNG key.
      recipe: how to quantize; None for the unquantized model.
      offline: from `prepare`.
      sampling: how tokens are chosen.

    Returns:
      The text.

    Raises:
      PromptError: the prompt is empty, or does not fit.
      NotFiniteError: the logits are not finite.
    """
    check_ids(prompt, model.config.vocab_size, model.tokenizer, "the prompt")
    tokenizer, prompts = model.tokenizer, pad_prompts(
        [prompt], max_positions=model.config.max_positions, max_new_tokens=limit
    )  # fmt: skip
    # Decoded text does not show special tokens: they are looked for by their ids.
    single = [ids for stop in until if len(ids := tokenizer.encode(stop, add_bos=False)) == 1]
    ends = {*model.eos_ids, *(ids[0] for ids in single if not tokenizer.continuation(prompt, ids))}
    params, offline = joined(model.params, recipe, offline)
    run = partial(
        generate_tokens, params, prompts, offline, put(key), config=model.config, recipe=recipe,
        sampling=sampling, capacity=bucket(limit), eos_ids=tuple(sorted(ends)),
    )  # fmt: skip
    # The program knows tokens, not texts. It runs for a few tokens and, if none of `until` appears,
    # again for more; the first ones come out the same.
    upto = min(SMALLEST_BUCKET, limit) if until else limit
    while True:
        tokens, counts, fine, *_ = jax.device_get(run(put(np.int32(upto))))
        if not fine:
            raise_not_finite(params, prompts, offline, config=model.config, recipe=recipe)
        count = int(counts[0])
        text = tokenizer.continuation(prompt, tokens[0, :count].tolist())
        found = [at for stop in until if (at := text.find(stop)) >= 0]
        if found or count < upto or upto == limit:
            return text[: min(found, default=None)]
        upto = min(4 * upto, limit)

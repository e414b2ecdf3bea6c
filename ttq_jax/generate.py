"""Text to text: prefill, moments, scale, pack and decode as one XLA program.

`generate_tokens` is that program: `read` and `answer` are its stages in order. `generate` adds the
tokenizer and padding. `stream` runs the same two apart.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ttq_jax import speculation
from ttq_jax.chat.ask import Asked, ask
from ttq_jax.checkpoint import Model
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.draft_costs import LENGTHS, DraftCosts, Speculate, chooses
from ttq_jax.errors import expect
from ttq_jax.finite import raise_not_finite
from ttq_jax.generation import Drafts, Generation, made_of
from ttq_jax.measured_drafts import Choosing
from ttq_jax.models.cache import check_dtype
from ttq_jax.offline.calibrate import prepare
from ttq_jax.partition import each_of, on, on_its_mesh, put, whole
from ttq_jax.prefill import check_chunk, first_turn
from ttq_jax.prompts import SMALLEST_BUCKET, bucket, pad_prompts
from ttq_jax.quant.head import joined
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.tree import check_selection
from ttq_jax.sampling import Sampling, make_key
from ttq_jax.stages import STATIC, answer, carried, read, separately
from ttq_jax.types import Moments, Offline, Params, Prompts


def _one_tree(
    params: Params, prompts: Prompts, offline: Offline, key: Array, limit: Array, *,
    capacity: int, chunk: int, cache_dtype: str | None, **how: Any,
) -> tuple[Array, Array, Array, dict[str, Moments], Array | None, Array | None]:  # fmt: skip
    """Prompts that share one quantized tree, from the first token to the last."""
    packed, moments, state, unreached = read(
        params, prompts, offline, key, capacity=capacity, chunk=chunk, cache_dtype=cache_dtype,
        **how,
    )  # fmt: skip
    _, moments, state = answer(params, packed, moments, state, offline, key, limit, **how)
    moments, stats = carried(how["recipe"], moments), speculation.stats(state)
    return state.out, state.counts, state.finite, moments, unreached, stats


@partial(jax.jit, static_argnames=STATIC)
def generate_tokens(
    params: Params,
    prompts: Prompts,
    offline: Offline,
    key: Array,
    limit: Int[Array, ""],
    *,
    config: ModelConfig,
    recipe: Recipe | None,
    sampling: Sampling,
    capacity: int,
    eos_ids: tuple[int, ...],
    drafts: int = 0,
    chunk: int = 0,
    cache_dtype: str | None = None,
) -> tuple[
    Int[Array, "B capacity"], Int[Array, " B"], Bool[Array, ""], dict[str, Moments],
    Array | None, Int[Array, "B 4"] | None,
]:  # fmt: skip
    """Prompts to tokens, one XLA program; compiled once per shape and static argument.

    Args:
      params: the dense tree; its tables are packed as the recipe says, but if there are drafts.
      prompts: a padded batch.
      offline: what the recipe needs besides the prompts; its tables only if there are drafts.
      key: a PRNG key.
      limit: most new tokens per row, from 1 to `capacity`; dynamic.
      config: the model's.
      recipe: how to quantize; None decodes from the tree as it is.
      sampling: how tokens are chosen.
      capacity: columns of the output and slots kept for it in the cache.
      eos_ids: tokens that end a row.
      drafts: tokens that the quantized tree drafts for the dense one to verify at a time, see
        `speculation`; 0 decodes from the quantized tree.
      chunk: longer prompts are read in parts of so many tokens, see `models.chunks`; 0 for whole.
      cache_dtype: of keys and values, one of `models.cache.DTYPES`; None for the activations'.

    Returns:
      New tokens; per row how many of them count; whether all logits are finite; the moments for a
      conversation's next turn, {} for recipes without a decay; the share of the experts that the
      prompts did not reach, see `prefill`; and per row the numbers of `Drafts`, None without.
    """
    run = partial(
        _one_tree, config=config, recipe=recipe, sampling=sampling, capacity=capacity,
        eos_ids=eos_ids, drafts=drafts, chunk=chunk, cache_dtype=cache_dtype,
    )  # fmt: skip
    if recipe is None or recipe.batch == "pooled":
        out, counts, finite, moments, *rest = run(params, prompts, offline, key, limit)
        out, counts, finite, *rest = whole((out, counts, finite, *rest))
        return out, counts, finite, moments, *rest
    rows, keys = separately(prompts, key)
    one = lambda row, k: run(params, row, offline, k, limit)  # noqa: E731
    out, counts, finite, _, unreached, stats = each_of(one, rows, keys)
    unreached = None if unreached is None else jnp.mean(unreached)
    stats = None if stats is None else stats[:, 0]
    found = whole((out[:, 0], counts[:, 0], jnp.all(finite), unreached, stats))
    return *found[:3], {}, *found[3:]


def arguments(
    model: Model, texts: Any, *, recipe: Recipe | None, offline: Offline | None = None,
    max_new_tokens: int = 64, sampling: Sampling = Sampling(), seed: int = 0, chat: bool = False,
    smallest: int = SMALLEST_BUCKET, speculate: Speculate = 0, prefill_chunk: int = 0,
    cache_dtype: str | None = None,
) -> tuple[tuple[Params, Prompts, Offline, Array], dict[str, Any], Offline]:  # fmt: skip
    """What `generate_tokens` takes for one batch, but the limit.

    Args:
      model: see `generate`.
      texts: one batch, read together; or what `ask` made of it.
      recipe: see `generate`.
      offline: see `generate`.
      max_new_tokens: see `generate`.
      sampling: see `generate`.
      seed: see `generate`.
      chat: see `generate`.
      smallest: the shortest bucket that prompts are padded to.
      speculate: see `generate`.
      prefill_chunk: see `generate`.
      cache_dtype: see `generate`.

    Returns:
      The arrays; the static arguments by name; and what was prepared, for the next batch.

    Raises:
      PromptError: a prompt that is empty or does not fit the model's context.
      ConfigError: max_new_tokens below 1, drafts that `speculation.check` refuses, a chunk that
        `prefill.check_chunk` does, or a dtype that `models.cache.check_dtype` does.
    """
    asked = ask(model, texts, chat=chat)
    expect("recipe", recipe, (Recipe, type(None)), 'a recipe, as in preset("fast"), or None')
    expect("offline", offline, (Offline, type(None)), "what prepare() returned, or None")
    expect("max_new_tokens", max_new_tokens, (int, np.integer), "a whole number")
    expect("sampling", sampling, Sampling, "Sampling(…)")
    expect("seed", seed, (int, np.integer), "a whole number")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    prompts = pad_prompts(
        asked.rows, max_positions=model.config.max_positions, max_new_tokens=max_new_tokens,
        smallest=smallest,
    )  # fmt: skip
    check_selection(model.params, recipe)
    speculation.check(speculate, recipe, model)
    check_chunk(prefill_chunk, recipe)
    check_dtype(cache_dtype)
    if offline is None:
        offline = prepare(model, recipe)
    if recipe is not None and recipe.source.decay and not offline.carried:
        first = first_turn(model.params, model.config, recipe)
        offline = dataclasses.replace(offline, carried=first)
    drafts: Any = LENGTHS if chooses(speculate) else speculate
    how = {
        "config": model.config, "recipe": recipe, "sampling": sampling,
        "capacity": bucket(max_new_tokens), "eos_ids": asked.eos_ids,
        "drafts": drafts if isinstance(drafts, tuple) else int(drafts),
        "chunk": int(prefill_chunk), "cache_dtype": cache_dtype,
    }  # fmt: skip
    params, besides = model.params, offline
    if not speculate:
        params, besides = joined(params, recipe, offline)
    return (params, prompts, besides, put(make_key(int(seed)))), how, offline


@on_its_mesh
def program(
    model: Model, texts: Any, *, recipe: Recipe | None, offline: Offline | None = None, **rest: Any
) -> tuple[Callable[[int], Any], Prompts, Offline]:
    """`generate_tokens` with everything set but the limit, for one batch.

    Args:
      model: see `arguments`, as all the others.
      texts: see there.
      recipe: see there.
      offline: see there.
      **rest: see there.

    Returns:
      limit -> what `generate_tokens` returns, computed; the padded prompts; and what was prepared.
    """
    arrays, how, offline = arguments(model, texts, recipe=recipe, offline=offline, **rest)
    speculate = rest.get("speculate", 0)
    if chooses(speculate):
        given = speculate if isinstance(speculate, DraftCosts) else None
        return Choosing(arrays, how, given, model.mesh), arrays[1], offline
    run = partial(generate_tokens, *arrays, **how)

    def upto(limit: int) -> Any:
        with on(model.mesh):
            return jax.block_until_ready(run(put(np.int32(limit))))

    return upto, arrays[1], offline


@on_its_mesh
def generate(
    model: Model,
    texts: Sequence[Any] | Asked,
    *,
    recipe: Recipe | None,
    offline: Offline | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    batch_size: int = 1,
    chat: bool = False,
    speculate: Speculate = 0,
    prefill_chunk: int = 0,
    cache_dtype: str | None = None,
) -> Generation:
    """Continues prompts, or answers messages, with weights that are quantized for them.

    Args:
      model: from `load`.
      texts: the prompts; with `chat`, conversations: each a list of messages such as
        {"role": "user", "content": "Hello"}, or a text, which is one message of the user's; or
        what `ask` made of them.
      recipe: how to quantize, see `preset`; None for the unquantized model.
      offline: from `prepare`; None prepares it here, except for recipes that need a corpus. For
        the next turn of a conversation, its `carried` is the last turn's `Generation.moments`.
      max_new_tokens: most new tokens per prompt, >= 1.
      sampling: how tokens are chosen.
      seed: of the sampling, the same for every batch.
      batch_size: prompts that are read together, >= 1. They share one quantized tree, unless the
        recipe's `batch` is "per_prompt". With a decay every batch is a turn of one conversation.
        In bfloat16 sums of another batch size round otherwise, so that an answer may turn where two
        tokens are nearly as likely.
      chat: render the model's chat template, and stop where it ends a turn.
      speculate: 1 to 16: so many tokens at a time are drafted by the quantized weights and verified
        by the unquantized ones, whose answer it is; see `speculation`. "auto": as many as pay, by
        the drafts kept so far and by costs that are measured once per shape; or by these
        `DraftCosts`, such as the last result's. 0: the quantized weights answer.
      prefill_chunk: prompts of more tokens are read in parts of so many, so that what is alive at
        a time does not grow with them; up to 128, or a multiple of 128. The answer is the same up
        to rounding. 0: prompts are read whole.
      cache_dtype: how keys and values are stored: "float32", "bfloat16", or "int8" with a float32
        scale for each head of each token; None: as the activations. All attention reads them as
        they are stored, so that this is another model, a little, also of `speculate`.

    Returns:
      Tokens, texts, sizes and times, in the order of the prompts.

    Raises:
      PromptError: no list of prompts, or one that is empty or does not fit the model's context;
        or messages without a chat template, or that it refuses.
      ConfigError: max_new_tokens or batch_size below 1, drafts that cannot be made or verified, a
        chunk out of range, or with a recipe whose quantized weights read the prompt, or a
        cache_dtype that there is not.
      NotFiniteError: the logits are not finite.
      Error: an argument of another type.
    """
    expect("batch_size", batch_size, (int, np.integer), "a whole number")
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, got {batch_size}")
    start, asked = time.perf_counter(), ask(model, texts, chat=chat)
    made: list[list[int]] = []
    moments: dict[str, Moments] = {}
    shares: list[float] = []
    drafts: list[Drafts] = []
    for at in range(0, len(asked.rows), batch_size):
        if moments and offline is not None:
            offline = dataclasses.replace(offline, carried=moments)
        run, prompts, offline = program(
            model, asked.part(at, at + batch_size), recipe=recipe, offline=offline,
            max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, speculate=speculate,
            prefill_chunk=prefill_chunk, cache_dtype=cache_dtype,
        )  # fmt: skip
        *new, moments, unreached, stats = run(max_new_tokens)
        tokens, counts, finite = jax.device_get(new)
        drafts += [] if stats is None else [*map(Drafts.of, jax.device_get(stats))]
        shares += [] if unreached is None else [float(jax.device_get(unreached))] * len(counts)
        if not finite:
            raise_not_finite(
                model.params, prompts, offline, config=model.config, recipe=recipe,
                chunk=prefill_chunk,
            )  # fmt: skip
        made += [row[:n].tolist() for row, n in zip(tokens, counts, strict=True)]
    assert offline is not None
    stopped = ["end" if len(ids) < max_new_tokens else "limit" for ids in made]
    return made_of(
        model,
        recipe,
        offline,
        asked.rows,
        made,
        stopped,
        moments,
        time.perf_counter() - start,
        unreached=float(np.mean(shares)) if shares else None,
        drafts=drafts,
        draft_costs=getattr(run, "costs", None),
    )

"""Text to text: prefill, moments, scale, pack and decode as one XLA program.

`generate_tokens` is that program; `_one_tree` shows its stages in order. `generate` adds the
tokenizer, padding and timing.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from ttq_jax.checkpoint import Model
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.decode import Refresh, decode
from ttq_jax.models.cache import empty_cache
from ttq_jax.offline.calibrate import prepare
from ttq_jax.prefill import decoded_shapes, first_turn, last_hidden, prefill, requantize
from ttq_jax.prompts import bucket, pad_prompts
from ttq_jax.quant.recipe import Recipe
from ttq_jax.sampling import Sampling, make_key
from ttq_jax.types import Generation, Moments, Offline, Params, Prompts, effective_bits

_STATIC = ("config", "recipe", "sampling", "capacity", "eos_ids")


def _one_tree(
    params: Params, prompts: Prompts, offline: Offline, key: Array, limit: Array, *,
    config: ModelConfig, recipe: Recipe | None, sampling: Sampling, capacity: int,
    eos_ids: tuple[int, ...],
) -> tuple[Array, Array, dict[str, Moments]]:  # fmt: skip
    """Prompts that share one quantized tree."""
    batch, length = prompts.tokens.shape
    dtype = params["embed"]["embedding"].dtype
    cache = empty_cache(config, batch, length + capacity, dtype)
    hidden, cache, packed, moments = prefill(
        params, prompts, cache, config=config, recipe=recipe, offline=offline
    )
    refresh = None
    if recipe is not None and recipe.source.refresh:
        again = lambda seen, _: requantize(params, seen, recipe, offline)  # noqa: E731
        refresh = Refresh(recipe.source.refresh, recipe.reads, moments, again)
    out, counts, grown = decode(
        packed, cache, last_hidden(hidden, prompts), key, limit,
        config=config, sampling=sampling, capacity=capacity, eos_ids=eos_ids, refresh=refresh,
    )  # fmt: skip
    carried = recipe is not None and recipe.source.decay > 0
    return out, counts, (grown or moments) if carried else {}


@partial(jax.jit, static_argnames=_STATIC)
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
) -> tuple[Int[Array, "B capacity"], Int[Array, " B"], dict[str, Moments]]:
    """Prompts to tokens, one XLA program; compiled once per shape and static argument.

    Args:
      params: the dense tree.
      prompts: a padded batch.
      offline: what the recipe needs besides the prompts.
      key: a PRNG key.
      limit: most new tokens per row, from 1 to `capacity`; dynamic.
      config: the model's.
      recipe: how to quantize; None decodes from the tree as it is.
      sampling: how tokens are chosen.
      capacity: columns of the output and slots kept for it in the cache.
      eos_ids: tokens that end a row.

    Returns:
      New tokens; per row how many of them count; and the moments for a conversation's next turn,
      {} for recipes without a decay.
    """
    run = partial(
        _one_tree, config=config, recipe=recipe, sampling=sampling, capacity=capacity,
        eos_ids=eos_ids,
    )  # fmt: skip
    if recipe is None or recipe.batch == "pooled":
        return run(params, prompts, offline, key, limit)
    rows = jax.tree.map(lambda x: x[:, None], prompts)
    keys = jax.random.split(key, prompts.tokens.shape[0])
    out, counts, _ = jax.vmap(lambda row, k: run(params, row, offline, k, limit))(rows, keys)
    return out[:, 0], counts[:, 0], {}


@contextmanager
def _compile_seconds() -> Iterator[list[float]]:
    """Collects the time that jax takes to trace, lower and compile (or read its cache) inside.

    Yields:
      The seconds of each step; empty if every program was compiled already.
    """
    steps: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            steps.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield steps
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def generate(
    model: Model,
    texts: Sequence[str],
    *,
    recipe: Recipe | None,
    offline: Offline | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    measure: bool = False,
) -> Generation:
    """Continues a batch of prompts with weights that are quantized for them.

    Args:
      model: from `load`.
      texts: the prompts, one batch.
      recipe: how to quantize, see `preset`; None for the unquantized model.
      offline: from `prepare`; None prepares it here, except for recipes that need a corpus. For
        the next turn of a conversation, its `carried` is the last turn's `Generation.moments`.
      max_new_tokens: most new tokens per prompt, >= 1.
      sampling: how tokens are chosen.
      seed: of the sampling.
      measure: time the stages separately, by running the program for one token first (twice if
        that compiled it). Otherwise `seconds` holds only "total".

    Returns:
      Tokens, texts, sizes and times.

    Raises:
      PromptError: a prompt that is empty or does not fit the model's context.
      ConfigError: max_new_tokens below 1.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    rows = [model.tokenizer.encode(text) for text in texts]
    prompts = pad_prompts(
        rows, max_positions=model.config.max_positions, max_new_tokens=max_new_tokens
    )
    if offline is None:
        offline = prepare(model, recipe)
    if recipe is not None and recipe.source.decay and not offline.carried:
        begin = first_turn(model.params, model.config, recipe)
        offline = dataclasses.replace(offline, carried=begin)
    run = partial(
        generate_tokens, model.params, prompts, offline, make_key(seed),
        config=model.config, recipe=recipe, sampling=sampling, capacity=bucket(max_new_tokens),
        eos_ids=model.eos_ids,
    )  # fmt: skip

    def timed(limit: int) -> tuple[tuple[Array, Array, dict[str, Moments]], float]:
        start = time.perf_counter()
        out = jax.block_until_ready(run(jax.device_put(np.int32(limit))))
        return out, time.perf_counter() - start

    seconds = {}
    if measure:
        with _compile_seconds() as compiling:
            _, first = timed(1)
        if sum(compiling):
            _, first = timed(1)
        seconds = {"compile": sum(compiling, 0.0), "prefill_and_quantize": first}
    (tokens, counts, moments), total = timed(max_new_tokens)
    if measure:
        seconds["decode"] = max(total - first, 0.0)
    seconds["total"] = total
    tokens, counts = jax.device_get((tokens, counts))
    new = [row[:n].tolist() for row, n in zip(tokens, counts, strict=True)]
    return Generation(
        tokens=new,
        texts=[model.tokenizer.decode(ids) for ids in new],
        prompt_tokens=[len(row) for row in rows],
        effective_bits=effective_bits(decoded_shapes(model.params, model.config, recipe, offline)),
        seconds=seconds,
        moments=moments,
    )

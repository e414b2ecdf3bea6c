"""Text to text: prefill, moments, scale, pack and decode as one XLA program.

`generate_tokens` is that program; `_one_tree` shows its stages in order. `generate` adds the
tokenizer and padding.
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

from ttq_jax.checkpoint import Model
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.decode import Refresh, decode
from ttq_jax.errors import expect, shown
from ttq_jax.finite import raise_not_finite
from ttq_jax.models.cache import empty_cache
from ttq_jax.offline.calibrate import prepare
from ttq_jax.prefill import decoded_shapes, first_turn, last_hidden, prefill, requantize
from ttq_jax.prompts import PromptError, bucket, pad_prompts
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.tree import check_selection
from ttq_jax.sampling import Sampling, make_key
from ttq_jax.types import Generation, Moments, Offline, Params, Prompts, effective_bits, model_bits

_STATIC = ("config", "recipe", "sampling", "capacity", "eos_ids")
_EXAMPLE = "The sky is"


def _one_tree(
    params: Params, prompts: Prompts, offline: Offline, key: Array, limit: Array, *,
    config: ModelConfig, recipe: Recipe | None, sampling: Sampling, capacity: int,
    eos_ids: tuple[int, ...],
) -> tuple[Array, Array, Array, dict[str, Moments], Array | None]:  # fmt: skip
    """Prompts that share one quantized tree."""
    batch, length = prompts.tokens.shape
    dtype = params["embed"]["embedding"].dtype
    cache = empty_cache(config, batch, length + capacity, dtype)
    hidden, cache, packed, moments, unreached = prefill(
        params, prompts, cache, config=config, recipe=recipe, offline=offline
    )
    refresh = None
    if recipe is not None and recipe.source.refresh:
        again = lambda seen, _: requantize(params, seen, recipe, offline)  # noqa: E731
        refresh = Refresh(recipe.source.refresh, recipe.reads, moments, again)
    out, counts, finite, grown = decode(
        packed, cache, last_hidden(hidden, prompts), key, limit,
        config=config, sampling=sampling, capacity=capacity, eos_ids=eos_ids, refresh=refresh,
    )  # fmt: skip
    carried = recipe is not None and recipe.source.decay > 0
    return out, counts, finite, (grown or moments) if carried else {}, unreached


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
) -> tuple[
    Int[Array, "B capacity"], Int[Array, " B"], Bool[Array, ""], dict[str, Moments], Array | None
]:
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
      New tokens; per row how many of them count; whether all logits are finite; the moments for a
      conversation's next turn, {} for recipes without a decay; and the share of the experts that
      the prompts did not reach, see `prefill`.
    """
    run = partial(
        _one_tree, config=config, recipe=recipe, sampling=sampling, capacity=capacity,
        eos_ids=eos_ids,
    )  # fmt: skip
    if recipe is None or recipe.batch == "pooled":
        return run(params, prompts, offline, key, limit)
    rows = jax.tree.map(lambda x: x[:, None], prompts)
    keys = jax.random.split(key, prompts.tokens.shape[0])
    out, counts, finite, _, unreached = jax.vmap(
        lambda row, k: run(params, row, offline, k, limit)
    )(rows, keys)
    unreached = None if unreached is None else jnp.mean(unreached)
    return out[:, 0], counts[:, 0], jnp.all(finite), {}, unreached


def check_texts(texts: Any) -> list[str]:
    """The prompts as a list.

    Args:
      texts: from a user.

    Returns:
      Strings, at least one.

    Raises:
      PromptError: none, or something else than a sequence of strings. A string by itself would be
        taken letter by letter.
    """
    listed = list(texts) if isinstance(texts, Sequence) and not isinstance(texts, str) else []
    if not listed or not all(isinstance(text, str) for text in listed):
        raise PromptError(
            f'texts: expected a list of prompts, as in ["{_EXAMPLE}"], got '
            f"{type(texts).__name__} {shown(texts)}"
        )
    return listed


def program(
    model: Model, texts: Sequence[str], *, recipe: Recipe | None, offline: Offline | None = None,
    max_new_tokens: int = 64, sampling: Sampling = Sampling(), seed: int = 0,
) -> tuple[Callable[[int], Any], Prompts, Offline]:  # fmt: skip
    """`generate_tokens` with everything set but the limit, for one batch.

    Args:
      model: see `generate`.
      texts: one batch, read together.
      recipe: see `generate`.
      offline: see `generate`.
      max_new_tokens: see `generate`.
      sampling: see `generate`.
      seed: see `generate`.

    Returns:
      limit -> what `generate_tokens` returns, computed; the padded prompts; and what was prepared.

    Raises:
      PromptError: a prompt that is empty or does not fit the model's context.
      ConfigError: max_new_tokens below 1.
    """
    expect("model", model, Model, "a model, from load()")
    expect("recipe", recipe, (Recipe, type(None)), 'a recipe, as in preset("fast"), or None')
    expect("offline", offline, (Offline, type(None)), "what prepare() returned, or None")
    expect("max_new_tokens", max_new_tokens, (int, np.integer), "a whole number")
    expect("sampling", sampling, Sampling, "Sampling(…)")
    expect("seed", seed, (int, np.integer), "a whole number")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    prompts = pad_prompts(
        [model.tokenizer.encode(text) for text in check_texts(texts)],
        max_positions=model.config.max_positions, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    check_selection(model.params, recipe)
    if offline is None:
        offline = prepare(model, recipe)
    if recipe is not None and recipe.source.decay and not offline.carried:
        begin = first_turn(model.params, model.config, recipe)
        offline = dataclasses.replace(offline, carried=begin)
    run = partial(
        generate_tokens, model.params, prompts, offline, make_key(int(seed)),
        config=model.config, recipe=recipe, sampling=sampling, capacity=bucket(max_new_tokens),
        eos_ids=model.eos_ids,
    )  # fmt: skip
    return lambda n: jax.block_until_ready(run(jax.device_put(np.int32(n)))), prompts, offline


def generate(
    model: Model,
    texts: Sequence[str],
    *,
    recipe: Recipe | None,
    offline: Offline | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    batch_size: int = 1,
) -> Generation:
    """Continues prompts with weights that are quantized for them.

    Args:
      model: from `load`.
      texts: the prompts.
      recipe: how to quantize, see `preset`; None for the unquantized model.
      offline: from `prepare`; None prepares it here, except for recipes that need a corpus. For
        the next turn of a conversation, its `carried` is the last turn's `Generation.moments`.
      max_new_tokens: most new tokens per prompt, >= 1.
      sampling: how tokens are chosen.
      seed: of the sampling, the same for every batch.
      batch_size: prompts that are read together, >= 1. They share one quantized tree, unless the
        recipe's `batch` is "per_prompt". With a decay every batch is a turn of one conversation.

    Returns:
      Tokens, texts, sizes and times, in the order of the prompts.

    Raises:
      PromptError: no list of prompts, or one that is empty or does not fit the model's context.
      ConfigError: max_new_tokens or batch_size below 1.
      NotFiniteError: the logits are not finite.
      Error: an argument of another type.
    """
    expect("batch_size", batch_size, (int, np.integer), "a whole number")
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, got {batch_size}")
    start, listed = time.perf_counter(), check_texts(texts)
    said: dict[str, list[Any]] = {"tokens": [], "texts": [], "prompt_tokens": [], "stopped": []}
    moments: dict[str, Moments] = {}
    shares: list[float] = []
    for at in range(0, len(listed), batch_size):
        if moments and offline is not None:
            offline = dataclasses.replace(offline, carried=moments)
        run, prompts, offline = program(
            model, listed[at : at + batch_size], recipe=recipe, offline=offline,
            max_new_tokens=max_new_tokens, sampling=sampling, seed=seed,
        )  # fmt: skip
        *answer, moments, unreached = run(max_new_tokens)
        tokens, counts, finite = jax.device_get(answer)
        shares += [] if unreached is None else [float(jax.device_get(unreached))] * len(counts)
        if not finite:
            raise_not_finite(model.params, prompts, offline, config=model.config, recipe=recipe)
        new = [row[:n].tolist() for row, n in zip(tokens, counts, strict=True)]
        said["tokens"] += new
        said["texts"] += [model.tokenizer.decode(ids) for ids in new]
        said["prompt_tokens"] += jax.device_get(prompts.valid).sum(axis=1).tolist()
        said["stopped"] += ["end" if len(ids) < max_new_tokens else "limit" for ids in new]
    assert offline is not None
    shapes = decoded_shapes(model.params, model.config, recipe, offline)
    return Generation(
        **said,
        effective_bits=effective_bits(shapes),
        model_bits=model_bits(shapes),
        seconds=time.perf_counter() - start,
        moments=moments,
        unreached_experts=float(np.mean(shares)) if shares else None,
    )

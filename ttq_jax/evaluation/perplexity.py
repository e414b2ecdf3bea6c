"""Perplexity under two protocols, token-weighted.

    window   the weights are quantized from the same window that is scored (the paper's way):
             later tokens help to score earlier ones
    causal   the weights are quantized from the first P tokens, and only the tokens after them are
             scored: what a user gets

Always quote the protocol, the window and P with a number: they change it. `Recipe.prefill` says
which weights read the prompt. A recipe with a refresh refreshes after every n scored tokens, under
`causal` only: a window has nothing after its prompt.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ttq_jax.checkpoint import Model
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.errors import check_fields, expect, shown
from ttq_jax.evaluation import intervals
from ttq_jax.finite import raise_not_finite
from ttq_jax.models.cache import activation_dtype, check_dtype, empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.models.traffic import bytes_per_token
from ttq_jax.offline.calibrate import prepare
from ttq_jax.partition import on_its_mesh, put
from ttq_jax.prefill import check_chunk, decoded_shapes, prefill, reading, requantize
from ttq_jax.prompts import check_windows, pad_prompts
from ttq_jax.quant.head import joined
from ttq_jax.quant.recipe import Recipe
from ttq_jax.sites import observing
from ttq_jax.types import Cache, Moments, Offline, Params, Prompts, effective_bits, model_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """Which tokens the weights come from, and which are scored.

    Attributes:
      kind: "causal" or "window", see the module's docstring.
      window: W, tokens per window, including a begin-of-text token where the model uses one.
      prompt_tokens: P, causal only: the weights come from the first P tokens of each window.
    """

    kind: str = "causal"
    window: int = 512
    prompt_tokens: int = 256

    def __post_init__(self):
        check_fields(self, ConfigError)
        if self.kind not in {"causal", "window"}:
            raise ConfigError(f"protocol: expected 'causal' or 'window', got {shown(self.kind)}")
        if self.window < 2:
            raise ConfigError(f"window: expected at least 2 tokens, got {self.window}")
        if self.kind == "causal" and not 1 <= self.prompt_tokens < self.window:
            raise ConfigError(
                f"prompt tokens: the causal protocol expects 1 <= P < window, got "
                f"P={self.prompt_tokens} and window={self.window}"
            )

    @property
    def read(self) -> int:
        """The first tokens of a window, which make its weights."""
        return self.prompt_tokens if self.kind == "causal" else self.window

    @property
    def scored(self) -> int:
        """Tokens scored per window."""
        return self.window - (self.prompt_tokens if self.kind == "causal" else 1)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A measurement, final or running.

    Attributes:
      perplexity: exp of the mean negative log-likelihood per scored token.
      windows: scored so far.
      scored_tokens: so far.
      seconds: wall clock so far, compilation included.
      effective_bits: per weight of the linear layers, of the weights that score.
      model_bits: the same per parameter of the whole model.
      bytes_per_token: read for each token that is decoded, see `models.traffic`.
      nll: per window, the summed negative log-likelihood of its scored tokens, nats.
    """

    perplexity: float
    windows: int
    scored_tokens: int
    seconds: float
    effective_bits: float
    model_bits: float
    bytes_per_token: int
    nll: tuple[float, ...]


def _nll(
    config: ModelConfig, params: Params, hidden: Float[Array, "T D"], targets: Int[Array, " T"]
) -> Float[Array, ""]:
    """Summed negative log-likelihood, a block of rows at a time: V is large."""
    rows = 64
    padding = -targets.shape[0] % rows
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, rows, hidden.shape[-1])
    weight = jnp.pad(jnp.ones(targets.shape[0], jnp.float32), (0, padding)).reshape(-1, rows)
    targets = jnp.pad(targets, (0, padding)).reshape(-1, rows)

    def block(args: tuple[Array, Array, Array]) -> Array:
        h, t, w = args
        log_probs = jax.nn.log_softmax(logits(config, params, h))
        return -jnp.sum(w * jnp.take_along_axis(log_probs, t[:, None], axis=1)[:, 0])

    return jnp.sum(jax.lax.map(block, (hidden, targets, weight)))


@partial(jax.jit, static_argnames=("config", "recipe", "protocol", "chunk", "cache_dtype"))
def score_window(
    params: Params,
    tokens: Int[Array, " W"],
    offline: Offline,
    *,
    config: ModelConfig,
    recipe: Recipe | None,
    protocol: Protocol,
    chunk: int = 0,
    cache_dtype: str | None = None,
) -> Float[Array, ""]:
    """Negative log-likelihood of one window's scored tokens, one XLA program.

    Args:
      params: the dense tree.
      tokens: the window.
      offline: what the recipe needs besides the prompt.
      config: the model's.
      recipe: how to quantize; None for the unquantized model.
      protocol: what is read, what is scored.
      chunk: what makes the weights is read in parts of so many tokens, see `prefill`.
      cache_dtype: see `generate_tokens`.

    Returns:
      Summed over the `protocol.scored` tokens, nats.
    """
    length = protocol.read
    read = tokens[None, :length]
    prompts = Prompts(read, jnp.ones(read.shape, bool))
    # The last stretch between two refreshes is padded to its full length.
    every = 0 if recipe is None else recipe.source.refresh
    dtype = cache_dtype or activation_dtype(params)
    cache = empty_cache(config, 1, protocol.window + every, dtype)
    hidden, filled, packed, seen, _ = prefill(
        params, prompts, cache, config=config, recipe=recipe, offline=offline, chunk=chunk
    )
    if protocol.kind == "window":
        if recipe is not None and recipe.prefill != "quantized":
            # The first reading was unquantized: score a second one.
            again = reading(chunk, length)
            hidden, _, _ = forward(config, packed, read, prompts.valid, cache, chunks=again)
        return _nll(config, packed, hidden[0, :-1], tokens[1:])
    # As in generation, the first token after the prompt is predicted by the prompt's last state.
    hidden, rest = hidden[0, -1:], tokens[None, length:-1]
    if rest.size and recipe is not None and every:
        anew = lambda m: requantize(params, m, recipe, offline)  # noqa: E731
        after = read_refreshing(config, recipe, packed, rest[0], filled, seen, anew)
        hidden = jnp.concatenate([hidden, after])
    elif rest.size:
        after, _, _ = forward(config, packed, rest, jnp.ones(rest.shape, bool), filled)
        hidden = jnp.concatenate([hidden, after[0]])
    return _nll(config, packed, hidden, tokens[length:])


def read_refreshing(
    config: ModelConfig, recipe: Recipe, packed: Params, tokens: Int[Array, " T"], cache: Cache,
    moments: dict[str, Moments], again: Callable[[dict[str, Moments]], Params],
) -> Float[Array, "T D"]:  # fmt: skip
    """Reads tokens as a refreshing decode loop would have generated them.

    Args:
      config: the model's.
      recipe: its source's `refresh` is n > 0.
      packed: the weights that the prompt made.
      tokens: what follows the prompt.
      cache: with room for them, padded to whole stretches of n.
      moments: of the prompt.
      again: makes weights from moments.

    Returns:
      The final hidden state at every token.
    """
    every, length = recipe.source.refresh, len(tokens)
    padding = -length % every
    stretches = jnp.pad(tokens, (0, padding)).reshape(-1, 1, every)
    real = (jnp.arange(length + padding, dtype=jnp.int32) < length).reshape(-1, 1, every)

    def stretch(carry: tuple, at: tuple) -> tuple[tuple, Array]:
        tree, cache, moments = carry
        read, valid = at
        hidden, cache, seen = forward(
            config, tree, read, valid, cache, project=observing(valid, recipe.reads)
        )
        moments = jax.tree.map(jnp.add, moments, seen)
        return (again(moments), cache, moments), hidden[0]

    _, hidden = jax.lax.scan(stretch, (packed, cache, moments), (stretches, real))
    return hidden.reshape(-1, hidden.shape[-1])[:length]


@on_its_mesh
def window_nll(
    model: Model, window: np.ndarray, *, recipe: Recipe | None, offline: Offline,
    protocol: Protocol, prefill_chunk: int = 0, cache_dtype: str | None = None,
) -> float:  # fmt: skip
    """`score_window` of a loaded model, as a number.

    Args:
      model: the unquantized model.
      window: int32[W] token ids.
      recipe: how to quantize; None for the unquantized model.
      offline: from `prepare`.
      protocol: what is read, what is scored.
      prefill_chunk: see `perplexity`.
      cache_dtype: see `perplexity`.

    Returns:
      Summed over the `protocol.scored` tokens, nats; finite.

    Raises:
      NotFiniteError: it is not.
    """
    how: dict[str, Any] = {"config": model.config, "recipe": recipe, "chunk": prefill_chunk}
    params, offline = joined(model.params, recipe, offline)
    one = score_window(
        params, put(window), offline, protocol=protocol, cache_dtype=cache_dtype, **how
    )
    nll = float(jax.device_get(one))
    if not math.isfinite(nll):
        read = [window[: protocol.read].tolist()]
        prompts = pad_prompts(read, max_positions=model.config.max_positions)
        raise_not_finite(params, prompts, offline, **how)
    return nll


def stream(
    model: Model,
    windows: np.ndarray,
    *,
    recipe: Recipe | None,
    offline: Offline,
    protocol: Protocol,
    prefill_chunk: int = 0,
    cache_dtype: str | None = None,
) -> Iterator[Perplexity]:
    """Scores window after window.

    Args:
      model: the unquantized model.
      windows: int32[n, W] token ids, see `corpora.cut_windows`.
      recipe: how to quantize; None for the unquantized model.
      offline: from `prepare`.
      protocol: what is read, what is scored.
      prefill_chunk: see `perplexity`.
      cache_dtype: see `perplexity`.

    Yields:
      The running measurement after each window.

    Raises:
      ConfigError: windows of another length than the protocol's, or longer than the context; a
        chunk that `prefill.check_chunk` refuses; or a cache_dtype that there is not.
      PromptError: no matrix of this model's token ids.
      NotFiniteError: a window's loss is not finite.
    """
    windows = check_windows(windows, model.config.vocab_size, model.tokenizer)
    check_chunk(prefill_chunk, recipe)
    check_dtype(cache_dtype)
    if windows.shape[1] != protocol.window:
        raise ConfigError(
            f"expected windows of {protocol.window} tokens, got {windows.shape[1]}; cut them with "
            "the protocol's window"
        )
    if protocol.window > model.config.max_positions:
        raise ConfigError(
            f"a window of {protocol.window} tokens does not fit the model's context of "
            f"{model.config.max_positions}; choose a smaller window"
        )
    shapes = decoded_shapes(model.params, model.config, recipe, offline)
    bits, whole, read = (
        effective_bits(shapes), model_bits(shapes), bytes_per_token(shapes, model.config)
    )  # fmt: skip
    start, nll = time.perf_counter(), []
    for window in windows:
        nll.append(window_nll(
            model, window, recipe=recipe, offline=offline, protocol=protocol,
            prefill_chunk=prefill_chunk, cache_dtype=cache_dtype,
        ))  # fmt: skip
        scored = len(nll) * protocol.scored
        yield Perplexity(
            perplexity=float(np.exp(np.sum(nll) / scored)),
            windows=len(nll),
            scored_tokens=scored,
            seconds=time.perf_counter() - start,
            effective_bits=bits,
            model_bits=whole,
            bytes_per_token=read,
            nll=tuple(nll),
        )


def perplexity(
    model: Model,
    windows: np.ndarray,
    *,
    recipe: Recipe | None,
    offline: Offline | None = None,
    protocol: Protocol = Protocol(),
    prefill_chunk: int = 0,
    cache_dtype: str | None = None,
    progress: Callable[[Perplexity, int], None] = lambda running, total: None,
) -> Perplexity:
    """Perplexity of a model on windows of text.

    Args:
      model: the unquantized model.
      windows: int32[n, W] token ids, n >= 1, see `corpora.cut_windows`.
      recipe: how to quantize; None for the unquantized model.
      offline: from `prepare`; None prepares it here, except for recipes that need a corpus.
      protocol: what is read, what is scored.
      prefill_chunk: what makes the weights is read in parts of so many tokens, see `generate`; the
        tokens after it are read at once.
      cache_dtype: how keys and values are stored, see `generate`; all attention reads them so.
      progress: called with the running measurement and the number of windows in all.

    Returns:
      The measurement over all windows.

    Raises:
      ConfigError: no window, windows that do not match the protocol or the context, a chunk that
        `prefill.check_chunk` refuses, or a cache_dtype that there is not.
      NotFiniteError: a window's loss is not finite.
    """
    expect("model", model, Model, "a model, from load()")
    expect("recipe", recipe, (Recipe, type(None)), 'a recipe, as in preset("fast"), or None')
    expect("protocol", protocol, Protocol, "Protocol(…)")
    if not len(windows):
        raise ConfigError("expected at least one window of text, got none")
    if offline is None:
        offline = prepare(model, recipe)
    for running in stream(
        model, windows, recipe=recipe, offline=offline, protocol=protocol,
        prefill_chunk=prefill_chunk, cache_dtype=cache_dtype,
    ):  # fmt: skip
        progress(running, len(windows))
    return running


def interval95(nll: Sequence[float], scored: int) -> tuple[float, float] | None:
    """A 95 % confidence interval of a perplexity, taking the windows as independent draws.

    Args:
      nll: per window, nats.
      scored: tokens scored per window.

    Returns:
      (low, high), None for fewer than five windows: see `intervals.interval95`.
    """
    return intervals.interval95([np.asarray(nll) / scored]) if len(nll) else None

"""How often quantized weights say what the unquantized ones say, on a text.

The weights are made from the first P tokens of a window, as under the causal protocol of
`perplexity`. Both trees then read the rest, each from the prompt's unquantized keys and values. At
every token their next-token distributions p (unquantized) and q (quantized) are compared:

    greedy      share of tokens where both have the same likeliest token
    sampled     mean of Σ min(p, q): how often a draft drawn from q is accepted at temperature 1
                (Leviathan et al., 2023)
    divergence  mean of KL(p ‖ q) = Σ p log(p / q), nats

No token of the text is a label here, so it says more per window than perplexity does. While
speculating, a draft sees the unquantized keys of all but the drafts before it; here it sees
quantized ones back to the prompt. So this is a little below what `speculation` accepts.
"""

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ttq_jax import speculation
from ttq_jax.checkpoint import Model
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.errors import expect
from ttq_jax.evaluation.intervals import mean95
from ttq_jax.finite import raise_not_finite
from ttq_jax.models.cache import activation_dtype, empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.models.traffic import bytes_per_token
from ttq_jax.offline.calibrate import prepare
from ttq_jax.partition import on_its_mesh, put, whole
from ttq_jax.prefill import decoded_shapes
from ttq_jax.prompts import check_windows, pad_prompts
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import Offline, Params, Prompts, effective_bits, model_bits

MEASURES = ("greedy", "sampled", "divergence")

_ROWS = 64
"""Tokens whose distributions are compared at a time: there are as many numbers as tokens in the
vocabulary in each."""


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """A measurement, final or running.

    Attributes:
      greedy: per window, see the module's docstring.
      sampled: likewise.
      divergence: likewise, nats.
      compared: tokens per window at which both were compared.
      seconds: wall clock so far, compilation included.
      effective_bits: per weight of the linear layers, of the quantized weights.
      model_bits: the same per parameter of the whole model.
      bytes_per_token: read for each token that the quantized weights draft.
    """

    greedy: tuple[float, ...]
    sampled: tuple[float, ...]
    divergence: tuple[float, ...]
    compared: int
    seconds: float
    effective_bits: float
    model_bits: float
    bytes_per_token: int

    def describe(self) -> dict[str, Any]:
        """JSON data: means, and their 95 % intervals over windows, None where they are too few."""
        data: dict[str, Any] = {}
        for name in MEASURES:
            values = getattr(self, name)
            data[name] = float(np.mean(values))
            data[f"{name}_interval_95"] = mean95(values)
        return data | {"windows": len(self.greedy), "compared": self.compared * len(self.greedy)}


def _compare(
    config: ModelConfig, params: Params, drafter: Params, hidden: Float[Array, "T D"],
    drafted: Float[Array, "T D"],
) -> Float[Array, " 3"]:  # fmt: skip
    """Sums over tokens of the three measures, a block of rows at a time."""
    padding = -len(hidden) % _ROWS
    blocks = [
        jnp.pad(h, ((0, padding), (0, 0))).reshape(-1, _ROWS, h.shape[-1])
        for h in (hidden, drafted)
    ]
    weight = jnp.pad(jnp.ones(len(hidden), jnp.float32), (0, padding)).reshape(-1, _ROWS)

    def block(args: tuple[Array, Array, Array]) -> Array:
        h, d, w = args
        p, q = logits(config, params, h), logits(config, drafter, d)
        same = (jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)).astype(jnp.float32)
        p, q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
        both = jnp.sum(jnp.exp(jnp.minimum(p, q)), axis=-1)
        apart = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        return jnp.sum(w[None] * jnp.stack([same, both, apart]), axis=-1)

    return jnp.sum(jax.lax.map(block, (*blocks, weight)), axis=0)


@partial(jax.jit, static_argnames=("config", "recipe", "length"))
def compare_window(
    params: Params, tokens: Int[Array, " W"], offline: Offline, *, config: ModelConfig,
    recipe: Recipe, length: int,
) -> Float[Array, " 3"]:  # fmt: skip
    """Greedy, sampled and divergence of one window, one XLA program.

    Args:
      params: the dense tree, with dense tables.
      tokens: the window.
      offline: from `prepare`, with the recipe's tables.
      config: the model's.
      recipe: how to quantize.
      length: P, the tokens that make the weights.

    Returns:
      Means over the W − P − 1 tokens after the first one that the prompt predicts; float32.
    """
    prompt, rest = tokens[None, :length], tokens[None, length:-1]
    cache = empty_cache(config, 1, len(tokens), activation_dtype(params))
    prompts = Prompts(prompt, jnp.ones(prompt.shape, bool))
    _, cache, packed, *_ = speculation.read(
        params, prompts, cache, config=config, recipe=recipe, offline=offline
    )
    tree, valid = speculation.drafter(packed, offline), jnp.ones(rest.shape, bool)
    hidden, _, _ = forward(config, params, rest, valid, cache)
    drafted, _, _ = forward(config, tree, rest, valid, cache)
    return whole(_compare(config, params, tree, hidden[0], drafted[0]) / rest.size)


def stream(
    model: Model, windows: np.ndarray, *, recipe: Recipe, offline: Offline, prompt_tokens: int
) -> Iterator[Acceptance]:
    """Compares window after window.

    Args:
      model: see `acceptance`, as all the others.
      windows: see there.
      recipe: see there.
      offline: see there.
      prompt_tokens: see there.

    Yields:
      The running measurement after each window.

    Raises:
      ConfigError: see `acceptance`.
      NotFiniteError: see there.
    """
    speculation.check(1, recipe, model)
    windows = check_windows(windows, model.config.vocab_size, model.tokenizer)
    length, context = windows.shape[1], model.config.max_positions
    if not 1 <= prompt_tokens < length - 1:
        raise ConfigError(
            f"acceptance: expected 1 <= P < window - 1, got P={prompt_tokens} and window={length}; "
            "at least one token has to be drafted after the first"
        )
    if length > context:
        raise ConfigError(
            f"a window of {length} tokens does not fit the model's context of {context}; choose a "
            "smaller window"
        )
    shapes = decoded_shapes(model.params, model.config, recipe, offline)
    sizes = effective_bits(shapes), model_bits(shapes), bytes_per_token(shapes, model.config)
    start, found = time.perf_counter(), np.zeros((0, 3))
    for window in windows:
        found = np.vstack([found, _measured(model, window, recipe, offline, prompt_tokens)])
        greedy, sampled, divergence = map(tuple, found.T.tolist())
        yield Acceptance(
            greedy, sampled, divergence, length - prompt_tokens - 1, time.perf_counter() - start,
            *sizes,
        )  # fmt: skip


@on_its_mesh
def _measured(
    model: Model, window: np.ndarray, recipe: Recipe, offline: Offline, prompt_tokens: int
) -> np.ndarray:
    """`compare_window` of a loaded model, as numbers.

    Raises:
      NotFiniteError: one of them is not finite.
    """
    how: dict[str, Any] = {"config": model.config, "recipe": recipe}
    one = compare_window(model.params, put(window), offline, length=prompt_tokens, **how)
    found = np.asarray(jax.device_get(one), np.float64)
    if not np.isfinite(found).all():
        read = [window[:prompt_tokens].tolist()]
        prompts = pad_prompts(read, max_positions=model.config.max_positions)
        raise_not_finite(model.params, prompts, offline, **how)
    return found


def acceptance(
    model: Model, windows: np.ndarray, *, recipe: Recipe, offline: Offline | None = None,
    prompt_tokens: int = 256,
) -> Acceptance:  # fmt: skip
    """How often quantized weights agree with the unquantized ones on windows of text.

    Args:
      model: the unquantized model, its tables too.
      windows: int32[n, W] token ids, n >= 1, see `corpora.cut_windows`.
      recipe: how to quantize.
      offline: from `prepare`; None prepares it here, except for recipes that need a corpus.
      prompt_tokens: P, 1 to W − 2: the weights come from the first P tokens of each window.

    Returns:
      The measurement over all windows.

    Raises:
      ConfigError: no window, one of another length, or a recipe that cannot draft.
      PromptError: no matrix of this model's token ids.
      NotFiniteError: a window's distributions are not finite.
    """
    expect("model", model, Model, "a model, from load()")
    expect("recipe", recipe, (Recipe, type(None)), 'a recipe, as in preset("fast")')
    if not len(windows):
        raise ConfigError("expected at least one window of text, got none")
    speculation.check(1, recipe, model)
    made = prepare(model, recipe) if offline is None else offline
    *_, last = stream(model, windows, recipe=recipe, offline=made, prompt_tokens=prompt_tokens)
    return last

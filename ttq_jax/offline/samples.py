"""A prior without data: text that the model writes itself.

Every window begins with a token drawn uniformly from the vocabulary and goes on by sampling from
the model, as LLM-QAT (Liu et al., 2023, arXiv:2305.17888) makes its training data. It costs one
generation per model and is more accurate than the profile of `ttq_jax.offline.prior`, which costs
nothing (`experiments/RESULTS.md`, short prompts).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ttq_jax.checkpoint import Model
from ttq_jax.config import ModelConfig
from ttq_jax.decode import decode
from ttq_jax.models.cache import activation_dtype, empty_cache
from ttq_jax.partition import whole
from ttq_jax.prefill import last_hidden, prefill
from ttq_jax.sampling import FIXED, Sampling, make_key
from ttq_jax.types import Offline, Params, Prompts


def sample_windows(
    model: Model, *, rows: int = 8, length: int = 256, seed: int = 0
) -> Int[Array, "rows length"]:
    """Text of the unquantized model, sampled at temperature 1 by a fixed key.

    Args:
      model: writes the text.
      rows: windows, sampled side by side; >= 1.
      length: tokens of each, >= 2; never more than the model's context.
      seed: of the draws.

    Returns:
      Token ids. An end token does not end a window: another text follows.
    """
    config = model.config
    capacity = min(length, config.max_positions) - 1
    return _written(
        model.params, make_key(seed, FIXED), config=config, rows=rows, capacity=capacity
    )


@partial(jax.jit, static_argnames=("config", "rows", "capacity"))
def _written(
    params: Params, key: Array, *, config: ModelConfig, rows: int, capacity: int
) -> Int[Array, "rows length"]:
    """A drawn token and a continuation sampled from the model."""
    first_key, key = jax.random.split(key)
    first = jax.random.randint(first_key, (rows, 1), 0, config.vocab_size, jnp.int32)
    prompts = Prompts(first, jnp.ones(first.shape, bool))
    cache = empty_cache(config, len(first), 1 + capacity, activation_dtype(params))
    hidden, cache, tree, *_ = prefill(
        params, prompts, cache, config=config, recipe=None, offline=Offline()
    )
    out, *_ = decode(
        tree, cache, last_hidden(hidden, prompts), key, jnp.asarray(capacity, jnp.int32),
        config=config, sampling=Sampling(temperature=1.0), capacity=capacity, eos_ids=(),
    )  # fmt: skip
    return whole(jnp.concatenate([first, out], axis=1))

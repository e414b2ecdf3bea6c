"""Agreement of two trees, against NumPy on their full distributions."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config, small_params

from ttq_jax.evaluation.acceptance import compare_window
from ttq_jax.evaluation.intervals import mean95
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.prefill import prefill
from ttq_jax.quant.head import head_of
from ttq_jax.quant.presets import preset
from ttq_jax.types import Offline, Prompts

CONFIG = small_config()
PARAMS = small_params(CONFIG)
W, P = 90, 20


@partial(jax.jit, static_argnames="recipe")
def quantized_for(prompts, recipe):
    cache = empty_cache(CONFIG, 1, P, jnp.float32)
    return prefill(PARAMS, prompts, cache, config=CONFIG, recipe=recipe, offline=Offline())[2]


@pytest.mark.parametrize(
    "recipe", [preset("paper", bits=3), preset("fast", bits=3, group_size=32, moments="prompt")]
)
def test_against_numpy(recipe):
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 97, W), jnp.int32)
    head = head_of(PARAMS, recipe)
    how = {"config": CONFIG, "recipe": recipe}
    found = compare_window(PARAMS, tokens, Offline(head=head), length=P, **how)

    prompts = Prompts(tokens[None, :P], jnp.ones((1, P), bool))
    bare = dataclasses.replace(recipe, head=None)
    packed = quantized_for(prompts, bare) | (head or {})

    @jax.jit
    def after(tree, tokens, cache):
        tokens = tokens[None]
        hidden, cache, _ = forward(CONFIG, tree, tokens, jnp.ones(tokens.shape, bool), cache)
        return jax.nn.softmax(logits(CONFIG, tree, hidden[0])), cache

    _, read = after(PARAMS, tokens[:P], empty_cache(CONFIG, 1, W, jnp.float32))
    p, q = (np.float64(after(t, tokens[P:-1], read)[0]) for t in (PARAMS, packed))
    want = [
        np.mean(p.argmax(1) == q.argmax(1)),
        np.minimum(p, q).sum(1).mean(),
        (p * np.log(p / q)).sum(1).mean(),
    ]
    np.testing.assert_allclose(found, want, rtol=2e-4)
    assert 0 < found[0] < 1, "the two always agree, or never: the case shows nothing"


def test_the_interval_of_a_mean():
    values = [0.9, 0.8, 0.95, 0.85, 0.7]
    low, high = mean95(values)
    # t of 4 degrees at 97.5 % is 2.776.
    assert (high - low) / 2 == pytest.approx(2.776 * np.std(values, ddof=1) / 5**0.5, rel=1e-3)
    assert (high + low) / 2 == pytest.approx(np.mean(values))
    assert mean95(values[:4]) is None

"""Prefill in two streams: what is rounded, what fills the cache, and what there is to choose."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import OPT, prompts_of, random_rows, small_config, small_params

from ttq_jax.config import ConfigError
from ttq_jax.linear import dense_weight
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward
from ttq_jax.prefill import prefill
from ttq_jax.quant.lowrank import LowRankRule
from ttq_jax.quant.presets import preset
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.recipe_text import from_toml, to_toml, with_settings
from ttq_jax.quant.source import Source
from ttq_jax.quant.streams import Correction, apart
from ttq_jax.quant.tree import check_selection
from ttq_jax.types import Offline


def as_least_squares(exact, drifted, w, rule, count):
    """The corrected weight from a stacked least-squares problem, in float64."""
    exact, drifted, w = (np.asarray(a, np.float64) for a in (exact, drifted, w))
    pull = np.sqrt(rule.damping * np.sum(drifted**2) / drifted.shape[1])
    rows = np.vstack([drifted, pull * np.eye(len(w))])
    wanted = np.vstack([exact @ w, pull * w])
    best = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return w + rule.strength * (best - w)


@pytest.mark.parametrize("tokens", [7, 40], ids=["fewer than channels", "more"])
@pytest.mark.parametrize("rule", [Correction(), Correction(strength=1.0, damping=0.1)], ids=str)
def test_the_correction_is_the_least_squares_solution(tokens, rule):
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(2, tokens, 24)).astype(np.float32)
    drifted = exact + 0.3 * rng.normal(size=exact.shape).astype(np.float32)
    valid = np.ones((2, tokens), bool)
    valid[1, 3:] = False
    w = rng.normal(size=(24, 16)).astype(np.float32)
    both = jnp.concatenate([exact, np.where(valid[..., None], drifted, np.nan)])
    found = jax.jit(lambda x: apart(x, jnp.asarray(valid), rule).moved(jnp.asarray(w)))(both)
    wanted = as_least_squares(exact[valid], drifted[valid], w, rule, valid.sum())
    assert np.abs(wanted - w).max() > 0.01
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@partial(jax.jit, static_argnames=("config", "recipe"))
def read(params, prompts, *, config, recipe):
    """What `prefill` returns, with room for four tokens more."""
    cache = empty_cache(config, len(prompts.tokens), prompts.tokens.shape[1] + 4, jnp.float32)
    return prefill(params, prompts, cache, config=config, recipe=recipe, offline=Offline())


CASES = {
    "llama": ({}, Recipe(prefill="both", low_rank=LowRankRule(mean=True))),
    "opt": (OPT, Recipe(prefill="both")),
    "second order": ({}, preset("best", moments="prompt", head=None, prefill="both")),
}


@pytest.mark.parametrize("case", CASES)
def test_the_unquantized_weights_read_the_prompt_for_the_answer(case):
    changes, recipe = CASES[case]
    config = small_config(**changes)
    params = small_params(config)
    prompts = prompts_of(random_rows([9, 5]), 12, side="left")
    hidden, cache, packed, _, _ = read(params, prompts, config=config, recipe=recipe)
    plain, filled, *_ = read(params, prompts, config=config, recipe=None)
    real = np.asarray(prompts.valid)
    np.testing.assert_allclose(hidden[real], plain[real], rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(cache.k, filled.k, rtol=1e-4, atol=1e-5)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, filled)
    padded = prompts_of(random_rows([9, 5]), 12, side="left", fill=7)
    again = read(params, padded, config=config, recipe=recipe)[2]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, packed, again)), "padding is not read"


def test_without_a_correction_the_weights_are_those_of_a_quantized_prefill():
    config = small_config()
    params = small_params(config)
    prompts = prompts_of(random_rows([9, 5]), 12, side="left")
    alone = Recipe(prefill="both", correction=Correction(strength=0.0))
    both, one, full = (
        read(params, prompts, config=config, recipe=recipe)[2]
        for recipe in (alone, Recipe(prefill="quantized"), Recipe())
    )
    differ = 0
    for name in ("q", "o", "down"):
        made, wanted, other = (
            np.asarray(dense_weight(tree["layers"][name]["kernel"])) for tree in (both, one, full)
        )
        # A code on the edge between two may fall to either side.
        assert np.mean(np.abs(made - wanted) > 1e-4) < 0.002
        differ += np.sum(np.abs(made - other) > 1e-4)
    assert differ > 0, "the layers before them change the moments"


def test_the_correction_brings_the_quantized_stream_nearer():
    """On the prompt itself, layer by layer: what it is made for."""
    config = small_config(n_layers=4)
    params = small_params(config)
    prompts = prompts_of(random_rows([24]), 24)
    wanted, *_ = forward(
        config, params, prompts.tokens, prompts.valid, empty_cache(config, 1, 24, jnp.float32)
    )

    def error(recipe):
        tree = read(params, prompts, config=config, recipe=recipe)[2]
        cache = empty_cache(config, 1, 24, jnp.float32)
        hidden, *_ = forward(config, tree, prompts.tokens, prompts.valid, cache)
        return float(jnp.mean(jnp.square(hidden - wanted)))

    recipe = preset("ttq", bits=3)
    moved = [
        error(dataclasses.replace(recipe, prefill="both", correction=Correction(strength=s)))
        for s in (0.0, 1.0)
    ]
    assert moved[1] < 0.8 * moved[0], moved


def test_choices_that_do_not_go_together():
    with pytest.raises(ConfigError, match=r"needs moments of the prompt and no refresh.*corpus"):
        Recipe(prefill="both", moments="corpus")
    with pytest.raises(ConfigError, match=r"refresh = 8"):
        Recipe(prefill="both", moments=Source(refresh=8))
    with pytest.raises(ConfigError, match=r"correction is read by prefill = 'both', got .*'full'"):
        Recipe(correction=Correction(strength=1.0))
    for wrong in ({"strength": 1.5}, {"strength": -0.1}, {"damping": 0.0}, {"damping": np.inf}):
        with pytest.raises(ConfigError, match=r"strength in \[0, 1\] and a finite damping above 0"):
            Correction(**wrong)
    experts = jax.eval_shape(partial(small_params, small_config(n_experts=4, experts_per_token=2)))
    with pytest.raises(ConfigError, match=r"does not serve mixtures of experts"):
        check_selection(experts, Recipe(prefill="both"))


def test_as_text():
    recipe = with_settings(Recipe(), ["prefill=both", "correction.strength=0.25"])
    assert recipe.correction == Correction(strength=0.25)
    assert from_toml(to_toml(recipe)) == recipe
    assert "correction" not in Recipe().describe(), "rows from before there was such a choice"

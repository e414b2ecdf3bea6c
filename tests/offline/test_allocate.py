"""Widths within a budget: what is measured, and that the purchase is the best one."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from likelihoods import predictions, slope
from small import prompts_of, random_rows, small_config, small_params

from ttq_jax.config import ConfigError
from ttq_jax.generate import generate_tokens
from ttq_jax.linear import dense_weight
from ttq_jax.offline.allocate import Measured, allocate, measure_widths, sensitivities
from ttq_jax.offline.calibrate import observe_tokens
from ttq_jax.prefill import decoded_shapes
from ttq_jax.quant.presets import preset
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.quant.tree import quantize_tree
from ttq_jax.sampling import Sampling
from ttq_jax.types import SITE_OF, Offline, effective_bits, kernels

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow

CONFIG = small_config()
PARAMS = small_params(CONFIG)
WIDTHS = (2, 3, 4)
COARSE = preset("ttq", group_size=16)


WINDOWS = np.asarray(random_rows([64] * 4), np.int32)
PROMPT = 32


@functools.cache
def measured(recipe=COARSE, windows=2):
    return measure_widths(
        PARAMS, WINDOWS[:windows], recipe, Offline(), config=CONFIG, prompt_tokens=PROMPT,
        widths=WIDTHS,
    )  # fmt: skip


def at_width(recipe, bits):
    return dataclasses.replace(recipe, grid=dataclasses.replace(recipe.grid, bits=bits))


@functools.partial(jax.jit, static_argnames="recipe")
def made_from(window, recipe):
    """The packed tree of the window's prompt."""
    moments = observe_tokens(PARAMS, window[None, :PROMPT], config=CONFIG, reads=recipe.reads)
    return quantize_tree(PARAMS, recipe, moments, {})


def test_sensitivities_are_the_slopes_of_the_drawn_labels_likelihood():
    tokens, key, rng = jnp.asarray(WINDOWS[0]), jax.random.key(3), np.random.default_rng(0)
    seen, gradient = sensitivities(PARAMS, tokens, key, config=CONFIG)
    for name in ("q", "v", "o", "up", "down"):
        kernel = PARAMS["layers"][name]["kernel"]
        change = rng.normal(size=kernel.shape) * 2e-3 * float(jnp.std(kernel))
        found = slope(CONFIG, PARAMS, tokens, key, name, change)
        want = np.einsum("lti,lio,lto->", seen[SITE_OF[name]], change, gradient[name])
        np.testing.assert_allclose(found, want, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("rounding", [None, SecondOrder(steps=1, smallest=1.0)])
def test_errors_are_those_of_the_packed_trees(rounding):
    recipe = COARSE if rounding is None else dataclasses.replace(COARSE, rounding=rounding)
    got = measured(recipe)
    for i, bits in enumerate(WIDTHS):
        want = dict.fromkeys(got.errors, 0.0)
        for w, window in enumerate(WINDOWS[:2]):
            tree = made_from(jnp.asarray(window), at_width(recipe, bits))
            seen, gradient = jax.tree.map(
                lambda a: np.asarray(a, np.float64)[:, PROMPT:],
                sensitivities(PARAMS, jnp.asarray(window), jax.random.key(w), config=CONFIG),
            )
            for name in want:
                off = np.asarray(PARAMS["layers"][name]["kernel"], np.float64)
                off = off - np.asarray(dense_weight(tree["layers"][name]["kernel"]), np.float64)
                change = np.einsum("lti,lio,lto->lt", seen[SITE_OF[name]], off, gradient[name])
                want[name] = want[name] + 0.25 * (change**2).mean(1)
        for name in want:
            np.testing.assert_allclose(got.errors[name][:, i], want[name], rtol=5e-3)
        stored = sum(got.bits[n][i] * len(e) for n, e in got.errors.items())
        weights = sum(got.weights[n] * len(e) for n, e in got.errors.items())
        assert stored / weights == pytest.approx(effective_bits(tree))


def test_the_estimate_is_the_divergence_of_the_quantized_model():
    """Up to a factor of two: errors of different weights are not quite independent."""
    total = dict.fromkeys(WIDTHS, 0.0)
    for bits in WIDTHS:
        for window in jnp.asarray(WINDOWS):
            before = predictions(CONFIG, PARAMS, window)
            after = predictions(CONFIG, made_from(window, at_width(COARSE, bits)), window)
            divergence = jnp.sum(jnp.exp(before) * (before - after), axis=1)
            total[bits] += float(jnp.mean(divergence[PROMPT:])) / len(WINDOWS)
    got = measured(windows=len(WINDOWS))
    estimates = {b: sum(e[:, i].sum() for e in got.errors.values()) for i, b in enumerate(WIDTHS)}
    for bits in (3, 4):
        assert 0.5 < estimates[bits] / total[bits] < 2, (estimates, total)
    assert total[2] > 4 * total[4]


def test_wider_codes_leave_less_error():
    for errors in measured().errors.values():
        assert np.all(np.diff(errors, axis=1) < 0)


def test_the_best_purchase_of_all_within_what_one_item_costs():
    rng = np.random.default_rng(0)
    errors = {n: 0.25 ** np.arange(3) * rng.gamma(1.0, size=(2, 1)) for n in ("q", "o", "down")}
    bits = {
        "q": np.array([2.0, 3, 4]),
        "o": np.array([2.0, 3, 4]),
        "down": 3 * np.array([2.0, 3, 4]),
    }
    got = Measured(WIDTHS, errors, bits, {"q": 1, "o": 1, "down": 3})
    items = [(n, layer) for n in errors for layer in range(2)]

    def cost(choice):
        return sum(bits[n][c] for (n, _), c in zip(items, choice, strict=True))

    def left(choice):
        return sum(errors[n][layer, c] for (n, layer), c in zip(items, choice, strict=True))

    every = list(itertools.product(range(3), repeat=len(items)))
    # A knapsack's greedy choice may miss the optimum by what its last item costs.
    item = max(b[1] - b[0] for b in bits.values())
    for budget in (2.3, 2.6, 3.0, 3.3, 4.0):
        rules = allocate(got, budget)
        recipe = Recipe(widths=rules)
        choice = [WIDTHS.index(recipe.grids(n, 2)[layer].bits) for n, layer in items]
        assert cost(choice) <= budget * 10
        best = min(left(c) for c in every if cost(c) <= budget * 10 - item)
        assert left(choice) <= best + 1e-12


@pytest.mark.parametrize("budget", [3.5, 3.9, 4.6])
def test_the_budget_is_kept_by_what_is_stored(budget):
    recipe = preset("ttq", group_size=32)
    rules = allocate(measured(recipe), budget)
    mixed = dataclasses.replace(recipe, widths=rules)
    bits = effective_bits(decoded_shapes(PARAMS, CONFIG, mixed, Offline()))
    largest = max(k.size / len(k) for k in kernels(PARAMS["layers"]).values())
    total = sum(k.size for k in kernels(PARAMS["layers"]).values())
    # Of mixed widths, two int32 per layer say which stack holds it and where.
    index = 64 * sum(len(k) for k in kernels(PARAMS["layers"]).values()) / total
    assert budget - 2 * largest / total <= bits <= budget + index


def test_a_budget_below_the_narrowest_width_is_refused():
    with pytest.raises(ConfigError, match=r"a budget of at least \d\.\d+ stored bits .*, got 2"):
        allocate(measured(), 2.0)


def test_an_allocated_recipe_is_one_program_for_all_prompts():
    recipe = preset("ttq", group_size=32)
    rules = allocate(measured(recipe), 3.5)
    recipe = dataclasses.replace(recipe, widths=rules)
    assert len({rule.bits for rule in rules}) > 1
    before = generate_tokens._cache_size()
    for seed in (0, 1):
        generate_tokens(
            PARAMS, prompts_of(random_rows([20 + seed]), 32), Offline(), jax.random.key(0),
            jnp.asarray(4, jnp.int32), config=CONFIG, recipe=recipe, sampling=Sampling(),
            capacity=8, eos_ids=(),
        )  # fmt: skip
    assert generate_tokens._cache_size() == before + 1


@pytest.mark.parametrize("prompt", [0, 64])
def test_a_window_is_a_prompt_and_what_follows_it(prompt):
    with pytest.raises(ConfigError, match=f"more than {prompt} tokens, got 4 of 64"):
        measure_widths(
            PARAMS, WINDOWS, COARSE, Offline(), config=CONFIG, prompt_tokens=prompt, widths=WIDTHS
        )

"""Widths within a budget: what is measured, and that the purchase is the best one."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import prompts_of, random_rows, small_config, small_params

from ttq_jax.allocate import Measured, allocate, measure_widths
from ttq_jax.calibrate import observe_tokens
from ttq_jax.config import ConfigError
from ttq_jax.generate import generate_tokens
from ttq_jax.linear import dense_weight
from ttq_jax.prefill import decoded_shapes
from ttq_jax.quant.moments import Reads
from ttq_jax.quant.recipe import Recipe, preset
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.quant.tree import quantize_tree
from ttq_jax.sampling import Sampling
from ttq_jax.types import SITE_OF, Offline, effective_bits, kernels

CONFIG = small_config()
PARAMS = small_params(CONFIG)
WIDTHS = (2, 3, 4)
COARSE = preset("ttq", group_size=16)


def seen(span=0):
    tokens = prompts_of(random_rows([32]), 32).tokens
    return observe_tokens(PARAMS, tokens, config=CONFIG, reads=Reads((2.0,), span))


def measured(recipe=COARSE, span=0):
    return measure_widths(PARAMS, recipe, seen(span), Offline(), WIDTHS)


@pytest.mark.parametrize("span", [0, -1])
def test_errors_are_those_of_the_packed_trees(span):
    recipe = COARSE
    if span:
        recipe = dataclasses.replace(recipe, rounding=SecondOrder(steps=1, smallest=1.0))
    got, moments = measured(recipe, span), seen(span)
    for i, bits in enumerate(WIDTHS):
        at = dataclasses.replace(recipe, grid=dataclasses.replace(recipe.grid, bits=bits))
        tree = quantize_tree(PARAMS, at, moments, {})
        for name in ("q", "down"):
            w = np.asarray(PARAMS["layers"][name]["kernel"], np.float64)
            error = w - np.asarray(dense_weight(tree["layers"][name]["kernel"]), np.float64)
            m = moments[SITE_OF[name]]
            if span:
                gram = np.asarray(m.gram, np.float64)[:, 0, : w.shape[1], : w.shape[1]]
            else:
                gram = np.stack([np.diag(row) for row in np.asarray(m.sums[:, 0], np.float64)])
            left, whole = (np.einsum("lin,lij,ljn->l", a, gram, a) for a in (error, w))
            np.testing.assert_allclose(got.errors[name][:, i], left / whole, rtol=2e-3)
        stored = sum(got.bits[n][i] * len(e) for n, e in got.errors.items())
        weights = sum(got.weights[n] * len(e) for n, e in got.errors.items())
        assert stored / weights == pytest.approx(effective_bits(tree))


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
    rules = allocate(measure_widths(PARAMS, recipe, seen(), Offline(), WIDTHS), budget)
    mixed = dataclasses.replace(recipe, widths=rules)
    bits = effective_bits(decoded_shapes(PARAMS, CONFIG, mixed, Offline()))
    largest = max(k.size / len(k) for k in kernels(PARAMS["layers"]).values())
    total = sum(k.size for k in kernels(PARAMS["layers"]).values())
    assert budget - 2 * largest / total <= bits <= budget


def test_a_budget_below_the_narrowest_width_is_refused():
    with pytest.raises(ConfigError, match=r"expected a budget of at least \d\.\d+ bits .*; got 2"):
        allocate(measured(), 2.0)


def test_an_allocated_recipe_is_one_program_for_all_prompts():
    recipe = preset("ttq", group_size=32)
    rules = allocate(measure_widths(PARAMS, recipe, seen(), Offline(), WIDTHS), 3.5)
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

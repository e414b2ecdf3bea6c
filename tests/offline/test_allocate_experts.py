"""Widths of a mixture of experts: what is measured of experts that a text reaches more or less."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from likelihoods import predictions, slope
from small import random_rows, small_config, small_params

from ttq_jax.linear import dense_weight
from ttq_jax.offline.allocate import allocate, measure_widths, sensitivities
from ttq_jax.offline.calibrate import observe_tokens
from ttq_jax.offline.prior import for_unreached
from ttq_jax.prefill import decoded_shapes
from ttq_jax.quant.presets import preset
from ttq_jax.quant.source import blend_all
from ttq_jax.quant.tree import quantize_tree
from ttq_jax.types import EXPERT_SITES, SITE_OF, Offline, effective_bits, kernels

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow

E = 8
CONFIG = small_config(
    d_model=32, embed_dim=32, n_heads=2, n_kv_heads=1, d_ff=24, n_experts=E, experts_per_token=2
)
PARAMS = small_params(CONFIG, seed=1)
PARAMS["layers"]["router"]["embedding"] *= 5.0
WIDTHS, PROMPT = (2, 3, 4), 12
COARSE = preset("ttq", group_size=16)
WINDOWS = np.asarray(random_rows([48] * 4), np.int32)
OFFLINE = Offline(moments=for_unreached(PARAMS, {}, config=CONFIG, reads=COARSE.reads))


@functools.cache
def measured(windows=2):
    return measure_widths(
        PARAMS, WINDOWS[:windows], COARSE, OFFLINE, config=CONFIG, prompt_tokens=PROMPT,
        widths=WIDTHS,
    )  # fmt: skip


def moments_of(window):
    prompt = jnp.asarray(window[None, :PROMPT])
    seen = observe_tokens(PARAMS, prompt, config=CONFIG, reads=COARSE.reads)
    return {s: blend_all(m, OFFLINE.moments.get(s), COARSE.source) for s, m in seen.items()}, seen


@functools.partial(jax.jit, static_argnames="bits")
def made_from(moments, bits):
    recipe = dataclasses.replace(COARSE, grid=dataclasses.replace(COARSE.grid, bits=bits))
    return quantize_tree(PARAMS, recipe, moments, {})


def changes(seen, gradient, off):
    """g·δ of every layer and token, float64; of experts, the sum over a token's rows."""
    if not hasattr(seen, "expert"):
        return np.einsum("lti,lio,lto->lt", seen, off, gradient, dtype=np.float64)
    rows, token, expert = (np.asarray(a) for a in (seen.rows, seen.token, seen.expert))
    out = np.zeros((len(rows), WINDOWS.shape[1] + 1))
    for layer in range(len(rows)):
        at = off[layer, expert[layer]]
        each = np.einsum("nri,nio,nro->nr", rows[layer], at, gradient[layer], dtype=np.float64)
        np.add.at(out[layer], token[layer], each)
    return out[:, :-1]


def test_sensitivities_are_the_slopes_of_the_drawn_labels_likelihood():
    tokens, key, rng = jnp.asarray(WINDOWS[0]), jax.random.key(3), np.random.default_rng(0)
    seen, gradient = sensitivities(PARAMS, tokens, key, config=CONFIG)
    for name in ("v", "gate", "up", "down"):
        kernel = PARAMS["layers"][name]["kernel"]
        # So small that no token goes to another expert: there the likelihood would jump.
        change = rng.normal(size=kernel.shape) * 5e-5 * float(jnp.std(kernel))
        found = slope(CONFIG, PARAMS, tokens, key, name, change)
        want = changes(seen[SITE_OF[name]], gradient[name], change).sum()
        np.testing.assert_allclose(found, want, rtol=0.05, atol=1e-5)


def test_errors_are_those_of_the_packed_trees():
    got, unreached = measured(), 0
    want = {name: np.zeros((CONFIG.n_layers, len(WIDTHS))) for name in got.errors}
    for w, window in enumerate(WINDOWS[:2]):
        moments, before = moments_of(window)
        unreached += sum(int((before[site].count == 0).sum()) for site in EXPERT_SITES)
        seen, gradient = sensitivities(
            PARAMS, jnp.asarray(window), jax.random.key(w), config=CONFIG
        )
        for i, bits in enumerate(WIDTHS):
            tree = made_from(moments, bits)
            for name, errors in want.items():
                off = np.asarray(PARAMS["layers"][name]["kernel"], np.float64)
                off = off - np.asarray(dense_weight(tree["layers"][name]["kernel"]), np.float64)
                change = changes(seen[SITE_OF[name]], gradient[name], off)[:, PROMPT:]
                errors[:, i] += 0.25 * (change**2).mean(1)
            stored = sum(got.bits[n][i] for n in got.errors) / sum(got.weights.values())
            assert stored == pytest.approx(effective_bits(tree))
    assert unreached > 0  # experts that the prompt did not reach are measured too, with the prior
    for name, errors in want.items():
        np.testing.assert_allclose(got.errors[name], errors, rtol=5e-3)


def test_the_estimate_is_the_divergence_of_the_quantized_model():
    """Up to a factor of two, of this model: of five, it was up to three.

    Of what is left at more bits, most is tokens that go to other experts.
    """
    got = measured(windows=len(WINDOWS))
    for i, bits in enumerate(WIDTHS):
        total = 0.0
        for window in WINDOWS:
            tokens = jnp.asarray(window)
            before = predictions(CONFIG, PARAMS, tokens)
            after = predictions(CONFIG, made_from(moments_of(window)[0], bits), tokens)
            divergence = jnp.sum(jnp.exp(before) * (before - after), axis=1)
            total += float(jnp.mean(divergence[PROMPT:])) / len(WINDOWS)
        estimate = sum(e[:, i].sum() for e in got.errors.values())
        if bits > 2:
            assert 0.5 < estimate / total < 2, (bits, estimate, total)


@pytest.mark.parametrize("budget", [5.3, 5.8])
def test_the_budget_is_kept_by_what_is_stored(budget):
    mixed = dataclasses.replace(COARSE, widths=allocate(measured(), budget))
    assert len({rule.bits for rule in mixed.widths}) > 1
    bits = effective_bits(decoded_shapes(PARAMS, CONFIG, mixed, OFFLINE))
    stacks = kernels(PARAMS["layers"]).values()
    total, largest = sum(k.size for k in stacks), max(k.size / len(k) for k in stacks)
    # Of mixed widths, two int32 per layer say which stack holds it and where.
    index = 64 * sum(map(len, stacks)) / total
    assert budget - 2 * largest / total <= bits <= budget + index


def test_experts_need_a_prior():
    with pytest.raises(ValueError, match="expected a prior for experts that no token reaches"):
        measure_widths(
            PARAMS, WINDOWS, COARSE, Offline(), config=CONFIG, prompt_tokens=PROMPT, widths=WIDTHS
        )

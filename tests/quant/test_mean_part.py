"""The part of a rounding error that the mean input excites: moments about the mean, and a rank."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ttq_jax as ttq
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.describe import low_rank_in_short
from ttq_jax.linear import dense_weight, linear
from ttq_jax.offline.calibrate import observe_tokens
from ttq_jax.quant.convert import quantize, quantize_site
from ttq_jax.quant.grid import Grid
from ttq_jax.quant.lowrank import LowRankRule, truncated_svd
from ttq_jax.quant.moments import Reads, about_mean, mean_input, observe
from ttq_jax.quant.presets import preset
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.scaling import NoScale
from ttq_jax.quant.source import Source, blend

D_IN, D_OUT = 44, 24
packing = jax.jit(quantize, static_argnames="recipe")
MEAN = LowRankRule(mean=True)


def weight(seed=0):
    return np.random.default_rng(seed).normal(size=(D_IN, D_OUT)).astype(np.float32)


def inputs(tokens=200, seed=1):
    """Channels of unlike power, a few of which hardly move about a large mean."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, D_IN)) * np.exp(rng.normal(size=D_IN))
    x[:, [3, 20]] = 30 + x[:, [3, 20]] / 10
    return x.astype(np.float32)


def seen(x, recipe):
    return observe(jnp.asarray(x), jnp.ones(len(x), bool), recipe.reads)


def packed(w, x, recipe, factors=None):
    return packing(jnp.asarray(w), seen(x, recipe), recipe, factors)


def with_mean(recipe, mean=True, **how):
    return dataclasses.replace(recipe, low_rank=LowRankRule(mean=mean, **how))


@pytest.mark.parametrize("span", [0, 16])
def test_variances_take_the_place_of_powers(span):
    x = inputs()
    reads = Reads((1.0, 2.0), span, first=True)
    valid = np.arange(len(x)) % 5 > 0
    # What padding holds has no effect.
    noisy = np.where(valid[:, None], x, np.nan)
    seen = observe(jnp.asarray(noisy), jnp.asarray(valid), reads)
    got = about_mean(seen)
    real = x[valid].astype(np.float64)
    left = real - real.mean(0)
    np.testing.assert_allclose(mean_input(got), real.mean(0), rtol=1e-5, atol=1e-5)
    # A difference of two sums in float32 is off by some of their last bits.
    wrong = np.abs(got.sums[1] - np.maximum((left**2).sum(0), 1e-6 * (real**2).sum(0)))
    assert (wrong <= 1e-6 * (real**2).sum(0)).all()
    # E|x| is no sum of squares, and the Gram matrix must stay positive: both are as they were.
    np.testing.assert_array_equal(got.sums[0], seen.sums[0])
    assert got.gram is seen.gram
    assert float(got.count) == valid.sum()


def test_the_mean_input_goes_through_unharmed_and_the_codes_fit_what_is_left():
    """An independent statement: D and codes of x − μ, and μ μᵀ E / ‖μ‖² beside them."""
    w, x = weight(), inputs()
    recipe = Recipe(grid=Grid(bits=3, group_size=16, store_dtype="float32"), low_rank=MEAN)
    got = packed(w, x, recipe)
    mu = x.astype(np.float64).mean(0)
    left = np.sqrt(((x - mu) ** 2).mean(0))
    d = (left / left.mean() + 0.4) ** 0.5
    np.testing.assert_allclose(got.channel_scale, d, rtol=1e-3)
    codes = dataclasses.replace(got, low_rank=None)
    error = w - np.asarray(dense_weight(codes), np.float64)
    part = np.outer(mu, mu @ error) / (mu @ mu)
    factors = [np.asarray(f, np.float64) for f in got.low_rank.factors()]
    np.testing.assert_allclose(factors[0] @ factors[1], part, atol=1e-5 * np.abs(part).max())
    y = np.asarray(linear(jnp.asarray(mu[None], jnp.float32), got))
    np.testing.assert_allclose(y[0], mu @ w, atol=1e-5 * np.abs(mu @ w).max())
    # Less is left on the prompt than of codes that were chosen for x and then corrected.
    plain = w - np.asarray(dense_weight(packed(w, x, with_mean(recipe, mean=False))), np.float64)
    after = plain - np.outer(mu, mu @ plain) / (mu @ mu)
    left = [np.linalg.norm(x @ e) for e in (error - part, after, plain)]
    assert left[0] < left[1] < left[2]


@pytest.mark.parametrize("name", ["fast", "best", "awq", "hqq"])
def test_every_rounding_takes_it(name):
    """The weights of x − μ (of x by its Gram matrix), then the part: in the program and outside."""
    recipe = preset(name, bits=3, group_size=16)
    if recipe.source.of == "none":
        recipe = dataclasses.replace(recipe, moments="prompt")
    else:
        recipe = dataclasses.replace(recipe, moments=Source(of=recipe.source.of))
    recipe = dataclasses.replace(with_mean(recipe), scale=NoScale())
    w, x = weight(), inputs()
    got = packed(w, x, recipe)
    mu = x.mean(0)
    bare = packed(w, x if name == "best" else x - mu, with_mean(recipe, mean=False))
    same = np.mean([np.mean(a == b) for a, b in zip(got.planes, bare.planes, strict=True)])
    assert same > 0.99
    y = linear(jnp.asarray(mu[None]), got)
    np.testing.assert_allclose(y[0], mu @ w, atol=0.01 * np.abs(mu @ w).max())
    eager = quantize(jnp.asarray(w), seen(x, recipe), recipe)
    np.testing.assert_allclose(dense_weight(got), dense_weight(eager), atol=0.02)


def test_beside_the_other_parts():
    w, x = weight(), inputs()
    rule = LowRankRule(rank=3, error_rank=2, mean=True)
    assert rule.total == 6
    recipe = Recipe(grid=Grid(bits=2, group_size=16, store_dtype="float32"), low_rank=rule)
    static = truncated_svd(jnp.asarray(w), 3)
    got = packed(w, x, recipe, static)
    assert got.low_rank.down.shape == (D_IN, 6)
    np.testing.assert_array_equal(got.low_rank.down[:, :3], static.down)
    # The error part starts from what the mean part leaves, to which the mean adds nothing.
    mu = x.astype(np.float64).mean(0)
    short = jax.tree.map(lambda a: a, got)
    cut = dataclasses.replace(
        got.low_rank, down=got.low_rank.down[:, :4], up=got.low_rank.up[:4]
    )  # fmt: skip
    error = w - np.asarray(dense_weight(dataclasses.replace(short, low_rank=cut)), np.float64)
    np.testing.assert_allclose(mu @ error, 0, atol=1e-4)
    _, vectors = np.linalg.eigh(error.T @ np.cov(x.T, bias=True) @ error)
    best = np.linalg.norm((x - mu) @ (error - error @ vectors[:, -2:] @ vectors[:, -2:].T))
    left = np.linalg.norm((x - mu) @ (np.asarray(dense_weight(got), np.float64) - w))
    assert best * (1 - 1e-4) <= left <= 1.05 * best
    eight = with_mean(recipe, rank=3, error_rank=2, store="int8")
    assert packed(w, x, eight, static).low_rank.down.dtype == jnp.int8


def test_a_channel_that_never_varies_leaves_a_matrix_to_factor():
    """A covariance of it would be rounding, of either sign, and its factor not a number."""
    w, x = weight(), inputs()
    x[:, 3], x[:, 20] = 3000.0, -777.7
    recipe = preset("gptq", bits=3, group_size=16, store_dtype="float32", moments="prompt")
    for rounding in (recipe.rounding, dataclasses.replace(recipe.rounding, damping=1e-4)):
        changed = dataclasses.replace(with_mean(recipe), rounding=rounding)
        got = packed(w, x, changed)
        assert np.isfinite(np.asarray(dense_weight(got))).all()
        mu = x.mean(0)
        y = linear(jnp.asarray(mu[None]), got)[0]
        np.testing.assert_allclose(y, mu @ w, atol=1e-5 * np.abs(mu).max() * np.abs(w).max() * 8)


def test_without_a_token_there_is_no_part():
    w, recipe = weight(), preset("ttq", bits=4, low_rank=MEAN)
    for x in (np.zeros((0, D_IN)), np.zeros((5, D_IN))):
        got = packed(w, x.astype(np.float32), recipe)
        down, up = got.low_rank.factors()
        assert np.isfinite(np.asarray(dense_weight(got))).all()
        np.testing.assert_array_equal(jnp.outer(down[:, 0], up[0]), 0)


def test_a_prior_of_the_weights_has_no_mean():
    """It draws the mean toward 0, as it draws the powers toward its own."""
    x, source = inputs(16), Source(prior="weights", prior_tokens=16.0)
    recipe = Recipe(moments=source, low_rank=MEAN)
    prior = observe(jnp.ones((1, D_IN)), jnp.ones(1, bool), recipe.reads)
    prior = dataclasses.replace(prior, first=jnp.zeros(D_IN))
    got = blend(seen(x, recipe), prior, source)
    np.testing.assert_allclose(mean_input(got), x.mean(0) / 2, rtol=1e-5)


def test_the_quantized_weights_read_the_prompt_with_the_part():
    w, x = weight(), inputs(32)
    recipe = Recipe(grid=Grid(bits=2), low_rank=MEAN, prefill="quantized")
    made = jax.jit(quantize_site, static_argnames="recipe")
    ys, got = made({"q": jnp.asarray(w)}, seen(x, recipe), recipe, {}, x=jnp.asarray(x))
    np.testing.assert_allclose(ys["q"], linear(jnp.asarray(x), got["q"]), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(ys["q"].mean(0), x.mean(0) @ w, atol=0.02 * np.abs(x @ w).max())


def test_what_it_reads_and_what_is_refused():
    assert Recipe(low_rank=MEAN).reads == Reads((2.0,), 0, first=True)
    assert not LowRankRule().after
    assert low_rank_in_short(LowRankRule(rank=2, mean=True)) == "rank 2 + mean corrected"
    assert "mean" not in Recipe().describe()["low_rank"]
    with pytest.raises(ConfigError, match=r"low_rank.mean reads activation moments, but"):
        Recipe(moments="none", scale=NoScale(), low_rank=MEAN)
    bare = seen(inputs(), Recipe())
    with pytest.raises(ValueError, match="expected sums of x, got powers"):
        mean_input(bare)
    with pytest.raises(ValueError, match="sums of x and no Gram matrix"):
        bare + seen(inputs(), Recipe(low_rank=MEAN))


@pytest.mark.slow
def test_one_channel_of_a_real_model_is_most_of_a_layer_and_hardly_varies():
    """Why there is such a part."""
    model = ttq.load("smollm2")
    text = Path(ttq.__file__).read_text() * 4
    window = jnp.asarray(ttq.cut_windows(model.tokenizer, text, 256)[:1], jnp.int32)
    reads = Reads((2.0,), first=True)
    seen = observe_tokens(model.params, window, config=model.config, reads=reads)["attn_in"]
    power = np.asarray(seen.sums[:, 0], np.float64)
    most = power.argmax(1)
    share = power.max(1) / power.sum(1)
    layers = np.arange(len(power))
    steady = np.asarray(seen.first, np.float64)[layers, most] ** 2 / 256 / power[layers, most]
    assert share.max() > 0.5
    assert steady[share > 0.5].min() > 0.5

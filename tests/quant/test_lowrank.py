"""Low rank: truncated SVDs, the error part against exact eigenvectors, and how it is stored."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttq_jax.config import ConfigError
from ttq_jax.linear import dense_weight
from ttq_jax.quant.convert import quantize
from ttq_jax.quant.grid import Grid
from ttq_jax.quant.lowrank import (
    LowRankRule,
    error_factors,
    factor_layers,
    stored_factors,
    truncated_svd,
)
from ttq_jax.quant.moments import Reads, observe
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import LowRank

D_IN, D_OUT = 48, 40
correcting = jax.jit(error_factors, static_argnames="rule")
packing = jax.jit(quantize, static_argnames="recipe")
unpacked = jax.jit(dense_weight)


def weight(seed=0):
    return np.random.default_rng(seed).normal(size=(D_IN, D_OUT)).astype(np.float32)


def inputs(tokens, seed=1):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(tokens, D_IN)) * np.exp(rng.normal(size=D_IN))).astype(np.float32)


def product(factors):
    down, up = (np.asarray(f, np.float64) for f in factors.factors())
    return down @ up


def best(w, rank):
    u, s, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def falling():
    """A weight whose singular values fall by a fifth each: well conditioned wherever it is cut."""
    u, _, vt = np.linalg.svd(weight(), full_matrices=False)
    return (u * (10 * 0.8 ** np.arange(D_OUT))) @ vt


@pytest.mark.parametrize("rank", [1, 6, 100])
def test_the_static_part_is_the_truncated_svd(rank):
    w = falling()
    got = truncated_svd(jnp.asarray(w, jnp.float32), rank)
    assert got.down.shape == (D_IN, min(rank, D_OUT))
    np.testing.assert_allclose(product(got), best(w, rank), atol=2e-5)


def test_the_weighted_static_part_is_the_best_one_for_these_inputs():
    w, power = weight(), np.exp(2 * np.random.default_rng(3).normal(size=D_IN)).astype(np.float32)
    root = np.sqrt(power.astype(np.float64))[:, None]
    got = product(truncated_svd(jnp.asarray(w), 6, jnp.asarray(power)))
    np.testing.assert_allclose(got, best(w * root, 6) / root, atol=2e-4)
    plain = product(truncated_svd(jnp.asarray(w), 6))
    seen, white = (lambda e: ((root * e) ** 2).sum()), (lambda e: (e**2).sum())
    assert seen(w - got) < 0.9 * seen(w - plain)
    assert white(w - got) > white(w - plain)
    # Layers one by one are the layers; channels that are never seen stay finite.
    power[5] = 0
    both = factor_layers(jnp.asarray(np.stack([w, 2 * w])), 6, jnp.stack([power, power]))
    np.testing.assert_allclose(product(both)[1], 2 * product(both)[0], atol=1e-4)
    silent = truncated_svd(jnp.asarray(falling(), jnp.float32), 6, jnp.zeros(D_IN))
    np.testing.assert_allclose(product(silent), best(falling(), 6), atol=2e-5)


def spectrum(decay, seed=4):
    """(E, G, eigenvectors of EᵀGE from the top, eigenvalues 1, decay, decay², …)."""
    rng = np.random.default_rng(seed)
    lam = decay ** np.arange(D_OUT)
    x = inputs(200).astype(np.float64)
    gram = x.T @ x / 200
    v, _ = np.linalg.qr(rng.normal(size=(D_OUT, D_OUT)))
    left, _ = np.linalg.qr(rng.normal(size=(D_IN, D_OUT)))
    root = np.linalg.cholesky(gram)
    error = np.linalg.solve(root.T, left * np.sqrt(lam) @ v.T)
    return error.astype(np.float32), gram.astype(np.float32), v, lam


@pytest.mark.parametrize(("decay", "iterations"), [(0.5, 2), (0.7, 4)])
def test_the_error_part_is_the_exact_eigenvectors(decay, iterations):
    """To what the gap of the spectrum allows.

    After n + 1 products with A = EᵀGE the basis holds A's first r eigenvectors to an angle of at
    most C (λ_{k+1} / λ_r)^(n+1), C the condition of a random start that was sampled for k of its
    r + 8 directions: C <= 1 + √(k/(ℓ−k−1)) + e√ℓ/(ℓ−k) · √(d−k), ℓ = r + 8 (Halko et al., 2011,
    theorem 10.6). float32 adds its rounding of λ_1, relative to the gap at r.
    """
    rank, (error, gram, v, lam) = 4, spectrum(decay)
    width, k = rank + 8, rank + 4
    start = (1 + np.sqrt(k / (width - k - 1))
             + np.e * np.sqrt(width) / (width - k) * np.sqrt(D_OUT - k))  # fmt: skip
    angle = start * (lam[k] / lam[rank - 1]) ** (iterations + 1)
    angle += 30 * np.finfo(np.float32).eps * lam[0] / (lam[rank - 1] - lam[rank])
    assert angle < 0.01
    top = v[:, :rank]
    want = error @ top @ top.T
    rule = LowRankRule(error_rank=rank, iterations=iterations)
    got = product(correcting(jnp.asarray(error), jnp.asarray(gram), rule))
    root = np.linalg.cholesky(gram.astype(np.float64)).T
    # Where a projection is off by an angle, the product is off by twice that at most.
    assert np.linalg.norm(root @ (got - want)) <= 2 * angle * np.sqrt(lam.sum())
    # What is left cannot be less than the tail of the spectrum, and is hardly more.
    left = np.linalg.norm(root @ (error - got)) ** 2
    assert lam[rank:].sum() * (1 - 1e-4) <= left
    assert left <= lam[rank:].sum() + (2 * angle) ** 2 * lam.sum() + 1e-4


def packed(w, x, low_rank, factors=None, **grid):
    grid = {"bits": 2, "store_dtype": "float32"} | grid
    recipe = Recipe(low_rank=low_rank, grid=Grid(**grid))
    x = jnp.asarray(x)
    moments = observe(x, jnp.ones(len(x), bool), recipe.reads)
    return packing(jnp.asarray(w), moments, recipe, factors)


def outputs(w, x, *rest, **grid):
    """Relative error of the outputs on x."""
    wrong = np.asarray(unpacked(packed(w, x, *rest, **grid)), np.float64) - w
    return np.linalg.norm(x @ wrong) / np.linalg.norm(x @ w)


def test_at_the_rank_of_the_inputs_the_outputs_on_them_are_exact():
    w, x = weight(), inputs(12)
    assert outputs(w, x, LowRankRule()) > 0.2
    exact = packed(w, x, LowRankRule(error_rank=12))
    got = np.asarray(unpacked(exact), np.float64)
    np.testing.assert_allclose(x @ got, x @ w.astype(np.float64), atol=1e-4 * np.abs(x @ w).max())
    # Only there: other inputs still see the codes.
    other = inputs(12, seed=9)
    assert np.linalg.norm(other @ (got - w)) > 0.1 * np.linalg.norm(other @ w)
    # At the weight's own rank it is the weight.
    whole = unpacked(packed(w, x, LowRankRule(error_rank=1000)))
    np.testing.assert_allclose(whole, w, atol=2e-5)


def test_more_rank_never_costs_on_the_prompt():
    w, x = weight(), inputs(30)
    got = [outputs(w, x, LowRankRule(error_rank=r)) for r in (0, 4, 16, 40)]
    assert all(b < a for a, b in itertools.pairwise(got))
    assert got[-1] < 1e-5


def test_both_parts_together():
    w, x = weight(), inputs(30)
    rule = LowRankRule(rank=6, error_rank=5)
    static = truncated_svd(jnp.asarray(w), 6)
    both = packed(w, x, rule, static)
    assert both.low_rank.down.shape == (D_IN, 11)
    assert both.low_rank.up.shape == (11, D_OUT)
    np.testing.assert_array_equal(both.low_rank.down[:, :6], static.down)
    np.testing.assert_array_equal(both.low_rank.up[:6], static.up)
    # The codes are those of what the static part leaves, and the error part's error is theirs.
    alone = packed(w, x, LowRankRule(rank=6), static)
    jax.tree.map(np.testing.assert_array_equal, both.planes, alone.planes)
    wrong = w - np.asarray(unpacked(alone), np.float64)
    gram = x.T.astype(np.float64) @ x / len(x)
    _, vectors = np.linalg.eigh(wrong.T @ gram @ wrong)
    best = np.linalg.norm(x @ (wrong - wrong @ vectors[:, -5:] @ vectors[:, -5:].T))
    left = np.linalg.norm(x @ (np.asarray(unpacked(both), np.float64) - w))
    assert best * (1 - 1e-4) <= left <= 1.05 * best


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_eight_bit_factors_are_off_by_half_a_step(dtype):
    factors = truncated_svd(jnp.asarray(weight()), 5)
    kept = stored_factors(factors, LowRankRule(rank=5, store="int8"), dtype)
    assert kept.down.dtype == kept.up.dtype == jnp.int8
    assert kept.down_scale.dtype == kept.up_scale.dtype == dtype
    assert kept.down_scale.shape == kept.up_scale.shape == (5,)
    # Rounding the scale itself lets the largest entry overshoot by no more than half a step.
    for exact, code, scale, axis in (
        (factors.down, kept.down, kept.down_scale, 0),
        (factors.up, kept.up, kept.up_scale, 1),
    ):
        step = np.asarray(scale, np.float64)
        step = step[None] if axis == 0 else step[:, None]
        np.testing.assert_allclose(step, np.abs(exact).max(axis, keepdims=True) / 127, rtol=2**-8)
        assert (np.abs(np.asarray(code, np.float64) * step - exact) <= 0.5001 * step).all()
    assert stored_factors(kept, LowRankRule(rank=5, store="int8"), dtype) is kept
    # The products are rounded in a program too, where they are fused.
    as_float32 = lambda one: [f.astype(jnp.float32) for f in one.factors()]  # noqa: E731
    for fused, rounded in zip(jax.jit(as_float32)(kept), kept.factors(), strict=True):
        np.testing.assert_array_equal(fused, rounded.astype(jnp.float32))
    zero = stored_factors(
        LowRank(jnp.zeros((8, 2)), jnp.zeros((2, 8))), LowRankRule(rank=2, store="int8"), dtype
    )
    np.testing.assert_array_equal(product(zero), np.zeros((8, 8)))


def test_eight_bit_parts_join_and_cost_little():
    w, x = weight(), inputs(30)
    static = truncated_svd(jnp.asarray(w), 6)
    how = {"rank": 6, "error_rank": 5}
    both = packed(w, x, LowRankRule(**how, store="int8"), static)
    assert both.low_rank.down.dtype == jnp.int8
    assert both.low_rank.down_scale.shape == both.low_rank.up_scale.shape == (11,)
    eight, full = (outputs(w, x, LowRankRule(**how, store=s), static) for s in ("int8", "float"))
    assert abs(eight - full) < 0.02 * full


def test_the_same_prompt_gives_the_same_factors():
    error, gram, _, _ = spectrum(0.9)
    rule = LowRankRule(error_rank=4)
    args = jnp.asarray(error), jnp.asarray(gram)
    again = jax.jit(error_factors, static_argnames="rule")
    jax.tree.map(np.testing.assert_array_equal, correcting(*args, rule), again(*args, rule))


def test_what_a_rule_reads():
    assert Recipe(low_rank=LowRankRule(error_rank=2)).reads == Reads((2.0,), -1)
    weighted = LowRankRule(rank=2, weighted=True)
    assert Recipe(moments="corpus", low_rank=weighted).reads == Reads((2.0,), 0)
    with pytest.raises(ConfigError, match="needs the moments of a corpus or of a prior"):
        Recipe(low_rank=weighted)

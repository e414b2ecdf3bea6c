"""Scales and zero points fitted to the codes: restated in NumPy, its theory, what it is called."""

import copy
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import bf16

from ttq_jax.config import ConfigError
from ttq_jax.linear import dense_weight
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.convert import quantize
from ttq_jax.quant.grid import Grid, Nearest, encode, fit_scales, fit_zeros, for_weight
from ttq_jax.quant.presets import PRESETS, preset
from ttq_jax.quant.recipe import Recipe, has_kernel
from ttq_jax.quant.scaling import NoScale, PowerLaw
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.types import Moments

ROWS, D_IN, D_OUT = 32, 96, 24
forms = pytest.mark.parametrize(
    ("symmetric", "scales"),
    [(False, "float"), (True, "float"), (False, "coded"), (True, "coded"), (False, "coded4")],
)


def weight(seed=0):
    return (np.random.default_rng(seed).normal(size=(D_IN, D_OUT)) ** 3).astype(np.float32)


def importance(seed=1):
    return np.random.default_rng(seed).gamma(0.3, size=D_IN).astype(np.float32)


class Form:
    """How one grid stores scales and zero points, in float64."""

    def __init__(self, w, bits, symmetric, scales):
        self.bits, self.symmetric, self.coded = bits, symmetric, scales != "float"
        self.width = 4 if scales == "coded4" else 8
        self.most = 2**self.width - 1
        self.columns = bf16(np.max(self.span(w.reshape(-1, ROWS, D_OUT), 1.0), 0) / self.most)

    def of(self, column):
        one = copy.copy(self)
        one.columns = self.columns[column]
        return one

    def span(self, groups, shrink):
        low, high = np.minimum(groups.min(1), 0) * shrink, np.maximum(groups.max(1), 0) * shrink
        if self.symmetric:
            return np.maximum(-low, high) / (2 ** (self.bits - 1) - 1)
        return (high - low) / (2**self.bits - 1)

    def scale(self, s):
        if self.coded:
            return np.clip(np.round(s / self.columns), 1, self.most) * self.columns
        return bf16(s)

    def zero(self, z):
        if self.symmetric:
            return np.full_like(z, 2.0 ** (self.bits - 1))
        if self.coded:
            unit = 2.0 ** (self.bits - self.width)
            return np.clip(np.round(z / unit), 0, self.most) * unit
        return bf16(z)

    def codes(self, w, s, z):
        return np.clip(np.round(w / s + z), 0, 2**self.bits - 1)


def search(w, h, form, shrinks, refits):
    """Weighted errors [n_group, n] and dequantized weights, by least squares of a library."""
    groups = w.astype(np.float64).reshape(-1, ROWS, D_OUT)
    best, out = np.full((len(groups), D_OUT), np.inf), np.zeros_like(groups)
    for shrink in shrinks:
        spans = form.span(groups, shrink)
        lows = np.minimum(groups.min(1), 0) * shrink
        for g, c in np.ndindex(best.shape):
            column, weights = groups[g, :, c], h[g * ROWS : (g + 1) * ROWS].astype(np.float64)
            at = form.of(c)
            s = at.scale(spans[g, c])
            z = at.zero(-lows[g, c] / s)

            def error(s, z, at=at, column=column, weights=weights):
                return np.sum(weights * (column - s * (at.codes(column, s, z) - z)) ** 2)

            for _ in range(refits):
                q, root = at.codes(column, s, z), np.sqrt(weights)
                if form.symmetric:
                    (slope,) = np.linalg.lstsq((root * (q - z))[:, None], root * column)[0]
                    fitted = at.scale(slope), z
                else:
                    slope = np.linalg.lstsq(
                        np.stack([root * q, root], 1), root * column
                    )[0][0]  # fmt: skip
                    slope = at.scale(slope)
                    mean = np.average(q - column / slope, weights=weights)
                    fitted = slope, at.zero(mean)
                if error(*fitted) < error(s, z):
                    s, z = fitted
            if error(s, z) < best[g, c]:
                best[g, c] = error(s, z)
                out[g, :, c] = s * (at.codes(column, s, z) - z)
    return best, out.reshape(w.shape)


def rounded(w, h, rule, grid):
    """(dequantized, weighted errors by group and column) of a rule's `round`."""
    w, gram = jnp.asarray(w), jnp.asarray(h)[:, None, None]
    groups = w.reshape(-1, grid.group_size, w.shape[1])
    codes, s, z = (np.asarray(a, np.float64) for a in rule.round(w, gram, for_weight(grid, groups)))
    s, z = (np.repeat(a, grid.group_size, 0) for a in (s, z))
    made = s * (codes - z)
    wrong = h[:, None].astype(np.float64) * (w - made) ** 2
    return made, wrong.reshape(groups.shape).sum(1)


@pytest.mark.parametrize(
    ("bits", "symmetric", "scales", "refits"),
    [
        (2, False, "float", 3),
        (3, True, "float", 1),
        (3, True, "coded", 3),
        (4, False, "coded", 1),
        (2, False, "coded", 3),
        (3, False, "coded4", 3),
        (4, False, "coded4", 1),
    ],
)
def test_it_is_a_weighted_line_fit_in_every_candidate(bits, symmetric, scales, refits):
    w, h = weight(), importance()
    grid = Grid(bits=bits, group_size=ROWS, symmetric=symmetric, scales=scales)
    rule = ClipSearch(steps=3, smallest=0.6, refits=refits)
    want, made = search(w, h, Form(w, bits, symmetric, scales), rule.shrinks, refits)
    got, errors = rounded(w, h, rule, grid)
    # A weight at a tie may go the other way in float32, and its group then another, as good, way.
    apart = (np.abs(got - made) > 1e-5 * np.abs(w).max()).reshape(-1, ROWS, D_OUT).any(1)
    assert apart.mean() < 0.05
    np.testing.assert_allclose(errors.sum(), want.sum(), rtol=2e-3)


@forms
def test_no_refit_makes_it_worse(symmetric, scales):
    w, h = weight(), importance()
    grid = Grid(bits=3, group_size=ROWS, symmetric=symmetric, scales=scales)
    errors = [rounded(w, h, ClipSearch(refits=n), grid)[1] for n in range(5)]
    for fewer, more in itertools.pairwise(errors):
        assert np.all(more <= fewer * (1 + 1e-5))
    # The scale alone has less to gain, and so have scales of few levels.
    least = 0.98 if symmetric else 0.95 if scales == "coded4" else 0.9
    assert errors[4].sum() < least * errors[0].sum()


def test_weights_on_a_line_are_found_though_a_row_that_weighs_nothing_widens_the_range():
    q = np.random.default_rng(3).integers(0, 8, (64, 8))
    q[::32], q[1::32] = 0, 7
    w = (0.25 * (q - 3.4)).astype(np.float32)
    ones = np.ones(64, np.float32)
    for outlier in (5, 40):
        w[outlier], ones[outlier] = 1.05 * w.max(), 0
    grid = Grid(bits=3, group_size=ROWS, store_dtype="float32")
    whole = {"steps": 1, "smallest": 1.0}
    assert rounded(w, ones, ClipSearch(**whole), grid)[1].min() > 1e-3
    assert rounded(w, ones, ClipSearch(**whole, refits=1), grid)[1].max() < 1e-10


@forms
@pytest.mark.parametrize("rule", [ClipSearch(refits=3), SecondOrder(refits=2)], ids=str)
def test_a_compiled_program_gives_the_same_numbers(rule, symmetric, scales):
    grid = Grid(bits=3, group_size=ROWS, symmetric=symmetric, scales=scales)
    w, h = jnp.asarray(weight()), jnp.asarray(importance())
    gram = h[:, None, None] if rule.span == 0 else jnp.diag(h)[None]

    def run(w, gram):
        return rule.round(w, gram, for_weight(grid, w.reshape(-1, ROWS, D_OUT)))

    jax.tree.map(np.testing.assert_array_equal, run(w, gram), jax.jit(run)(w, gram))


@pytest.mark.parametrize("rule", [ClipSearch(refits=3), SecondOrder(refits=3, act_order=True)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_weighs_nothing_and_what_has_one_code_stay_as_they_are(rule, symmetric):
    w = weight()
    w[:32], w[40] = 0.5, 0.0  # a constant group, a dead row
    h = importance()
    h[64:] = 0
    seen = Moments(
        jnp.asarray(h)[None], jnp.ones(()), gram=jnp.diag(jnp.asarray(h))[None], powers=(2.0,)
    )
    recipe = Recipe(moments="corpus", scale=NoScale(), rounding=rule,
                    grid=Grid(bits=2, group_size=ROWS, symmetric=symmetric))  # fmt: skip
    made = np.asarray(dense_weight(quantize(jnp.asarray(w), seen, recipe)))
    assert np.isfinite(made).all()
    np.testing.assert_allclose(made[:32], 0.5, rtol=0.004)
    plain = dataclasses.replace(recipe, rounding=dataclasses.replace(rule, refits=0))
    same = np.asarray(dense_weight(quantize(jnp.asarray(w), seen, plain)))
    np.testing.assert_array_equal(made[64:], same[64:])


def test_the_moments_weigh_it_as_the_kernel_weighs_the_search():
    """`quantize` hands the second moments over, divided by D², and lets all weigh alike without."""
    w = weight()
    h = importance() + 0.01
    recipe = Recipe(moments="corpus", scale=PowerLaw(), rounding=ClipSearch(refits=2),
                    grid=Grid(bits=3, group_size=ROWS))  # fmt: skip
    packed = quantize(
        jnp.asarray(w), Moments(jnp.asarray(h)[None], jnp.ones(()), powers=(2.0,)), recipe
    )
    d = np.asarray(packed.channel_scale, np.float32)
    want, _ = rounded(w * d[:, None], h / d**2, recipe.rounding, recipe.grid)
    np.testing.assert_allclose(dense_weight(packed), want / d[:, None], rtol=1e-5, atol=1e-6)
    blind = Recipe(moments="none", scale=NoScale(), rounding=ClipSearch(refits=2),
                   grid=recipe.grid)  # fmt: skip
    want, _ = rounded(w, np.ones(D_IN, np.float32), blind.rounding, blind.grid)
    np.testing.assert_array_equal(dense_weight(quantize(jnp.asarray(w), None, blind)), want)


@forms
def test_stored_is_the_nearest_that_can_be_stored(symmetric, scales):
    w = jnp.asarray(weight())
    grid = for_weight(Grid(bits=3, symmetric=symmetric, scales=scales), w.reshape(3, ROWS, D_OUT))
    wanted = jnp.asarray(np.random.default_rng(0).uniform(0.02, 0.4, (3, D_OUT)), jnp.float32)
    kept = fit_scales(wanted, grid)
    np.testing.assert_array_equal(fit_scales(kept, grid), kept)
    form = Form(np.asarray(w), 3, symmetric, scales)
    np.testing.assert_allclose(kept, form.scale(np.asarray(wanted, np.float64)), rtol=1e-6)
    assert (fit_scales(jnp.full((3, D_OUT), 1e-9), grid) > 0).all()
    if not symmetric:
        zeros = fit_zeros(wanted * 10, grid)
        np.testing.assert_allclose(zeros, form.zero(np.asarray(wanted, np.float64) * 10), rtol=1e-6)


def test_codes_are_those_of_the_stored_numbers():
    w, h = jnp.asarray(weight()), jnp.asarray(importance())
    groups = w.reshape(-1, ROWS, D_OUT)
    grid = for_weight(Grid(bits=3, scales="coded"), groups)
    codes, scales, zeros = ClipSearch(refits=4).round(w, h[:, None, None], grid)
    np.testing.assert_array_equal(fit_scales(scales, grid), scales)
    np.testing.assert_array_equal(fit_zeros(zeros, grid), zeros)
    np.testing.assert_array_equal(
        encode(groups, scales, zeros, grid).reshape(codes.shape), codes.astype(np.float32)
    )


@pytest.mark.parametrize("rule", [ClipSearch, SecondOrder])
@pytest.mark.parametrize("refits", [-1, 101])
def test_a_number_of_refits_that_is_none(rule, refits):
    with pytest.raises(ConfigError, match=f"refits: expected 0 .* got {refits}"):
        rule(refits=refits)


def test_recipes_of_before_say_nothing_of_it_and_others_do():
    for name, one in PRESETS.items():
        if one.recipe is not None and name != "fast":
            assert not {"refits", "descents"} & set(one.recipe.describe()["rounding"]), name
    fitted = preset("fast", rounding=ClipSearch(refits=2))
    assert fitted.describe()["rounding"]["refits"] == 2
    second = preset("best", rounding=SecondOrder(descents=1))
    assert second.describe()["rounding"]["descents"] == 1


def test_a_search_has_a_kernel_with_and_without_refits():
    assert has_kernel(Nearest())
    assert has_kernel(ClipSearch())
    assert has_kernel(ClipSearch(refits=1))
    assert not has_kernel(SecondOrder())

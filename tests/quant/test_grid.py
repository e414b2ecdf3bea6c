"""Grids, clip search and scales against the NumPy oracle, and the theory as inequalities."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from oracle import round_coded, round_groups

from ttq_jax.config import ConfigError
from ttq_jax.linear import dense_weight
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.convert import quantize
from ttq_jax.quant.grid import BITS, Grid, Nearest, decode, encode, fit, split_groups
from ttq_jax.quant.half_quadratic import HalfQuadratic
from ttq_jax.quant.lowrank import LowRankRule
from ttq_jax.quant.presets import preset
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.scaling import NoScale, PowerLaw, SearchedAlpha
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.types import Moments, leaf_bits


def weight(d_in=100, d_out=9, seed=0):
    return np.random.default_rng(seed).normal(size=(d_in, d_out)).astype(np.float32)


def moments_of(x, powers=(1.0, 2.0)):
    sums = np.stack([(np.abs(x) ** p).sum(0) for p in powers]).astype(np.float32)
    return Moments(jnp.asarray(sums), jnp.asarray(float(len(x)), jnp.float32), powers=powers)


def rtn(**grid):
    return Recipe(moments="none", scale=NoScale(), grid=Grid(**grid))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("zero_point", ["integer", "float"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_rtn_is_the_oracles(bits, symmetric, zero_point, dtype):
    w = weight()
    grid = {"bits": bits, "group_size": 32, "symmetric": symmetric, "zero_point": zero_point,
            "store_dtype": dtype}  # fmt: skip
    got = dense_weight(quantize(jnp.asarray(w), None, rtn(**grid)))
    want = round_groups(w, bits, 32, symmetric, zero_point, dtype)
    # float32 arithmetic may break a tie the other way than float64: a handful of weights may sit
    # one step apart, all others agree to rounding.
    off = np.abs(got - want) > 1e-5 * np.abs(w).max()
    assert off.mean() < 0.003


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("symmetric", "zero_point"), [(True, "float"), (False, "float"), (False, "integer")]
)
@pytest.mark.parametrize("bits", BITS)
def test_coded_scales_are_the_oracles(bits, symmetric, zero_point, dtype):
    # Columns of very different sizes, and groups too: eight bits of scale have to span them.
    sizes = np.exp(np.random.default_rng(1).normal(size=(4, 1, 9)))
    w = (weight(128).reshape(4, 32, 9) * sizes).reshape(128, 9)[:100]
    packed = quantize(
        jnp.asarray(w), None,
        rtn(bits=bits, group_size=32, symmetric=symmetric, zero_point=zero_point, scales="coded",
            store_dtype=dtype),
    )  # fmt: skip
    assert packed.scales.codes.dtype == jnp.uint8
    assert packed.scales.columns.dtype == dtype
    assert int(jnp.max(packed.scales.codes)) == 255
    assert symmetric == (packed.zeros is None)
    want = round_coded(w, bits, 32, symmetric, zero_point, dtype)
    off = np.abs(dense_weight(packed) - want) > 1e-5 * np.abs(w).max()
    assert off.mean() < 0.003


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_scales_in_four_bits_are_the_oracles(bits, dtype):
    sizes = np.exp(np.random.default_rng(1).normal(size=(4, 1, 9)))
    w = (weight(128).reshape(4, 32, 9) * sizes).reshape(128, 9)[:100]
    packed = quantize(jnp.asarray(w), None, rtn(bits=bits, scales="coded4", store_dtype=dtype))
    assert packed.scales.codes.dtype == jnp.uint8
    assert packed.zeros is None
    # A byte for each of four groups, and a number for the column.
    size = packed.scales.columns.dtype.itemsize
    assert leaf_bits(packed) == pytest.approx(8 * (4 * (32 * bits / 8 + 1) + size) / 100)
    want = round_coded(w, bits, 32, False, dtype=dtype, width=4)
    off = np.abs(dense_weight(packed) - want) > 1e-5 * np.abs(w).max()
    assert off.mean() < 0.003


ROUNDINGS = [Nearest(), ClipSearch(), HalfQuadratic(), SecondOrder()]


def error_and_bits(rounding, **grid):
    """The squared output error of a grid, and its bits per weight."""
    x = np.random.default_rng(2).normal(size=(64, 128)) * np.exp(np.arange(128) / 64)
    w, seen = jnp.asarray(weight(128, 32)), moments_of(x.astype(np.float32))
    seen = dataclasses.replace(seen, gram=jnp.asarray(x.T @ x, jnp.float32)[None])
    packed = quantize(w, seen, Recipe(scale=NoScale(), rounding=rounding, grid=Grid(**grid)))
    wrong = np.asarray(dense_weight(packed), np.float64) - weight(128, 32)
    return np.sum((x @ wrong) ** 2), leaf_bits(packed)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("bits", slow_but([2, 3], [3]))
def test_scales_in_four_bits_win_in_groups_half_as_wide(bits, rounding):
    wide, many = error_and_bits(rounding, bits=bits, group_size=64, scales="coded")
    narrow, few = error_and_bits(rounding, bits=bits, group_size=32, scales="coded4")
    assert few == many
    assert narrow < wide


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("bits", [3, 4])
def test_coded_scales_cost_half_a_bit_less_and_nearly_nothing(bits, rounding):
    (coded, few), (stored, many) = (
        error_and_bits(rounding, bits=bits, group_size=32, scales=s) for s in ("coded", "float")
    )
    assert few == bits + 16 / 32 + 16 / 128
    assert many == bits + 32 / 32
    assert coded < 1.05 * stored


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_a_weight_on_the_grid_is_reproduced_exactly(bits, symmetric):
    rng = np.random.default_rng(bits)
    low, high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    zero = 0 if symmetric else rng.integers(0, 2**bits, (1, 5))
    q = rng.integers(low, high + 1, (64, 5))
    q[::32], q[1::32] = low, high
    w = ((q - zero) * 0.25).astype(np.float32)
    packed = quantize(jnp.asarray(w), None, rtn(bits=bits, symmetric=symmetric))
    np.testing.assert_array_equal(dense_weight(packed), w)


@pytest.mark.parametrize("group_size", [8, 16, 32, 64, 128, 256, 1024, -1])
def test_any_group_size_and_ragged_width(group_size):
    w = weight(d_in=100)
    packed = quantize(jnp.asarray(w), None, rtn(bits=3, group_size=group_size))
    rows = 104 if group_size == -1 or group_size > 104 else group_size
    assert packed.group_size == rows
    want = round_groups(w, 3, rows, False, "float", dtype="bfloat16")
    assert (np.abs(dense_weight(packed) - want) > 1e-5).mean() < 0.003


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 3.5, -2.25, 1e-30])
def test_constant_groups(value, symmetric):
    w = jnp.full((64, 3), value, jnp.float32)
    packed = quantize(w, None, rtn(bits=2, symmetric=symmetric, store_dtype="float32"))
    np.testing.assert_allclose(dense_weight(packed), w, rtol=1e-6)


def test_rounding_error_is_at_most_half_a_step():
    w = jnp.asarray(weight())
    for bits in BITS:
        for symmetric in (False, True):
            grid = Grid(bits=bits, symmetric=symmetric, zero_point="float", store_dtype="float32")
            groups = split_groups(w, 32)
            scales, zeros = fit(groups, grid)
            error = groups - decode(encode(groups, scales, zeros, grid), scales, zeros)
            assert jnp.all(jnp.abs(error) <= scales[:, None] * 0.501)


def clipping(rounding, **grid):
    return Recipe(moments="corpus", scale=NoScale(), rounding=rounding, grid=Grid(**grid))


def moments_with(h):
    """Moments whose E[x²] is h."""
    return Moments(jnp.asarray(h, jnp.float32)[None], jnp.ones(()), powers=(2.0,))


@pytest.mark.parametrize("symmetric", [False, True])
def test_clip_search_never_does_worse_by_its_own_measure(symmetric):
    w = weight(96, 40) ** 3
    h = np.random.default_rng(1).gamma(0.3, size=96)

    def error(rule):
        packed = quantize(
            jnp.asarray(w), moments_with(h), clipping(rule, bits=3, symmetric=symmetric)
        )
        wrong = np.square(np.asarray(dense_weight(packed), np.float64) - w)
        return (h[:, None] * wrong).reshape(3, 32, 40).sum(1)

    assert np.all(error(ClipSearch()) <= error(Nearest()) + 1e-6)
    assert error(ClipSearch()).sum() < 0.9 * error(Nearest()).sum()
    np.testing.assert_array_equal(error(ClipSearch(steps=1)), error(Nearest()))


def test_clip_search_is_the_oracles():
    w = weight(64, 6) ** 3
    h = np.random.default_rng(2).gamma(0.5, size=64)
    best = np.full((2, 6), np.inf)
    out = np.zeros((2, 32, 6))
    for shrink in np.linspace(1, 0.55, 10):
        q = round_groups(w, 3, 32, False, "float", dtype="float32", shrink=shrink)
        e = (h[:, None] * (w - q) ** 2).reshape(2, 32, 6).sum(1)
        out = np.where((e < best)[:, None], q.reshape(2, 32, 6), out)
        best = np.minimum(e, best)
    recipe = clipping(ClipSearch(), bits=3, store_dtype="float32")
    got = np.asarray(dense_weight(quantize(jnp.asarray(w), moments_with(h), recipe)))
    assert (np.abs(got.reshape(2, 32, 6) - out) > 1e-5).mean() < 0.02


def test_shrinks_are_evenly_spaced_and_start_at_the_whole_range():
    np.testing.assert_allclose(ClipSearch().shrinks, np.linspace(1, 0.55, 10))
    assert ClipSearch(steps=1).shrinks == Nearest().shrinks == (1.0,)


def test_power_law_is_the_papers_formula():
    x = np.random.default_rng(0).normal(size=(50, 7)) * np.arange(7)
    rms = np.sqrt((x**2).mean(0))
    want = (rms / rms.mean() + 0.4) ** 0.5
    got = PowerLaw()(moments_of(x), lambda d: d)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_power_law_ignores_prompt_length_and_unit():
    x = np.random.default_rng(1).normal(size=(50, 7))
    one = PowerLaw()(moments_of(x), lambda d: d)
    np.testing.assert_allclose(PowerLaw()(moments_of(np.tile(x, (4, 1))), lambda d: d), one, 1e-6)
    np.testing.assert_allclose(PowerLaw()(moments_of(x * 1000), lambda d: d), one, 1e-5)


def test_searched_alpha_takes_the_best_candidate():
    x = np.random.default_rng(2).normal(size=(200, 64)) * np.exp(np.linspace(-3, 3, 64))
    w = weight(64, 32, seed=3)
    m = np.abs(x).mean(0)
    h = (x**2).mean(0)
    errors = []
    for i in range(20):
        d = np.maximum(m / m.mean(), 1e-4) ** (i / 20)
        d = d / np.sqrt(d.max() * d.min())
        wrong = round_groups(w * d[:, None], 3, 32, False, "float") / d[:, None] - w
        errors.append((h[:, None] * wrong**2).sum())
    recipe = preset("awq", bits=3, store_dtype="float32")
    packed = quantize(jnp.asarray(w), moments_of(x), recipe)
    wrong = np.asarray(dense_weight(packed), np.float64) - w
    got = (h[:, None] * wrong**2).sum()
    np.testing.assert_allclose(got, min(errors), rtol=0.01)
    assert min(errors) < 0.8 * errors[0]


def test_activation_aware_beats_nearest_on_outputs_and_not_on_weights():
    x = np.random.default_rng(4).normal(size=(300, 64)) * np.exp(np.linspace(-3, 3, 64))
    w = weight(64, 48, seed=5)
    m = moments_of(x)

    def errors(recipe):
        e = np.asarray(dense_weight(quantize(jnp.asarray(w), m, recipe))) - w
        return (e**2).sum(), ((x @ e) ** 2).sum()

    plain, aware = errors(rtn(bits=3)), errors(preset("ttq", bits=3))
    assert aware[0] > plain[0]
    assert aware[1] < 0.8 * plain[1]


@pytest.mark.parametrize("name", ["ttq", "awq"])
def test_dead_channels_and_silent_prompts_stay_finite(name):
    recipe = preset(name, bits=3, clip=True)
    w = jnp.asarray(weight(64, 8))
    x = np.random.default_rng(6).normal(size=(20, 64))
    x[:, 5] = 0
    for seen in (x, np.zeros_like(x)):
        got = dense_weight(quantize(w, moments_of(seen), recipe))
        assert jnp.all(jnp.isfinite(got))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 7}, "bits: expected one of 2, 3, 4, 5, 8, got 7"),
        ({"group_size": 0}, "positive multiple of 8, or -1 for all input channels, got 0"),
        ({"group_size": 20}, "got 20"),
        ({"zero_point": "half"}, "zero point"),
        ({"scales": "coded4", "symmetric": True}, "scales 'coded4': .* not symmetric, .* got symm"),
        ({"scales": "coded4", "zero_point": "integer"}, "'float', .* got 'integer' and 4 bits"),
        ({"scales": "coded4", "bits": 8}, "at most 5 bits, got 'float' and 8 bits"),
        ({"scales": "coded4", "store_dtype": "float16"}, "coded scales: expected store_dtype"),
        ({"store_dtype": "int4"}, "store dtype"),
        ({"rank": -1}, "low_rank: expected rank >= 0, error_rank >= 0"),
        ({"moments": "mine"}, "moments.of: expected one of none, corpus, prompt"),
        ({"moments": "none"}, "set moments.of to 'prompt' or 'corpus'"),
        ({"select": "("}, "select: not a regular expression"),
    ],
)
def test_bad_choices_are_refused(change, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        preset("ttq", **change)


def test_whole_axes_of_a_preset_are_replaced():
    rule, grid = LowRankRule(error_rank=2), Grid(bits=2, group_size=16)
    got = preset("fast", low_rank=rule, rank=3, grid=grid, bits=3)
    assert got.low_rank == dataclasses.replace(rule, rank=3)
    assert got.grid == dataclasses.replace(grid, bits=3)
    assert got.rounding == preset("fast").rounding


@pytest.mark.parametrize("choice", [
    lambda: PowerLaw(lam=np.inf), lambda: PowerLaw(p=np.inf), lambda: SearchedAlpha(p=np.inf),
    lambda: SecondOrder(damping=np.inf), lambda: PowerLaw(lam=np.nan),
])  # fmt: skip
def test_knobs_are_finite(choice):
    with pytest.raises(ConfigError, match=r"finite|scale.p: expected 0.1 to 8"):
        choice()


def test_a_clip_search_does_not_replace_another_rounding():
    with pytest.raises(ConfigError, match="the rounding of recipe best is second_order"):
        preset("best", clip=True)


def test_unknown_method_is_refused():
    with pytest.raises(ConfigError, match=r"expected one of none, rtn, .*, got 'gtpq'"):
        preset("gtpq")


def test_recipes_are_values():
    assert preset("ttq", bits=3) == preset("ttq", bits=3)
    assert hash(preset("awq", rank=4)) == hash(preset("awq", rank=4))
    assert SearchedAlpha() != PowerLaw()
    described = preset("ttq", bits=3, rank=16).describe()
    assert described["scale"] == {"rule": "power_law", "alpha": 0.5, "lam": 0.4, "p": 2.0}
    assert described["grid"]["bits"] == 3
    assert described["low_rank"]["rank"] == 16


@pytest.mark.parametrize("steps", [0, -1, 10_001, 20_000_000, 10**18])
def test_a_search_has_a_number_of_steps_that_can_be_listed(steps):
    with pytest.raises(ConfigError, match="steps >= 1, at most 10000"):
        ClipSearch(steps=steps)

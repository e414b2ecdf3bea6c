"""Moments: a masked reduction and a commutative monoid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttq_jax.quant.moments import Reads, observe, p_mean

POWERS = (1.0, 2.0, 3.0)
READS = Reads(POWERS)


def seen(seed, shape=(2, 5, 7)):
    x = jax.random.normal(jax.random.key(seed), shape)
    return x, jnp.ones(shape[:-1], bool)


def assert_same(a, b, rtol=1e-6):
    np.testing.assert_allclose(a.sums, b.sums, rtol=rtol)
    assert a.count == b.count
    assert a.powers == b.powers


def test_power_sums_are_those_of_numpy():
    x, valid = seen(0)
    got = observe(x, valid, READS)
    flat = np.abs(np.asarray(x, np.float64)).reshape(-1, 7)
    for row, p in zip(got.sums, POWERS, strict=True):
        np.testing.assert_allclose(row, (flat**p).sum(0), rtol=1e-6)
    assert got.count == 10
    np.testing.assert_allclose(p_mean(got, 3.0), (flat**3).mean(0) ** (1 / 3), rtol=1e-6)


def test_monoid():
    a, b, c = (observe(*seen(i), READS) for i in range(3))
    zero = a.scaled(0.0)
    assert_same((a + b) + c, a + (b + c))
    assert_same(a + b, b + a, rtol=0)
    assert_same(a + zero, a, rtol=0)


def test_two_halves_are_the_whole():
    x, valid = seen(3, (1, 12, 7))
    halves = observe(x[:, :5], valid[:, :5], READS) + observe(x[:, 5:], valid[:, 5:], READS)
    assert_same(halves, observe(x, valid, READS))


@pytest.mark.parametrize("garbage", [1e30, np.inf, np.nan])
def test_padding_never_enters(garbage):
    x, valid = seen(4)
    valid = valid.at[0, 3:].set(False).at[1, :2].set(False)
    dirty = jnp.where(valid[..., None], x, garbage)
    clean = jnp.where(valid[..., None], x, 0.0)
    np.testing.assert_array_equal(
        observe(dirty, valid, READS).sums, observe(clean, valid, READS).sums
    )


def test_no_tokens_give_finite_zeros():
    x, valid = seen(5)
    nothing = observe(x, ~valid, READS)
    assert nothing.count == 0
    np.testing.assert_array_equal(p_mean(nothing, 2.0), np.zeros(7))


def test_powers_must_agree():
    x, valid = seen(6)
    with pytest.raises(ValueError, match=r"powers .1.0,. and no Gram matrix, and powers .2.0,."):
        observe(x, valid, Reads((1.0,))) + observe(x, valid, Reads((2.0,)))
    with pytest.raises(ValueError, match="not 4"):
        observe(x, valid, Reads((1.0,))).mean_power(4.0)

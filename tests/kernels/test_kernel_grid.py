"""The grid's formula: what its docstring promises, as properties."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grid import ZERO_POINTS, decode, encode, fit

DTYPES = ("float32", "bfloat16", "float16")


def ranges(seed=0):
    rng = np.random.default_rng(seed)
    low, high = np.sort(rng.normal(size=(2, 200)) * np.exp(rng.normal(size=200)), axis=0)
    return jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)


@pytest.mark.parametrize("store_dtype", DTYPES)
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_range_is_covered_by_what_is_stored(bits, zero_point, store_dtype):
    low, high = ranges(bits)
    scales, zeros = fit(low, high, bits=bits, zero_point=zero_point, store_dtype=store_dtype)
    assert jnp.all(scales > 0)
    np.testing.assert_array_equal(scales, scales.astype(store_dtype).astype(jnp.float32))
    if zero_point == "integer":
        np.testing.assert_array_equal(zeros, zeros.astype(jnp.uint8).astype(jnp.float32))
    else:
        np.testing.assert_array_equal(zeros, zeros.astype(store_dtype).astype(jnp.float32))
    ends = jnp.stack([jnp.minimum(low, 0), jnp.maximum(high, 0)])
    codes = encode(ends, scales, zeros, bits=bits)
    np.testing.assert_array_equal(codes, jnp.clip(jnp.round(codes), 0, 2**bits - 1))
    # Half a step, and what rounding the scale and the zero point costs at the far end.
    slack = 2.0**bits * float(jnp.finfo(store_dtype).eps) * (1 if zero_point == "none" else 2)
    reach = 1.0 if zero_point == "integer" else 0.5
    assert jnp.all(jnp.abs(decode(codes, scales, zeros) - ends) <= (reach + slack) * scales)


@pytest.mark.parametrize("zero_point", ["none", "integer"])
def test_zero_is_exact(zero_point):
    low, high = ranges()
    scales, zeros = fit(low, high, bits=3, zero_point=zero_point, store_dtype="bfloat16")
    nothing = jnp.zeros_like(low)
    assert jnp.all(decode(encode(nothing, scales, zeros, bits=3), scales, zeros) == 0)


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("value", [0.0, 1e-39, 1e-37, 3.5, -2.25])
def test_constant_and_vanishing_groups_stay_finite(value, zero_point):
    w = jnp.full((4,), value, jnp.float32)
    scales, zeros = fit(w, w, bits=2, zero_point=zero_point, store_dtype="float32")
    got = decode(encode(w, scales, zeros, bits=2), scales, zeros)
    np.testing.assert_allclose(got, w, rtol=1e-6, atol=1e-35)


def test_codes_are_the_nearest():
    low, high = ranges()
    scales, zeros = fit(low, high, bits=4, zero_point="float", store_dtype="float32")
    w = jnp.linspace(0.0, 1.0, 33)[:, None] * (high - low) + low
    codes = encode(w, scales, zeros, bits=4)
    every = decode(jnp.arange(16.0)[:, None, None], scales, zeros)
    best = jnp.min(jnp.abs(every - w), axis=0)
    assert jnp.all(jnp.abs(decode(codes, scales, zeros) - w) <= best + 1e-5 * scales)

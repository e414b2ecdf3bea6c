"""The oracle of all kernels against float64 NumPy, written straight from the formulas."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_weights import EPS, oracle_weight, random_weight

from pallas_kernels import reference
from pallas_kernels.layout import PLANES, pack, unpack
from pallas_kernels.problem import matmul_problem, rounding_problem

ALL_BITS = sorted(PLANES)


@st.composite
def weights(draw):
    bits = draw(st.sampled_from(ALL_BITS))
    group_size = 8 * draw(st.sampled_from([1, 2, 3, 4, 7, 12]))
    n_group, n = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    scale_dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    zero_dtype = draw(st.sampled_from([None, "float32", "bfloat16", "float16", "uint8"]))
    seed = draw(st.integers(0, 2**32 - 1))
    return (
        bits,
        group_size,
        random_weight(seed, bits, group_size, n_group, n, scale_dtype, zero_dtype),
    )


@settings(deadline=None, max_examples=20)
@given(weights())
def test_dequantize_is_the_formula(weight):
    bits, group_size, (codes, scales, zeros) = weight
    planes = pack(jnp.asarray(codes), bits=bits)
    w = reference.dequantize(planes, scales, zeros, bits=bits, group_size=group_size)
    exact, size = oracle_weight(codes, scales, zeros, bits, group_size)
    assert w.dtype == jnp.float32
    # Two roundings: the difference and the product.
    assert np.all(np.abs(np.asarray(w, np.float64) - exact) <= 2 * EPS * size)


def test_dequantize_takes_a_stack_and_a_dtype():
    stack = [random_weight(seed, 5, 16, 2, 7) for seed in range(3)]
    codes, scales, zeros = (jnp.stack([jnp.asarray(w[i]) for w in stack]) for i in range(3))
    planes = pack(codes, bits=5)
    w = reference.dequantize(planes, scales, zeros, bits=5, group_size=16, dtype=jnp.bfloat16)
    assert w.dtype == jnp.bfloat16
    for got, one in zip(w, stack, strict=True):
        exact, size = oracle_weight(*one, 5, 16)
        assert np.all(np.abs(np.asarray(got, np.float64) - exact) <= 2**-8 * size)


@pytest.mark.parametrize("d_in", [96, 90])
@pytest.mark.parametrize("bits", [3, 4])
def test_product_with_a_channel_scale_and_low_rank(bits, d_in):
    codes, scales, zeros = random_weight(bits, bits, 32, 3, 10)
    rng = np.random.default_rng(1)
    x, d = rng.normal(size=(2, 5, d_in)), rng.uniform(0.5, 2, d_in)
    down, up = rng.normal(size=(d_in, 4)), rng.normal(size=(4, 10))
    x, d, down, up = (np.asarray(a, np.float32) for a in (x, d, down, up))
    y = reference.packed_matmul(
        jnp.asarray(x), pack(jnp.asarray(codes), bits=bits), scales, zeros, jnp.asarray(d),
        (jnp.asarray(down), jnp.asarray(up)),
        problem=matmul_problem(x, scales, zeros, bits=bits, group_size=32),
    )  # fmt: skip
    w, size = (a[:d_in] / d[:, None] for a in oracle_weight(codes, scales, zeros, bits, 32))
    x, down, up = (a.astype(np.float64) for a in (x, down, up))
    bound = (96 + 8) * EPS * (np.abs(x) @ (size + np.abs(down) @ np.abs(up)))
    assert np.all(np.abs(np.asarray(y, np.float64) - x @ (w + down @ up)) <= bound)


@pytest.mark.parametrize("store_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("zero_point", ["none", "float", "integer"])
@pytest.mark.parametrize("bits", [2, 5])
def test_every_code_is_the_nearest_and_padding_is_exact(bits, zero_point, store_dtype):
    rng = np.random.default_rng(bits)
    d_in, n, rows = 90, 11, 32
    w, d = rng.normal(size=(d_in, n)), rng.uniform(0.5, 2, d_in)
    down, up = rng.normal(size=(d_in, 3)), rng.normal(size=(3, n))
    w, d, down, up = (np.asarray(a, np.float32) for a in (w, d, down, up))
    planes, scales, zeros = reference.quantize_pack(
        jnp.asarray(w), jnp.asarray(d), None, (jnp.asarray(down), jnp.asarray(up)),
        problem=rounding_problem(w, bits=bits, group_size=rows, zero_point=zero_point,
                                 store_dtype=store_dtype),
    )  # fmt: skip
    assert scales.dtype == store_dtype
    assert scales.shape == (3, n)
    if zero_point == "none":
        assert zeros is None
    else:
        assert zeros.dtype == ("uint8" if zero_point == "integer" else store_dtype)
    target = np.zeros((96, n))
    target[:d_in] = (w.astype(np.float64) - down.astype(np.float64) @ up) * d[:, None]
    s = np.repeat(np.asarray(scales, np.float64), rows, 0)
    z = 2.0 ** (bits - 1) if zeros is None else np.repeat(np.asarray(zeros, np.float64), rows, 0)
    codes = np.asarray(unpack(planes, bits=bits), np.float64)
    error = np.abs(s * (codes - z) - target)
    every = s * (np.arange(2**bits)[:, None, None] - z)
    assert np.all(error <= np.abs(every - target).min(0) + 1e-4 * s)
    if zero_point != "float":
        assert np.all(s[d_in:] * (codes[d_in:] - np.broadcast_to(z, s.shape)[d_in:]) == 0)


def test_the_search_takes_each_groups_best_factor():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(64, 60)) ** 3, jnp.float32)
    h = rng.gamma(0.5, size=64)
    kind = {"bits": 3, "group_size": 32, "zero_point": "float", "store_dtype": "float32"}

    def errors(shrinks, importance=None):
        problem = rounding_problem(w, **kind, shrinks=shrinks)
        packed = reference.quantize_pack(w, None, importance, problem=problem)
        got = reference.dequantize(*packed, bits=3, group_size=32)
        wrong = np.square(np.asarray(got, np.float64) - np.asarray(w, np.float64))
        weighed = wrong if importance is None else h[:, None] * wrong
        return weighed.reshape(2, 32, -1).sum(1)

    factors = (1.0, 0.9, 0.8)
    for importance in (None, jnp.asarray(h, jnp.float32)):
        each = np.stack([errors((f,), importance) for f in factors])
        np.testing.assert_allclose(errors(factors, importance), each.min(0), rtol=1e-4)
        assert len(set(each.argmin(0).ravel())) == 3


@pytest.mark.parametrize("quantized", [False, True])
def test_prefill_is_the_two_calls(quantized):
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 60), (60, 9)))
    d = jnp.asarray(rng.uniform(0.5, 2, 60), jnp.float32)
    low_rank = (jnp.ones((60, 2)), jnp.full((2, 9), 0.1))
    kind = {"bits": 4, "group_size": 32, "zero_point": "float", "store_dtype": "bfloat16"}
    problem = rounding_problem(w, d, low_rank, x, **kind, quantized=quantized)
    y, packed = reference.prefill_quantize(x, w, d, None, low_rank, problem=problem)
    alone = reference.quantize_pack(w, d, None, low_rank, problem=problem)
    for one, other in zip((*packed[0], *packed[1:]), (*alone[0], *alone[1:]), strict=True):
        np.testing.assert_array_equal(one, other)
    if quantized:
        want = reference.packed_matmul(x, *alone, d, low_rank, problem=problem)
    else:
        want = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5)

"""The portable implementation against a float64 oracle written straight from the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.layout import PLANES, pack
from pallas_kernels.reference import FEW_ROWS, dequantize, packed_matmul

ALL_BITS = sorted(PLANES)
REGIMES = (1, 2, FEW_ROWS + 1, 33)
EPS = float(np.finfo(np.float32).eps)


def random_weight(seed, bits, group_size, n_group, n, scale_dtype="float32", zero_dtype="float32"):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (n_group * group_size, n), dtype=np.uint8)
    scales = jnp.asarray(rng.uniform(0.01, 1, (n_group, n)), scale_dtype)
    zeros = None
    if zero_dtype is not None:
        top = 2**bits - 1
        values = rng.integers(0, top, (n_group, n), endpoint=True)
        if zero_dtype != "uint8":
            values = values + rng.uniform(-0.5, 0.5, (n_group, n))
        zeros = jnp.asarray(values, zero_dtype)
    return codes, scales, zeros


def oracle_weight(codes, scales, zeros, bits, group_size):
    """``s (q - z)`` and ``s (q + |z|)``, the latter to bound rounding."""
    s = np.repeat(np.asarray(scales, np.float64), group_size, -2)
    z = 2.0 ** (bits - 1) if zeros is None else np.asarray(zeros, np.float64)
    z = z if zeros is None else np.repeat(z, group_size, -2)
    return s * (codes - z), np.abs(s) * (codes + np.abs(z))


@st.composite
def weights(draw):
    bits = draw(st.sampled_from(ALL_BITS))
    group_size = 8 * draw(st.sampled_from([1, 2, 3, 4, 7, 12]))
    n_group = draw(st.integers(1, 3))
    n = draw(st.integers(1, 9))
    scale_dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    zero_dtype = draw(st.sampled_from([None, "float32", "bfloat16", "float16", "uint8"]))
    seed = draw(st.integers(0, 2**32 - 1))
    weight = random_weight(seed, bits, group_size, n_group, n, scale_dtype, zero_dtype)
    return seed, bits, group_size, *weight


@settings(deadline=None, max_examples=20)
@given(weights())
def test_dequantize_is_the_formula(weight):
    _, bits, group_size, codes, scales, zeros = weight
    planes = pack(jnp.asarray(codes), bits=bits, group_size=group_size)
    w = dequantize(planes, scales, zeros, bits=bits, group_size=group_size)
    exact, size = oracle_weight(codes, scales, zeros, bits, group_size)
    assert w.dtype == jnp.float32
    # Two roundings: the difference and the product.
    assert np.all(np.abs(np.asarray(w, np.float64) - exact) <= 2 * EPS * size)


@settings(deadline=None, max_examples=20)
@given(weights(), st.sampled_from(REGIMES))
def test_matmul_within_the_rounding_bound(weight, m):
    seed, bits, group_size, codes, scales, zeros = weight
    k = codes.shape[0]
    x = np.random.default_rng(seed + 1).standard_normal((m, k), dtype=np.float32)
    planes = pack(jnp.asarray(codes), bits=bits, group_size=group_size)
    y = packed_matmul(jnp.asarray(x), planes, scales, zeros, bits=bits, group_size=group_size)
    exact, size = oracle_weight(codes, scales, zeros, bits, group_size)
    # k products and k sums in any order, then zero point, scale, group sum: k + 4 roundings.
    bound = (k + 4) * EPS * (np.abs(x).astype(np.float64) @ size)
    assert y.shape == (m, codes.shape[1])
    assert np.all(np.abs(np.asarray(y, np.float64) - x.astype(np.float64) @ exact) <= bound)


@pytest.mark.parametrize("m", (*REGIMES, FEW_ROWS))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_integers_are_exact(bits, symmetric, m):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (64, 11), dtype=np.uint8)
    zeros = None if symmetric else rng.integers(0, 2**bits, (2, 11), dtype=np.uint8)
    x = rng.integers(-8, 9, (m, 64))
    planes = pack(jnp.asarray(codes), bits=bits, group_size=32)
    y = packed_matmul(
        jnp.asarray(x, jnp.float32),
        planes,
        jnp.ones((2, 11)),
        None if symmetric else jnp.asarray(zeros),
        bits=bits,
        group_size=32,
    )
    z = 2 ** (bits - 1) if symmetric else np.repeat(zeros.astype(np.int64), 32, 0)
    np.testing.assert_array_equal(np.asarray(y), x @ (codes.astype(np.int64) - z))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lead", [(), (2, 1), (3, 4), (0,)])
def test_shape_and_dtype_follow_x(lead, dtype):
    codes, scales, zeros = random_weight(0, 4, 16, 2, 6)
    planes = pack(jnp.asarray(codes), bits=4, group_size=16)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((*lead, 32)), dtype)
    y = packed_matmul(x, planes, scales, zeros, bits=4, group_size=16)
    assert y.shape == (*lead, 6)
    assert y.dtype == x.dtype
    exact, size = oracle_weight(codes, scales, zeros, 4, 16)
    bound = (36 * EPS + float(jnp.finfo(dtype).eps)) * (np.abs(np.asarray(x, np.float64)) @ size)
    assert np.all(np.abs(np.asarray(y, np.float64) - np.asarray(x, np.float64) @ exact) <= bound)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_under_jit_vmap_and_scan_over_layers(bits, rows):
    layers, group_size, k = 3, 16, 32
    stack = [random_weight(seed, bits, group_size, 2, k) for seed in range(layers)]
    codes, scales, zeros = (np.stack([np.asarray(w[i]) for w in stack]) for i in range(3))
    planes = pack(jnp.asarray(codes), bits=bits, group_size=group_size)
    x = np.random.default_rng(9).standard_normal((rows, k), dtype=np.float32)

    def one(x, layer):
        return packed_matmul(x, *layer, bits=bits, group_size=group_size)

    @jax.jit
    def scanned(x, layers):
        return jax.lax.scan(lambda x, layer: (0.1 * one(x, layer), None), x, layers)[0]

    stacked = (planes, jnp.asarray(scales), jnp.asarray(zeros))
    w = np.stack([oracle_weight(*weight, bits, group_size)[0] for weight in stack])
    expected = x.astype(np.float64)
    for layer in range(layers):
        expected = 0.1 * expected @ w[layer]
    actual = np.asarray(scanned(jnp.asarray(x), stacked), np.float64)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * scale)

    mapped = jax.vmap(one, in_axes=(None, 0))(jnp.asarray(x), stacked)
    np.testing.assert_allclose(
        mapped, x.astype(np.float64) @ w, rtol=0, atol=1e-4 * np.abs(w).max()
    )
    whole = dequantize(*stacked, bits=bits, group_size=group_size, dtype=jnp.bfloat16)
    assert whole.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(whole, np.float64), w, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("m", [2, FEW_ROWS + 1])
def test_gradient_of_x_is_the_transposed_product(m):
    codes, scales, zeros = random_weight(3, 3, 8, 3, 5)
    planes = pack(jnp.asarray(codes), bits=3, group_size=8)
    w, size = oracle_weight(codes, scales, zeros, 3, 8)

    def total(x):
        return packed_matmul(x, planes, scales, zeros, bits=3, group_size=8).sum()

    grad = jax.grad(total)(jnp.ones((m, 24)))
    np.testing.assert_allclose(grad[0], w.sum(1), rtol=0, atol=9 * EPS * size.sum(1).max())


GOOD = {
    "x": jnp.zeros((2, 32)),
    "planes": (jnp.zeros((16, 4), jnp.uint8),),
    "scales": jnp.zeros((2, 4)),
    "zeros": jnp.zeros((2, 4)),
    "bits": 4,
    "group_size": 16,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 31))}, r"x: expected floating \[\.\.\., 32\].*got float32\[2, 31\]"),
        ({"x": jnp.zeros((2, 32), jnp.int32)}, "x: expected floating.*got int32"),
        ({"x": jnp.zeros(())}, "x: expected floating"),
        ({"bits": 7}, "bits: expected one of"),
        ({"bits": 5}, "planes: expected a tuple of 2"),
        ({"group_size": 20}, "group_size: expected a positive multiple of 8"),
        ({"scales": jnp.zeros((1, 4))}, r"scales: expected shape \(2, 4\).*got \(1, 4\)"),
        ({"scales": jnp.zeros((2, 4), jnp.uint8)}, "scales: expected one of .*got uint8"),
        ({"zeros": jnp.zeros((4, 2))}, r"zeros: expected shape \(2, 4\).*got \(4, 2\)"),
        ({"zeros": jnp.zeros((2, 4), jnp.int8)}, "zeros: expected one of .*got int8"),
        (
            {
                "planes": (jnp.zeros((3, 16, 4), jnp.uint8),),
                "scales": jnp.zeros((3, 2, 4)),
                "zeros": None,
            },
            r"planes: expected two axes.*scan or vmap",
        ),
    ],
)
def test_matmul_refuses(change, message):
    arguments = {**GOOD, **change}
    x, planes, scales, zeros = (arguments.pop(name) for name in ("x", "planes", "scales", "zeros"))
    with pytest.raises(ValueError, match=message):
        packed_matmul(x, planes, scales, zeros, **arguments)


def test_dequantize_refuses_scales_of_another_shape():
    with pytest.raises(ValueError, match=r"scales: expected shape \(2, 4\)"):
        dequantize(GOOD["planes"], jnp.zeros((2, 5)), None, bits=4, group_size=16)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("group_size", [8, 88, 152, 192])
def test_groups_with_awkward_column_counts(group_size, bits):
    codes, scales, zeros = random_weight(5, bits, group_size, 2, 7)
    planes = pack(jnp.asarray(codes), bits=bits, group_size=group_size)
    x = np.random.default_rng(6).standard_normal((1, 2 * group_size), dtype=np.float32)
    y = packed_matmul(jnp.asarray(x), planes, scales, zeros, bits=bits, group_size=group_size)
    exact, size = oracle_weight(codes, scales, zeros, bits, group_size)
    bound = (2 * group_size + 4) * EPS * (np.abs(x).astype(np.float64) @ size)
    assert np.all(np.abs(np.asarray(y, np.float64) - x.astype(np.float64) @ exact) <= bound)


@pytest.mark.parametrize("rows", [1, FEW_ROWS + 1])
def test_a_token_loop_keeps_the_weight_packed(rows):
    k = 128
    codes, scales, zeros = random_weight(7, 4, 32, k // 32, k)
    planes = pack(jnp.asarray(codes), bits=4, group_size=32)

    @jax.jit
    def tokens(x, planes):
        def step(_, x):
            return 0.01 * packed_matmul(x, planes, scales, zeros, bits=4, group_size=32)

        return jax.lax.fori_loop(0, 5, step, x)

    compiled = tokens.lower(jnp.ones((rows, k)), planes).compile().as_text()
    carried = next(line for line in compiled.splitlines() if " while(" in line).split(" while(")[0]
    # Unpacked codes, in any layout, would be carried as k * k elements or slabs of them.
    assert "u8[64,128]" in carried
    assert f"f32[{k},{k}]" not in carried
    assert carried.count("f32[") <= 3

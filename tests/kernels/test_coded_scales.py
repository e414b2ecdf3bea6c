"""Scales and zero points of eight or four bits: what is stored, and what is refused."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_weights import EPS, coded_weight, oracle_weight, paired_weight, stored_grid

from pallas_kernels import (
    CodedPairs,
    CodedScales,
    dequantize,
    grid,
    packed_matmul,
    prefill_quantize,
    quantize_pack,
    reference,
    xla,
)
from pallas_kernels.layout import PLANES, pack, unpack
from pallas_kernels.problem import rounding_problem

ALL_BITS = sorted(PLANES)
GROUP = 32
WIDTHS = pytest.mark.parametrize("bits", ALL_BITS)
KINDS = pytest.mark.parametrize("zero_point", grid.ZERO_POINTS)
PAIRED = [bits for bits in ALL_BITS if bits < 8]


@WIDTHS
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", ["bfloat16", "float32"])
def test_dequantize_is_the_stored_form(bits, symmetric, columns):
    """``c u (q - z 2**(bits - 8))``, written out in float64."""
    codes, scales, zeros = coded_weight(bits, bits, GROUP, 5, 7, columns, symmetric)
    u, c = (np.asarray(a, np.float64) for a in (scales.codes, scales.columns))
    z = 2.0 ** (bits - 1)
    if not symmetric:
        z = np.repeat(np.asarray(zeros, np.float64), GROUP, 0) * 2.0 ** (bits - 8)
    exact = c * np.repeat(u, GROUP, 0) * (codes - z)
    planes = pack(jnp.asarray(codes), bits=bits)
    got = dequantize(planes, scales, zeros, bits=bits, group_size=GROUP)
    # The difference is exact; c u, and its product with that, are rounded.
    assert np.all(np.abs(np.asarray(got, np.float64) - exact) <= 2 * EPS * np.abs(exact))
    np.testing.assert_array_equal(exact, oracle_weight(codes, scales, zeros, bits, GROUP)[0])


@pytest.mark.parametrize("bits", PAIRED)
def test_dequantize_takes_bytes_apart(bits):
    """``c u (q - z 2**(bits - 4))``, written out in float64, byte by byte."""
    codes, scales, zeros = paired_weight(bits, bits, GROUP, 5, 7)
    assert zeros is None
    c = np.asarray(scales.columns, np.float64)
    got = dequantize(pack(jnp.asarray(codes), bits=bits), scales, None, bits=bits, group_size=GROUP)
    for (row, column), byte in np.ndenumerate(np.repeat(np.asarray(scales.codes), GROUP, 0)):
        u, z = int(byte) // 16, int(byte) % 16
        exact = c[column] * u * (int(codes[row, column]) - z * 2.0 ** (bits - 4))
        assert abs(float(got[row, column]) - exact) <= 2 * EPS * abs(exact)


@pytest.mark.parametrize(
    ("bits", "weight"),
    [(b, coded_weight) for b in ALL_BITS]
    + [(b, functools.partial(coded_weight, symmetric=True)) for b in ALL_BITS]
    + [(b, paired_weight) for b in PAIRED],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 2, xla.FEW_ROWS + 1])
def test_product_of_every_layer_within_the_rounding_bound(bits, weight, rows):
    n_group, n, layers = 3, 9, 2
    every = [weight(s, bits, GROUP, n_group, n) for s in range(layers)]
    codes, scales, zeros = jax.tree.map(lambda *a: jnp.stack([jnp.asarray(b) for b in a]), *every)
    k, d_in = n_group * GROUP, n_group * GROUP - 3
    rng = np.random.default_rng(bits)
    x = jnp.asarray(rng.standard_normal((rows, d_in)), jnp.float32)
    call = functools.partial(packed_matmul, bits=bits, group_size=GROUP)
    planes = pack(codes, bits=bits)
    for layer in range(layers):
        exact, size = (a[:d_in] for a in oracle_weight(*every[layer], bits, GROUP))
        bound = (k + 6) * EPS * (np.abs(np.asarray(x, np.float64)) @ size)
        one = jax.tree.map(lambda a, i=layer: a[i], (planes, scales, zeros))
        for y in (call(x, planes, scales, zeros, layer=layer), call(x, *one)):
            assert y.shape == (rows, n)
            wrong = np.abs(np.asarray(y, np.float64) - np.asarray(x, np.float64) @ exact)
            assert np.all(wrong <= bound)


CODES, SCALES, ZEROS = coded_weight(0, 4, GROUP, 2, 6)
X, PLANES_OF = jnp.ones((2, 64)), pack(jnp.asarray(CODES), bits=4)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"scales": replace(SCALES, codes=SCALES.codes.astype(jnp.int32))},
         ["scales.codes", "uint8", "got int32"]),
        ({"scales": replace(SCALES, codes=SCALES.codes[:1])}, ["scales.codes", "(2, 6)", "(1, 6)"]),
        ({"scales": replace(SCALES, columns=SCALES.columns[None])},
         ["scales.columns", "(6,)", "(1, 6)"]),
        ({"scales": replace(SCALES, columns=SCALES.columns[:5])},
         ["scales.columns", "(6,)", "(5,)"]),
        ({"scales": replace(SCALES, columns=SCALES.columns.astype(jnp.float16))},
         ["scales.columns", "float32, bfloat16", "float16"]),
        ({"zeros": ZEROS.astype(jnp.bfloat16)}, ["zeros", "uint8", "bfloat16"]),
        ({"zeros": ZEROS[:1]}, ["zeros", "(2, 6)", "(1, 6)"]),
        ({"scales": CodedPairs(SCALES.codes, SCALES.columns)},
         ["zeros", "None beside CodedPairs", "uint8[2, 6]"]),
        # Codes without their columns are no scales.
        ({"scales": SCALES.codes}, ["scales", "float32", "uint8"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(change, parts):
    given = {"scales": SCALES, "zeros": ZEROS} | change
    with pytest.raises(ValueError) as caught:
        packed_matmul(X, PLANES_OF, given["scales"], given["zeros"], bits=4, group_size=GROUP)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"store_dtype": "float16"}, ["store_dtype", "float32, bfloat16", "float16"]),
        ({"scales": "codes"}, ["scales", "float, coded, coded4", "'codes'"]),
        ({"scales": "coded4", "zero_point": "none"}, ["coded4", "'float'", "'none'"]),
        ({"scales": "coded4", "zero_point": "integer"}, ["coded4", "'float'", "'integer'"]),
        ({"scales": "coded4", "bits": 8}, ["coded4", "2 to 5", "8"]),
    ],
)
def test_the_quantizers_say_what_does_not_fit(change, parts):
    kind = {"bits": 4, "group_size": GROUP, "zero_point": "float", "store_dtype": "bfloat16",
            "scales": "coded"} | change  # fmt: skip
    w = jnp.ones((64, 6))
    for call in (quantize_pack, functools.partial(prefill_quantize, X)):
        with pytest.raises(ValueError) as caught:
            call(w, **kind)
        for part in parts:
            assert part in str(caught.value), str(caught.value)


def fitted(groups, bits, zero_point, store_dtype):
    """Scales and zero points of ``[n_group, group, n]``, and the columns' numbers."""
    kind = {"bits": bits, "zero_point": zero_point, "store_dtype": store_dtype, "scales": "coded"}
    low, high = groups.min(1), groups.max(1)
    columns = grid.column_scales(low, high, **kind)
    return grid.fit(low, high, columns, **kind), columns, kind


@WIDTHS
@KINDS
@pytest.mark.parametrize("store_dtype", ["float32", "bfloat16"])
def test_the_range_is_covered_by_what_is_stored(bits, zero_point, store_dtype):
    rng = np.random.default_rng(bits)
    groups = rng.standard_t(4, (24, 16, 40)) * np.exp(rng.normal(size=(24, 1, 40)))
    groups = jnp.asarray(groups, jnp.float32)
    (scales, zeros), columns, kind = fitted(groups, bits, zero_point, store_dtype)
    np.testing.assert_array_equal(columns, columns.astype(store_dtype).astype(jnp.float32))
    stored, whole = grid.write(scales, zeros, columns, **kind)
    assert stored.codes.dtype == jnp.uint8
    assert stored.columns.dtype == store_dtype
    assert stored.codes.min() >= 1
    # The largest scale of a column is its number's multiple by 255, but for that one's rounding.
    assert np.all(np.asarray(stored.codes).max(0) >= 253)
    if zero_point == "none":
        assert whole is None
    else:
        assert whole.dtype == jnp.uint8
    # What is stored reads as what codes are chosen from, to the bit.
    for one, other in zip(grid.read(stored, whole, bits=bits), (scales, zeros), strict=True):
        np.testing.assert_array_equal(jnp.broadcast_to(one, other.shape), other)
    ends = jnp.stack([jnp.minimum(groups.min(1), 0), jnp.maximum(groups.max(1), 0)])
    codes = grid.encode(ends, scales, zeros, bits=bits)
    wrong = jnp.abs(grid.decode(codes, scales, zeros) - ends)
    # Half a step; half a step of the zero point; what the scale lost, over all of its codes: half
    # of the column's number, and that one's rounding.
    step = {"none": 0.0, "float": 2.0 ** (bits - 9), "integer": 0.5}[zero_point]
    lost = columns / scales / 2 + float(jnp.finfo(store_dtype).eps)
    assert jnp.all(wrong <= scales * (0.5 + step + 2**bits * lost + 1e-4))


@pytest.mark.parametrize("bits", PAIRED)
def test_four_bits_cover_the_range_and_read_as_they_were_fitted(bits):
    rng = np.random.default_rng(bits)
    groups = rng.standard_t(4, (24, 16, 40)) * np.exp(rng.normal(size=(24, 1, 40)))
    kind = {"bits": bits, "zero_point": "float", "store_dtype": "bfloat16", "scales": "coded4"}
    low, high = (jnp.asarray(a, jnp.float32) for a in (groups.min(1), groups.max(1)))
    columns = grid.column_scales(low, high, **kind)
    scales, zeros = grid.fit(low, high, columns, **kind)
    stored, apart = grid.write(scales, zeros, columns, **kind)
    assert isinstance(stored, CodedPairs)
    assert apart is None
    for one, other in zip(grid.read(stored, None, bits=bits), (scales, zeros), strict=True):
        np.testing.assert_array_equal(one, other)
    u, z = np.divmod(np.asarray(stored.codes), 16)
    # The nearest of each, as plain arithmetic has it.
    c = np.asarray(stored.columns, np.float64)
    low, high = np.minimum(np.asarray(low, np.float64), 0), np.maximum(high, 0.0)
    wanted = np.clip((high - low) / (2**bits - 1) / c, 1, 15)
    assert np.all(np.abs(u - wanted) <= 0.5 + 1e-4)
    assert np.all(u.max(0) == 15)
    wanted = np.clip(-low / (c * u) * 2.0 ** (4 - bits), 0, 15)
    assert np.all(np.abs(z - wanted) <= 0.5 + 1e-4)


@KINDS
@pytest.mark.parametrize("value", [0.0, 1e-39, 1e-37, 3.5, -2.25, 3e38])
def test_nothing_constants_and_extremes_stay_finite(value, zero_point):
    """Beside a column of ordinary weights, and alone in a column."""
    groups = np.zeros((3, 8, 2), np.float32)
    groups[1, :, 0] = value
    groups[2, :, 1] = np.linspace(-1, 1, 8)
    groups = jnp.asarray(groups)
    (scales, zeros), columns, kind = fitted(groups, 4, zero_point, "bfloat16")
    codes = grid.encode(groups, scales[:, None], zeros[:, None], bits=4)
    back = grid.decode(codes, scales[:, None], zeros[:, None])
    assert jnp.all(scales > 0)
    assert jnp.all(jnp.isfinite(back))
    # A group of one value is at an end of its grid; a column's largest is right up to rounding.
    np.testing.assert_allclose(back[1, :, 0], groups[1, :, 0], rtol=2**-7, atol=1e-35)
    assert jnp.all(back[0] == 0), "a group of zeros is exact"
    stored, _ = grid.write(scales, zeros, columns, **kind)
    assert stored.codes.min() >= 1
    assert np.all(np.asarray(stored.columns, np.float32) > 0)


@KINDS
def test_a_zero_weight_is_exact_where_zero_points_are_whole(zero_point):
    rng = np.random.default_rng(3)
    groups = jnp.asarray(rng.normal(size=(6, 16, 9)), jnp.float32).at[:, 3].set(0.0)
    (scales, zeros), _, _ = fitted(groups, 3, zero_point, "bfloat16")
    scales, zeros = scales[:, None], zeros[:, None]
    back = grid.decode(grid.encode(groups, scales, zeros, bits=3), scales, zeros)
    assert jnp.all(back[:, 3] == 0) == (zero_point != "float")


def nearest_codes(packed, target, slack, bits):
    """Asserts that codes are the nearest of what is stored."""
    s, z = stored_grid(*packed[1:], bits)
    z = np.full_like(s, 2.0 ** (bits - 1)) if z is None else z
    s, z = (np.repeat(a, GROUP, 0) for a in (s, z))
    codes = np.asarray(unpack(packed[0], bits=bits), np.float64)
    value = np.clip(target / s + z, 0, 2**bits - 1)
    assert np.all(np.abs(codes - value) <= 0.5 + slack / s + 4 * EPS * (np.abs(target / s) + z))


@pytest.mark.parametrize(
    ("bits", "zero_point", "scales"),
    [(b, zero_point, "coded") for b in ALL_BITS for zero_point in grid.ZERO_POINTS]
    + [(b, "float", "coded4") for b in PAIRED],
)
def test_the_quantizers_are_the_references_and_the_nearest(bits, zero_point, scales):
    rng = np.random.default_rng(bits)
    d_in, n = 90, 12
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, d_in), (d_in, n)))
    d, h = (jnp.asarray(rng.uniform(0.5, 2, d_in), jnp.float32) for _ in range(2))
    kind = {"bits": bits, "group_size": GROUP, "zero_point": zero_point, "scales": scales,
            "store_dtype": "bfloat16", "shrinks": (1.0, 0.8) if bits % 2 else (1.0,)}  # fmt: skip
    problem = rounding_problem(w, d, None, **kind)
    want = jax.jit(functools.partial(reference.quantize_pack, problem=problem))(w, d, h)
    alone = quantize_pack(w, d, h, **kind)
    for quantized in (False, True):
        y, packed = prefill_quantize(x, w, d, h, **kind, quantized=quantized)
        for got in (alone, packed):
            jax.tree.map(np.testing.assert_array_equal, got, want)
        left, weight = np.asarray(x, np.float64), np.asarray(w, np.float64)
        if quantized:
            left = left / np.asarray(d, np.float64)
            s, z = stored_grid(*want[1:], bits)
            z = 2.0 ** (bits - 1) if z is None else np.repeat(z, GROUP, 0)
            codes = np.asarray(unpack(want[0], bits=bits))
            weight = (np.repeat(s, GROUP, 0) * (codes - z))[:d_in]
        bound = (d_in + 8) * EPS * (np.abs(left) @ np.abs(weight))
        bound = bound + (quantized * 2 * EPS * 2**bits * np.abs(left)) @ np.ones_like(weight)
        assert np.all(np.abs(np.asarray(y, np.float64) - left @ weight) <= bound)
    target = np.zeros((96, n))
    target[:d_in] = np.asarray(w, np.float64) * np.asarray(d, np.float64)[:, None]
    nearest_codes(want, target, EPS * np.abs(target), bits)


def test_a_batch_of_weights_is_packed_and_multiplied():
    rng = np.random.default_rng(5)
    w = jnp.asarray(rng.normal(size=(3, 64, 8)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 64)), jnp.float32)
    kind = {"bits": 3, "group_size": GROUP}

    def one(w):
        packed = quantize_pack(w, **kind, zero_point="float", store_dtype="bfloat16",
                               scales="coded")  # fmt: skip
        return packed, packed_matmul(x, *packed, **kind)

    packed, y = jax.jit(jax.vmap(one))(w)
    alone = jax.jit(one)
    assert isinstance(packed[1], CodedScales)
    for i in range(len(w)):
        mine = jax.tree.map(lambda a, i=i: a[i], packed)
        jax.tree.map(np.testing.assert_array_equal, mine, alone(w[i])[0])
        back = np.asarray(dequantize(*mine, **kind), np.float64)
        bound = 80 * EPS * (np.abs(np.asarray(x, np.float64)) @ (np.abs(back) + 4))
        assert np.all(
            np.abs(np.asarray(y[i], np.float64) - np.asarray(x, np.float64) @ back) <= bound
        )

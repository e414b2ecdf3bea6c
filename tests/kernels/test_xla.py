"""The portable implementation: against float64, in loops, and what XLA makes of it."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_weights import EPS, oracle_weight, random_weight

from pallas_kernels import packed_matmul, reference, xla
from pallas_kernels.layout import PLANES, pack
from pallas_kernels.problem import matmul_problem, rounding_problem

ALL_BITS = sorted(PLANES)
REGIMES = (1, 2, xla.FEW_ROWS + 1, 33)


def one_layer(x, planes, scales, zeros, **kind):
    """The internal call, for a weight that is not stacked."""
    weight = jax.tree.map(lambda a: a[None], (planes, scales, zeros))
    problem = matmul_problem(x, scales, zeros, **kind)
    return xla.packed_matmul(x, *weight, jnp.zeros((), jnp.int32), problem=problem)


@st.composite
def weights(draw):
    bits = draw(st.sampled_from(ALL_BITS))
    group_size = 8 * draw(st.sampled_from([1, 2, 3, 4, 7, 12]))
    n_group, n = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    scale_dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    zero_dtype = draw(st.sampled_from([None, "float32", "bfloat16", "float16", "uint8"]))
    seed = draw(st.integers(0, 2**32 - 1))
    weight = random_weight(seed, bits, group_size, n_group, n, scale_dtype, zero_dtype)
    return seed, bits, group_size, weight


@settings(deadline=None, max_examples=25)
@given(weights(), st.sampled_from(REGIMES))
def test_matmul_within_the_rounding_bound(weight, m):
    seed, bits, group_size, (codes, scales, zeros) = weight
    k = codes.shape[0]
    x = np.random.default_rng(seed + 1).standard_normal((m, k), dtype=np.float32)
    planes = pack(jnp.asarray(codes), bits=bits)
    y = one_layer(jnp.asarray(x), planes, scales, zeros, bits=bits, group_size=group_size)
    exact, size = oracle_weight(codes, scales, zeros, bits, group_size)
    # k products and k sums in any order, then zero point, scale, group sum: k + 4 roundings.
    bound = (k + 4) * EPS * (np.abs(x).astype(np.float64) @ size)
    assert y.shape == (m, codes.shape[1])
    assert np.all(np.abs(np.asarray(y, np.float64) - x.astype(np.float64) @ exact) <= bound)


@pytest.mark.parametrize("m", (*REGIMES, xla.FEW_ROWS))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_integers_are_exact(bits, symmetric, m):
    # 12 rows an octet, groups of 32: groups straddle octets.
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (96, 11), dtype=np.uint8)
    zeros = None if symmetric else rng.integers(0, 2**bits, (3, 11), dtype=np.uint8)
    x = rng.integers(-8, 9, (m, 96))
    y = one_layer(
        jnp.asarray(x, jnp.float32),
        pack(jnp.asarray(codes), bits=bits),
        jnp.ones((3, 11)),
        None if symmetric else jnp.asarray(zeros),
        bits=bits,
        group_size=32,
    )
    z = 2 ** (bits - 1) if symmetric else np.repeat(zeros.astype(np.int64), 32, 0)
    np.testing.assert_array_equal(np.asarray(y), x @ (codes.astype(np.int64) - z))


def test_the_same_holds_as_users_compile_it():
    """In a process of its own: this one compiles without optimizing, see `compilers.QUICK`."""
    here = Path(__file__).parent
    program = (
        "import test_xla as t\n"
        "for bits in t.ALL_BITS:\n"
        "    for m in (1, t.xla.FEW_ROWS + 1):\n"
        "        t.test_integers_are_exact(bits, False, m)\n"
        "t.test_shape_and_dtype_follow_x((3, 1), 'float32')\n"
        "t.test_shape_and_dtype_follow_x((3, 4), 'float32')\n"
    )
    path = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, check=True
    )


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize(("group_size", "n_group"), [(8, 9), (88, 2), (152, 8), (192, 3), (544, 1)])
@pytest.mark.parametrize("limits", [(128, 1), (8, 1), (8, 2**20)])
def test_awkward_groups_and_every_blocking(group_size, n_group, bits, limits, monkeypatch):
    monkeypatch.setattr(xla, "_MIN_BLOCK_ROWS", limits[0])
    monkeypatch.setattr(xla, "_BLOCK_WEIGHTS", limits[1])
    codes, scales, zeros = random_weight(5, bits, group_size, n_group, 7, "bfloat16", "uint8")
    planes = pack(jnp.asarray(codes), bits=bits)
    k = codes.shape[0]
    x = np.random.default_rng(6).standard_normal((xla.FEW_ROWS + 1, k), dtype=np.float32)
    exact, size = oracle_weight(codes, scales, zeros, bits, group_size)
    bound = (k + 4) * EPS * (np.abs(x).astype(np.float64) @ size)
    for rows in (1, len(x)):
        some = jnp.asarray(x[:rows])
        y = one_layer(some, planes, scales, zeros, bits=bits, group_size=group_size)
        wrong = np.abs(np.asarray(y, np.float64) - x[:rows].astype(np.float64) @ exact)
        assert np.all(wrong <= bound[:rows])


@pytest.mark.parametrize("bits", [3, 8])
def test_a_wide_weight_some_columns_at_a_time(bits, monkeypatch):
    monkeypatch.setattr(xla, "_BLOCK_SUMS", 12)
    monkeypatch.setattr(xla, "_BLOCK_WEIGHTS", 4 * xla._MIN_BLOCK_ROWS)
    xla._one_row.clear_cache()
    for m in (1, xla.FEW_ROWS + 1):
        test_integers_are_exact(bits, False, m)
    xla._one_row.clear_cache()


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("run", ["packed_matmul", "dense_matmul"])
def test_float32_sums_of_bfloat16_activations(run, m):
    codes, scales, _ = random_weight(0, 8, 16, 2, 6, "bfloat16", None)
    weight = jax.tree.map(lambda a: a[None], (pack(jnp.asarray(codes), bits=8), scales, None))
    x = jnp.asarray(np.random.default_rng(1).integers(-4, 5, (m, 32)), jnp.bfloat16)
    problem = matmul_problem(x, scales, None, bits=8, group_size=16, out_dtype=jnp.float32)
    y = getattr(xla, run)(x, *weight, jnp.zeros((), jnp.int32), problem=problem)
    assert y.dtype == jnp.float32
    exact, size = oracle_weight(codes, scales, None, 8, 16)
    wide = np.asarray(x, np.float64)
    # The dense product rounds the weight to x's dtype, never the sums.
    eps = EPS if run == "packed_matmul" else float(jnp.finfo(x.dtype).eps) / 2
    assert np.all(
        np.abs(np.asarray(y, np.float64) - wide @ exact) <= 36 * eps * (np.abs(wide) @ size)
    )
    with pytest.raises(ValueError, match="out_dtype: expected one of None, float32"):
        matmul_problem(x, scales, None, bits=8, group_size=16, out_dtype="int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lead", [(), (2, 1), (3, 4), (0,)])
def test_shape_and_dtype_follow_x(lead, dtype):
    codes, scales, zeros = random_weight(0, 4, 16, 2, 6)
    planes = pack(jnp.asarray(codes), bits=4)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((*lead, 32)), dtype)
    y = packed_matmul(x, planes, scales, zeros, bits=4, group_size=16, implementation="xla")
    assert y.shape == (*lead, 6)
    assert y.dtype == x.dtype
    exact, size = oracle_weight(codes, scales, zeros, 4, 16)
    bound = (36 * EPS + float(jnp.finfo(dtype).eps)) * (np.abs(np.asarray(x, np.float64)) @ size)
    assert np.all(np.abs(np.asarray(y, np.float64) - np.asarray(x, np.float64) @ exact) <= bound)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [3, 4])
def test_dense_product_rounds_the_weight_once(bits, dtype):
    stack = [random_weight(seed, bits, 32, 3, 8) for seed in range(2)]
    codes, scales, zeros = (jnp.stack([jnp.asarray(w[i]) for w in stack]) for i in range(3))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((20, 96)), dtype)
    problem = matmul_problem(x, scales, zeros, bits=bits, group_size=32)
    y = xla.dense_matmul(x, pack(codes, bits=bits), scales, zeros, jnp.asarray(1), problem=problem)
    assert y.dtype == x.dtype
    exact, size = oracle_weight(*stack[1], bits, 32)
    x = np.asarray(x, np.float64)
    bound = (100 * EPS + 2 * float(jnp.finfo(dtype).eps)) * (np.abs(x) @ size)
    assert np.all(np.abs(np.asarray(y, np.float64) - x @ exact) <= bound)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_under_jit_vmap_and_scan_over_layers(bits, rows):
    layers, group_size, k = 3, 16, 32
    stack = [random_weight(seed, bits, group_size, 2, k, "bfloat16") for seed in range(layers)]
    codes, scales, zeros = (jnp.stack([jnp.asarray(w[i]) for w in stack]) for i in range(3))
    weight = (pack(codes, bits=bits), scales, zeros)
    x = np.random.default_rng(9).standard_normal((rows, k), dtype=np.float32)

    def one(x, weight, layer=None):
        return packed_matmul(
            x, *weight, bits=bits, group_size=group_size, layer=layer, implementation="xla"
        )

    @jax.jit
    def indexed(x, weight):
        def step(x, layer):
            return 0.1 * one(x, weight, layer), None

        return jax.lax.scan(step, x, jnp.arange(layers))[0]

    @jax.jit
    def sliced(x, weight):
        return jax.lax.scan(lambda x, w: (0.1 * one(x, w), None), x, weight)[0]

    w = np.stack([oracle_weight(*one, bits, group_size)[0] for one in stack])
    expected = x.astype(np.float64)
    for layer in range(layers):
        expected = 0.1 * expected @ w[layer]
    for scanned in (indexed, sliced):
        actual = np.asarray(scanned(jnp.asarray(x), weight), np.float64)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())

    every = x.astype(np.float64) @ w
    limit = {"rtol": 0, "atol": 1e-4 * np.abs(every).max()}
    np.testing.assert_allclose(jax.vmap(one, (None, 0))(jnp.asarray(x), weight), every, **limit)
    by_layer = jax.vmap(one, (None, None, 0))(jnp.asarray(x), weight, jnp.arange(layers))
    np.testing.assert_allclose(by_layer, every, **limit)


def compiled(f, *arguments):
    return jax.jit(f).lower(*arguments).compile().as_text()


@pytest.mark.parametrize("rows", [1, xla.FEW_ROWS + 1])
def test_a_token_loop_keeps_the_weight_packed(rows):
    k = 128
    codes, scales, zeros = random_weight(7, 4, 32, k // 32, k)
    planes = pack(jnp.asarray(codes), bits=4)

    def tokens(x, planes):
        def step(_, x):
            return 0.01 * one_layer(x, planes, scales, zeros, bits=4, group_size=32)

        return jax.lax.fori_loop(0, 5, step, x)

    text = compiled(tokens, jnp.ones((rows, k)), planes)
    carried = next(line for line in text.splitlines() if " while(" in line).split(" while(")[0]
    # Unpacked codes, in any layout, would be carried as k * k elements or slabs of them.
    assert "u8[64,128]" in carried or "u8[1,64,128]" in carried
    assert f"f32[{k},{k}]" not in carried
    assert carried.count("f32[") <= 3


@pytest.mark.parametrize("bits", [3, 4])
def test_a_layer_loop_copies_no_layer_and_widens_no_scales(bits):
    layers, k, n = 3, 128, 96
    stack = [random_weight(s, bits, 32, k // 32, n, "bfloat16", "bfloat16") for s in range(layers)]
    codes, scales, zeros = (jnp.stack([jnp.asarray(w[i]) for w in stack]) for i in range(3))

    def blocks(x, planes, scales, zeros):
        problem = matmul_problem(x, scales, zeros, bits=bits, group_size=32)

        def step(x, layer):
            y = xla.packed_matmul(x, planes, scales, zeros, layer, problem=problem)
            return x + y[:, :1], None

        return jax.lax.scan(step, x, jnp.arange(layers))[0]

    text = compiled(blocks, jnp.ones((1, k)), pack(codes, bits=bits), scales, zeros)
    while_line = next(line for line in text.splitlines() if " while(" in line)
    carried = while_line.split(" while(")[0]
    assert f"f32[{layers},{k // 32},{n}]" not in carried
    # What the loop's body itself writes; the bodies of fusions write nothing.
    body = text[text.index(f"\n%{while_line.split('body=%')[1].split(',')[0]} ") :].split("\n}")[0]
    written = [line for line in body.splitlines() if " fusion(" in line or " copy(" in line]
    assert written
    assert not any("= u8[" in line and f"{n}]" in line for line in written)


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
        ({"x": jnp.zeros((2, 33))}, r"x: expected floating \[\.\.\., 32\].*got float32\[2, 33\]"),
        ({"x": jnp.zeros((2, 16))}, r"x: expected floating \[\.\.\., 32\].*got float32\[2, 16\]"),
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
            r"planes: expected 2 axes.*pass layer=",
        ),
    ],
)
def test_matmul_refuses(change, message):
    arguments = {**GOOD, **change}
    x, planes, scales, zeros = (arguments.pop(name) for name in ("x", "planes", "scales", "zeros"))
    with pytest.raises(ValueError, match=message):
        packed_matmul(x, planes, scales, zeros, **arguments)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_and_packing_of_one_layer_are_the_references(dtype, quantized):
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(rng.normal(size=s), dtype) for s in ((6, 60), (2, 60, 9)))
    d, h = (jnp.asarray(rng.uniform(0.5, 2, 60), jnp.float32) for _ in range(2))
    low_rank = (jnp.ones((60, 2)), jnp.full((2, 9), 0.1))
    kind = {"bits": 3, "group_size": 32, "zero_point": "integer", "store_dtype": "bfloat16",
            "shrinks": (1.0, 0.8)}  # fmt: skip
    problem = rounding_problem(w, d, low_rank, x, **kind, quantized=quantized)
    y, packed = xla.prefill_quantize(x, w, d, h, low_rank, jnp.asarray(1), problem=problem)
    # The low-rank product is the caller's, but what was rounded is the residual.
    packed_want = reference.quantize_pack(w[1], d, h, low_rank, problem=problem)
    if quantized:
        want = reference.packed_matmul(x, *packed_want, d, problem=problem)
    else:
        want, _ = reference.prefill_quantize(x, w[1], d, h, None, problem=problem)
    for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(packed_want), strict=True):
        np.testing.assert_array_equal(one, other)
    assert y.dtype == x.dtype
    tolerance = 4 * float(jnp.finfo(dtype).eps) * float(jnp.abs(want).max())
    np.testing.assert_allclose(
        np.asarray(y, np.float64), np.asarray(want, np.float64), rtol=0, atol=10 * tolerance
    )

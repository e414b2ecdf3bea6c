"""The Triton kernels that quantize, interpreted: against the oracle and against float64."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_weights import EPS, oracle_weight, stored_grid

from pallas_kernels import reference
from pallas_kernels.gpu import prefill_quantize as gpu_prefill
from pallas_kernels.gpu import quantize_pack as gpu_pack
from pallas_kernels.layout import unpack
from pallas_kernels.problem import Problem, rounding_problem


def run(kernel, operands, layer, **kind):
    call = jax.jit(partial(kernel, interpret=True, **kind))
    return call(*operands, jnp.asarray(layer, jnp.int32))


def pack(w, d, h, low_rank, layer, **kind):
    problem = rounding_problem(w, d, low_rank, **kind)
    return run(gpu_pack.quantize_pack, (w, d, h, low_rank), layer, problem=problem)


def oracle(*operands, **kind):
    problem = rounding_problem(operands[0], **kind)
    return jax.jit(partial(reference.quantize_pack, problem=problem))(*operands)


def exact_problem(seed, *, bits, group_size, d_in, n, zero_point, dtype, extra):
    """A weight whose grid, codes and errors are exact in float32, and operands that keep it so.

    ``D (w - A B)`` is quarters of a group's scale, its ends are on the grid, D and the scales are
    powers of two, A and B whole numbers.
    Returns the weight, the optional operands and the scales of the full ranges.
    """
    rng = np.random.default_rng(seed)
    groups = -(-d_in // group_size)
    top = 2**bits - 1
    fine = 4 if extra else 1
    zero = rng.integers(0, top, (groups, 1, n), endpoint=True)
    if zero_point == "none":
        zero[:] = 2 ** (bits - 1)
        low, high = 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1
    else:
        low, high = -zero, top - zero
    # In every second column all but the ends lie in the inner half, so that giving up the ends,
    # whose errors count for nothing, pays.
    inner = np.where(np.arange(n) % 2, 2, 1) if extra else np.ones(n, int)
    units = rng.integers(
        -(-fine * low // inner), fine * high // inner, (groups, group_size, n), endpoint=True
    )
    if d_in % group_size:
        units[-1, d_in % group_size - group_size :] = 0
    units[:, :1], units[:, 1:2] = fine * low, fine * high
    steps = 2.0 ** rng.integers(-2, 2, (groups, 1, n)) / fine
    target = (units * steps).reshape(-1, n)[:d_in]
    d = 2.0 ** rng.integers(-1, 2, d_in) if extra else np.ones(d_in)
    down = rng.integers(-2, 3, (d_in, 3)) if extra else np.zeros((d_in, 3))
    up = rng.integers(-2, 3, (3, n))
    w = target / d[:, None] + down @ up
    stored = jnp.asarray(w, dtype)
    assert np.array_equal(np.asarray(stored, np.float64), w), "the weight is not exact"
    if not extra:
        return stored, (None, None, None), steps[:, 0]
    h = rng.integers(0, 4, d_in)
    h[::group_size] = h[1::group_size] = 0
    d, h, down, up = (jnp.asarray(a, jnp.float32) for a in (d, h, down, up))
    return stored, (d, h, (down, up)), fine * steps[:, 0]


EXACT = [
    # bits, group, rows, columns, zero point, dtype, all operands and a search
    (2, 32, 128, 33, "integer", "bfloat16", False),
    (2, 48, 180, 20, "none", "float16", True),
    (3, 128, 1024, 17, "none", "bfloat16", False),
    (3, 96, 200, 40, "float", "float32", True),
    (4, 32, 64, 130, "float", "bfloat16", False),
    (4, 64, 250, 21, "integer", "float32", True),
    (5, 32, 256, 18, "float", "float32", True),
    (5, 48, 100, 35, "integer", "bfloat16", False),
    (8, 128, 300, 20, "none", "float32", False),
    (8, 64, 128, 37, "integer", "float16", False),
]
EXACT_SEARCH = (1.0, 0.5, 0.25)


@pytest.mark.parametrize(("bits", "group_size", "d_in", "n", "zero_point", "dtype", "extra"), EXACT)
def test_packing_is_the_oracles_where_all_is_exact(
    bits, group_size, d_in, n, zero_point, dtype, extra
):
    kind = {"bits": bits, "group_size": group_size, "zero_point": zero_point,
            "store_dtype": "bfloat16", "shrinks": EXACT_SEARCH if extra else (1.0,)}  # fmt: skip
    facts = {"d_in": d_in, "n": n, "dtype": dtype}
    layers = [
        exact_problem(seed, bits=bits, group_size=group_size, zero_point=zero_point, extra=extra,
                      **facts)
        for seed in (0, 1)
    ]  # fmt: skip
    w = jnp.stack([layer[0] for layer in layers])
    _, rest, full = layers[1]
    got = pack(w, *rest, 1, **kind)
    want = oracle(w[1], *rest, **kind)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    factors = set(np.unique(np.asarray(got[1], np.float64) / full))
    assert 1.0 in factors
    assert (len(factors) > 1) == extra, "the search had nothing to choose"


def check_rounding(packed, target, slack, *, bits, group_size, zero_point, store_dtype):
    """Codes are the nearest of the stored grid, the grid is that of the range, up to rounding.

    Args:
      target: ``D (w - A B)``, float64, padded to whole groups.
      slack: how far float32 may be from that, in absolute terms.
    """
    planes, scales, zeros = packed
    n = target.shape[1]
    groups = target.reshape(-1, group_size, n)
    s = np.asarray(scales, np.float64)[:, None]
    z = np.full_like(s, 2.0 ** (bits - 1))
    if zeros is not None:
        z = np.asarray(zeros, np.float64)[:, None]
    codes = np.asarray(unpack(planes, bits=bits), np.float64).reshape(groups.shape)
    slack = slack.reshape(groups.shape)
    # The position on the grid: a quotient, a product and a sum, each rounded, and 1/s.
    unit = EPS / 2
    position = groups / s + z
    moved = slack / s + unit * (3 * np.abs(groups) / s + np.abs(position))
    nearest = np.clip(position, 0, 2**bits - 1)
    assert np.all(np.abs(codes - nearest) <= 0.5 + moved)
    low = np.minimum(groups.min(1, keepdims=True), 0)
    high = np.maximum(groups.max(1, keepdims=True), 0)
    if zero_point == "none":
        step = np.maximum(-low, high) / (2 ** (bits - 1) - 1)
    else:
        step = (high - low) / (2**bits - 1)
    stored = float(jnp.finfo(store_dtype).eps) / 2
    edge = slack.max(1, keepdims=True)
    assert np.all(np.abs(s - step) <= (stored + 3 * unit) * step + 2 * edge)
    if zero_point == "float":
        assert np.all(np.abs(z + low / s) <= (stored + 2 * unit) * np.abs(z) + edge / s)
    if zero_point == "integer":
        assert np.all(np.abs(z + low / s) <= 0.5 + 2 * unit * np.abs(z) + edge / s)


REAL = [
    # bits, group, rows, columns, zero point, weights, stored scales, low-rank operands
    (2, 64, 150, 20, "float", "float32", "float16", True),
    (3, 32, 250, 19, "integer", "bfloat16", "bfloat16", False),
    (4, 128, 256, 20, "float", "bfloat16", "bfloat16", False),
    (4, 48, 100, 33, "none", "float32", "float32", True),
    (5, 96, 96, 17, "none", "float16", "bfloat16", False),
    (8, 32, 70, 40, "float", "float32", "float32", False),
]


@pytest.mark.parametrize(
    ("bits", "group_size", "d_in", "n", "zero_point", "dtype", "store", "extra"), REAL
)
def test_codes_are_the_nearest_of_a_real_weight(
    bits, group_size, d_in, n, zero_point, dtype, store, extra
):
    rng = np.random.default_rng(bits)
    w = jnp.asarray(rng.standard_normal((1, d_in, n)), dtype)
    d, down, up = (
        jnp.asarray(a, jnp.float32)
        for a in (rng.uniform(0.5, 2, d_in), rng.normal(size=(d_in, 5)), rng.normal(size=(5, n)))
    )
    kind = {"bits": bits, "group_size": group_size, "zero_point": zero_point, "store_dtype": store}
    packed = pack(w, d, None, (down, up) if extra else None, 0, **kind)
    wide, d, down, up = (np.asarray(a, np.float64) for a in (w[0], d, down, up))
    if not extra:
        down = up[:, :0] @ down[:0]  # an empty term
    product, size = (down @ up, np.abs(down) @ np.abs(up)) if extra else (0.0, 0.0)
    target = d[:, None] * (wide - product)
    # Five products and sums of them, the difference, the product with D.
    slack = (5 + 2) * (EPS / 2) * d[:, None] * (np.abs(wide) + size)
    pad = ((0, -d_in % group_size), (0, 0))
    check_rounding(packed, np.pad(target, pad), np.pad(slack, pad), **kind)


@pytest.mark.parametrize("importance", [False, True])
def test_the_search_leaves_no_group_worse_than_the_best_factor(importance):
    rng = np.random.default_rng(0)
    d_in, n, rows = 120, 30, 32
    w = jnp.asarray(rng.normal(size=(1, d_in, n)), jnp.float32)
    h = jnp.asarray(rng.gamma(0.5, size=d_in), jnp.float32) if importance else None
    kind = {"bits": 2, "group_size": rows, "zero_point": "float", "store_dtype": "float32"}

    def errors(packed):
        weight = reference.dequantize(*packed, bits=2, group_size=rows)[:d_in]
        wrong = np.square(np.asarray(weight, np.float64) - np.asarray(w[0], np.float64))
        wrong = wrong if h is None else np.asarray(h, np.float64)[:, None] * wrong
        return np.pad(wrong, ((0, 8), (0, 0))).reshape(-1, rows, n).sum(1)

    factors = (1.0, 0.85, 0.7)
    found = errors(pack(w, None, h, None, 0, **kind, shrinks=factors))
    each = [errors(oracle(w[0], None, h, None, **kind, shrinks=(f,))) for f in factors]
    best = np.min(each, axis=0)
    # Errors are compared as float32 sums; two that are closer than that are as good as each other.
    assert np.all(found <= best * (1 + 2 * (rows + 4) * EPS) + 1e-30)
    assert len(np.unique(np.argmin(each, axis=0))) == len(factors)


PREFILL = [
    # bits, group, rows, columns, zero point, dtype, rows of x, tiles, all operands, with the codes
    (2, 32, 128, 33, "integer", "bfloat16", 1, None, False, False),
    (3, 64, 500, 20, "none", "float32", 17, None, False, True),
    (4, 32, 64, 70, "float", "bfloat16", 33, (16, 32), False, False),
    (4, 48, 150, 20, "integer", "float32", 40, (16, 16), True, True),
    (4, 128, 256, 17, "none", "float16", 3, None, False, True),
    (5, 96, 170, 18, "float", "float32", 2, None, True, False),
    (8, 64, 100, 40, "integer", "bfloat16", 16, None, False, True),
]


@pytest.mark.parametrize(
    ("bits", "group_size", "d_in", "n", "zero_point", "dtype", "m", "tiles", "extra", "quantized"),
    PREFILL,
)
def test_prefill_of_whole_numbers_is_the_oracles(
    bits, group_size, d_in, n, zero_point, dtype, m, tiles, extra, quantized
):
    kind = {"bits": bits, "group_size": group_size, "zero_point": zero_point,
            "store_dtype": "bfloat16", "shrinks": EXACT_SEARCH if extra else (1.0,)}  # fmt: skip
    w, rest, _ = exact_problem(
        5, bits=bits, group_size=group_size, d_in=d_in, n=n, zero_point=zero_point, dtype=dtype,
        extra=extra,
    )  # fmt: skip
    d, h, low_rank = rest
    x = jnp.asarray(np.random.default_rng(6).integers(-2, 3, (m, d_in)), dtype)
    problem = rounding_problem(w, d, low_rank, x, **kind, quantized=quantized)
    y, got = run(gpu_prefill.prefill_quantize, (x, w[None], *rest), 0, problem=problem, tiles=tiles)
    packed = oracle(w, d, h, low_rank, **kind)
    # The low-rank product is the caller's, beside the kernel.
    want = jnp.matmul(x.astype(jnp.float32), w.astype(jnp.float32))
    if quantized:
        want = reference.packed_matmul(x, *packed, d, problem=problem)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(packed), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    np.testing.assert_array_equal(np.asarray(y), np.asarray(want.astype(dtype)))


@pytest.mark.parametrize(
    ("dtype", "bits", "group_size", "d_in", "zero_point", "quantized"),
    [
        ("bfloat16", 4, 48, 130, "float", True),
        ("float32", 4, 64, 256, "none", True),
        ("bfloat16", 2, 32, 128, "none", False),
    ],
)
def test_prefill_of_real_operands_within_the_bound(
    dtype, bits, group_size, d_in, zero_point, quantized
):
    rng = np.random.default_rng(7)
    n, m = 21, 18
    x, w = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((m, d_in), (1, d_in, n)))
    d = jnp.asarray(rng.uniform(0.5, 2, d_in), jnp.float32)
    kind = {"bits": bits, "group_size": group_size, "zero_point": zero_point,
            "store_dtype": "bfloat16"}  # fmt: skip
    problem = rounding_problem(w, d, None, x, **kind, quantized=quantized)
    y, packed = run(gpu_prefill.prefill_quantize, (x, w, d, None, None), 0, problem=problem)
    wide = np.asarray(x, np.float64)
    unit, out = EPS / 2, float(jnp.finfo(dtype).eps) / 2
    if quantized:
        codes = np.asarray(unpack(packed[0], bits=bits))
        weight, size = (a[:d_in] for a in oracle_weight(codes, *packed[1:], bits, group_size))
        wide = wide / np.asarray(d, np.float64)
        # x / D is rounded to x's dtype before it is multiplied.
        bound = out * (np.abs(wide) @ size)
    else:
        weight = np.asarray(w[0], np.float64)
        size, bound = np.abs(weight), 0.0
    exact = wide @ weight
    bound = bound + (packed[1].shape[0] * group_size + 8) * unit * (np.abs(wide) @ size)
    bound = bound + out * (np.abs(exact) + bound)
    assert y.dtype == x.dtype
    assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= bound)


@pytest.mark.parametrize(
    ("bits", "group_size", "d_in", "n", "zero_point", "dtype", "shrinks", "scales"),
    [
        (2, 32, 128, 33, "float", "bfloat16", (1.0, 0.8), "coded"),
        (4, 48, 150, 20, "none", "float32", (1.0,), "coded"),
        (5, 64, 100, 17, "integer", "bfloat16", (1.0,), "coded"),
        (8, 32, 70, 40, "float", "float16", (1.0,), "coded"),
        (3, 16, 70, 40, "float", "bfloat16", (1.0, 0.8), "coded4"),
    ],
)
def test_coded_scales(bits, group_size, d_in, n, zero_point, dtype, shrinks, scales):
    """Scales and zero points are the oracle's, codes the nearest; so is the product with them."""
    rng = np.random.default_rng(bits)
    x, w = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((5, d_in), (1, d_in, n)))
    d = jnp.asarray(rng.uniform(0.5, 2, d_in), jnp.float32)
    kind = {"bits": bits, "group_size": group_size, "zero_point": zero_point, "scales": scales,
            "store_dtype": "bfloat16", "shrinks": shrinks}  # fmt: skip
    want = oracle(w[0], d, None, **kind)
    problem = rounding_problem(w, d, None, x, **kind, quantized=True)
    operands = (x, w, d, None, None)
    y, beside = run(gpu_prefill.prefill_quantize, operands, 0, problem=problem)
    s, z = stored_grid(*want[1:], bits)
    z = np.full_like(s, 2.0 ** (bits - 1)) if z is None else z
    s, z = (np.repeat(a, group_size, 0) for a in (s, z))
    target = np.asarray(w[0], np.float64) * np.asarray(d, np.float64)[:, None]
    target = np.pad(target, ((0, len(s) - d_in), (0, 0)))
    value = np.clip(target / s + z, 0, 2**bits - 1)
    slack = EPS * (4 * np.abs(target) / s + np.abs(value))
    for got in (pack(w, d, None, None, 0, **kind), beside):
        jax.tree.map(np.testing.assert_array_equal, got[1:], want[1:])
        codes = np.asarray(unpack(got[0], bits=bits), np.float64)
        assert np.all(np.abs(codes - value) <= 0.5 + slack)
    weight, size = (a[:d_in] for a in oracle_weight(codes, *want[1:], bits, group_size))
    left, eps = np.asarray(x, np.float64) / np.asarray(d, np.float64), float(jnp.finfo(dtype).eps)
    # x / D, the weight and the result are rounded to x's type.
    bound = (d_in * EPS + 3 * eps) * (np.abs(left) @ size)
    assert np.all(np.abs(np.asarray(y, np.float64) - left @ weight) <= bound)


@pytest.mark.parametrize(
    ("bits", "group_size", "d_in", "zero_point", "scales", "weighed", "refits"),
    [
        (4, 32, 90, "float", "coded", True, 2),
        (3, 48, 96, "none", "float", False, 1),
        (2, 64, 128, "integer", "float", False, 3),
    ],
)
def test_refits_are_the_oracles(bits, group_size, d_in, zero_point, scales, weighed, refits):
    rng = np.random.default_rng(bits)
    w = jnp.asarray(rng.standard_normal((1, d_in, 20)) ** 3, jnp.bfloat16)
    h = jnp.asarray(rng.gamma(0.5, size=d_in), jnp.float32) if weighed else None
    kind = {"bits": bits, "group_size": group_size, "zero_point": zero_point, "scales": scales,
            "store_dtype": "bfloat16", "shrinks": (1.0, 0.8)}  # fmt: skip
    got = pack(w, None, h, None, 0, **kind, refits=refits)
    want = oracle(w[0], None, h, None, **kind, refits=refits)
    plain = oracle(w[0], None, h, None, **kind)
    assert np.any(np.asarray(stored_grid(*plain[1:], bits)[0] != stored_grid(*want[1:], bits)[0]))
    # Sums of other order may choose another of two equally good grids.
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.mean(np.asarray(one) != np.asarray(other)) < 0.02


ROUNDING = {"d_in": 1000, "n": 64, "bits": 4, "group_size": 32, "zero_point": "float",
            "shrinks": (1.0,), "scaled": True, "dtype": "bfloat16"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "pack_reason", "prefill_reason"),
    [
        ({"chip": "t4"}, "a T4 has 7.5", "a T4 has 7.5"),
        ({"group_size": 520}, "520 rows does not fit into the registers, at most 512", "registers"),
        ({"group_size": 264}, None, "group of 264 rows do not fit into shared memory, 256 do"),
        ({"group_size": 8}, None, "at least 16 rows at a time, a group has 8"),
        ({"group_size": 256}, None, None),
        ({"group_size": 256, "rank": 64}, None, None),
        ({"group_size": 256, "rank": 100}, "factors of rank 100 do not fit", "do not fit into sh"),
        ({"group_size": 16, "chip": None}, None, None),
    ],
)
def test_refusals_give_their_reason(change, pack_reason, prefill_reason):
    facts = {**ROUNDING, **change}
    chip = facts.pop("chip", "h100")
    alone = Problem(kernel="quantize_pack", m=0, **facts)
    prompt = Problem(kernel="prefill_quantize", m=16, **facts)
    for why, reason in (
        (gpu_pack.refusal(alone, chip), pack_reason),
        (gpu_prefill.refusal(prompt, chip), prefill_reason),
    ):
        assert (why is None) == (reason is None), why
        assert reason is None or re.search(reason, why)

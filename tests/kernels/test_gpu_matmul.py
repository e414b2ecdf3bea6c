"""The Triton kernel of the packed product, interpreted, against the oracle."""

import dataclasses
import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_weights import (
    EPS,
    coded_weight,
    oracle_weight,
    paired_weight,
    random_weight,
    stored_grid,
)

from pallas_kernels import reference
from pallas_kernels.gpu import packed_matmul as gpu
from pallas_kernels.gpu.limits import SHARED_BYTES
from pallas_kernels.layout import PLANES, pack
from pallas_kernels.problem import Problem, matmul_problem

ALL_BITS = sorted(PLANES)


def product(x, planes, scales, zeros, layer, tiles=None, **kind):
    problem = matmul_problem(x, scales, zeros, **kind)
    run = partial(gpu.packed_matmul, interpret=True, problem=problem, tiles=tiles)
    return jax.jit(run)(x, planes, scales, zeros, jnp.asarray(layer, jnp.int32))


def stacked(weight):
    return jax.tree.map(lambda a: a[None], weight)


def check_close(y, x, weight, bits, group_size, terms=8):
    """Every term of a sum passes through at most `k + terms` roundings in float32."""
    codes, scales, zeros = weight
    exact, size = oracle_weight(codes, scales, zeros, bits, group_size)
    if len(x) <= 2 and bits < 8:
        # A row or two multiply 128 + q, and subtract 128 with the zero point.
        size = size + 256 * np.repeat(stored_grid(scales, zeros, bits)[0], group_size, 0)
    wide = np.asarray(x, np.float64)
    bound = (codes.shape[0] + terms) * (EPS / 2) * (np.abs(wide) @ size)
    if y.dtype != jnp.float32:
        bound = bound + float(jnp.finfo(y.dtype).eps) / 2 * (np.abs(wide @ exact) + bound)
    assert y.shape == (len(x), codes.shape[1])
    assert np.all(np.abs(np.asarray(y, np.float64) - wide @ exact) <= bound)


# Bits, group, groups, columns, rows of x, dtypes of x, scales and zeros.
CASES = [
    (2, 32, 4, 130, 1, "float32", "float32", None),
    (2, 48, 8, 17, 2, "bfloat16", "bfloat16", "uint8"),
    (2, 128, 3, 33, 17, "bfloat16", "bfloat16", "bfloat16"),
    (2, 320, 1, 40, 33, "float16", "float16", "float16"),
    (2, 32, 8, 33, 2, "bfloat16", "coded", "uint8"),
    (3, 64, 2, 65, 1, "bfloat16", "bfloat16", "bfloat16"),
    (3, 96, 4, 140, 16, "float32", "float32", None),
    (3, 32, 4, 40, 2, "bfloat16", "coded4", "uint8"),
    (3, 384, 1, 24, 3, "float16", "float32", "uint8"),
    (4, 96, 3, 129, 17, "bfloat16", "float32", "uint8"),
    (4, 64, 3, 16, 2, "float16", "float16", None),
    (4, 128, 2, 128, 70, "bfloat16", "bfloat16", None),
    (4, 224, 1, 300, 3, "float32", "bfloat16", "float32"),
    (4, 32, 4, 130, 17, "bfloat16", "coded", "uint8"),
    (4, 32, 4, 130, 17, "bfloat16", "coded4", "uint8"),
    (5, 32, 4, 131, 2, "float16", "float16", None),
    (5, 48, 8, 30, 33, "bfloat16", "bfloat16", "float16"),
    (5, 256, 1, 16, 16, "float32", "float32", "uint8"),
    (5, 64, 4, 16, 1, "float16", "coded", None),
    (8, 32, 3, 50, 16, "bfloat16", "bfloat16", "uint8"),
    (8, 64, 1, 130, 2, "float32", "float32", None),
    (8, 96, 2, 15, 17, "float16", "float16", "bfloat16"),
    (8, 128, 3, 200, 1, "bfloat16", "bfloat16", "float32"),
]  # fmt: skip


def group_kinds(group_size, n_group):
    power = group_size & (group_size - 1) == 0
    return {"a power of two" if power else "no power of two"} | (
        {"the whole row"} if n_group == 1 else set()
    )


def test_the_cases_cover_every_width_with_everything():
    assert {case[4] for case in CASES} >= {1, 2, 3, 16, 17, 33, 70}
    for bits in ALL_BITS:
        mine = [case[1:] for case in CASES if case[0] == bits]
        kinds = set.union(*(group_kinds(*case[:2]) for case in mine))
        assert kinds == {"a power of two", "no power of two", "the whole row"}
        assert {case[4] for case in mine} == {"float32", "bfloat16", "float16"}
        zeros = {case[6] if case[6] in {None, "uint8"} else "float" for case in mine}
        assert zeros == {None, "uint8", "float"}


@pytest.mark.parametrize(
    ("bits", "group_size", "n_group", "n", "m", "dtype", "store", "zero"), CASES
)
def test_within_the_rounding_bound(bits, group_size, n_group, n, m, dtype, store, zero):
    k = group_size * n_group
    kind = {"bits": bits, "group_size": group_size}
    shape = m + bits, bits, group_size, n_group, n
    if store == "coded":
        weight = coded_weight(*shape, symmetric=zero is None)
    elif store == "coded4":
        weight = paired_weight(*shape)
    else:
        weight = random_weight(*shape, store, zero)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((m, k)), dtype)
    packed = stacked((pack(jnp.asarray(weight[0]), bits=bits), *weight[1:]))
    assert gpu.refusal(matmul_problem(x, *packed[1:], **kind), "h100") is None
    y = product(x, *packed, 0, **kind)
    assert y.dtype == x.dtype
    check_close(y, x, weight, bits, group_size)


def integer_weight(seed, bits, group_size, n_group, n, symmetric):
    """Whole zero points and scales that are powers of two: every sum is exact."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (group_size * n_group, n), np.uint8)
    scales = jnp.asarray(2.0 ** rng.integers(-2, 2, (n_group, n)), jnp.bfloat16)
    zeros = None if symmetric else jnp.asarray(rng.integers(0, 2**bits, (n_group, n), np.uint8))
    return codes, scales, zeros


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "m", "dtype"),
    [
        (2, 96, True, 17, "bfloat16"),
        (3, 96, True, 2, "bfloat16"),
        (4, 32, False, 2, "float32"), (4, 192, False, 33, "bfloat16"),
        (5, 64, False, 1, "bfloat16"),
        (8, 64, True, 17, "float16"),
    ],
)  # fmt: skip
def test_integers_are_exact_in_every_layer(bits, group_size, symmetric, m, dtype):
    n_group, n = 384 // group_size, 70
    layers = [integer_weight(s, bits, group_size, n_group, n, symmetric) for s in range(3)]
    codes, scales, zeros = jax.tree.map(lambda *a: jnp.stack([jnp.asarray(b) for b in a]), *layers)
    planes = pack(codes, bits=bits)
    x = jnp.asarray(np.random.default_rng(2).integers(-2, 3, (m, 384)), dtype)
    for layer in (0, 2):
        y = product(x, planes, scales, zeros, layer, bits=bits, group_size=group_size)
        weight, _ = oracle_weight(*layers[layer], bits, group_size)
        exact = np.asarray(x, np.float64) @ weight
        # One rounding, of the exact sum to x's dtype.
        np.testing.assert_array_equal(np.asarray(y), exact.astype(jnp.dtype(dtype)))
    if dtype != "float32":
        kind = {"bits": bits, "group_size": group_size, "out_dtype": "float32"}
        y = product(x, planes, scales, zeros, layer, **kind)
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(y), exact)


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("m", [2, 20])
def test_any_number_of_splits_covers_every_step_once(m, splits):
    codes, scales, zeros = integer_weight(3, 4, 32, 12, 40, symmetric=False)
    x = jnp.asarray(np.random.default_rng(4).integers(-8, 9, (m, 384)), jnp.bfloat16)
    tiles = gpu.Tiles(rows=min(m, 16), columns=32, depth=16, splits=splits)
    packed = (pack(jnp.asarray(codes), bits=4), scales, zeros)
    y = product(x, *stacked(packed), 0, tiles, bits=4, group_size=32)
    problem = matmul_problem(x, scales, zeros, bits=4, group_size=32)
    exact = reference.packed_matmul(x, *packed, problem=problem)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(exact.astype(jnp.bfloat16)))


PROBLEM = Problem(
    kernel="packed_matmul", m=1, d_in=1024, n=64, bits=4, group_size=32, zero_point="float",
    dtype="bfloat16",
)  # fmt: skip
SHAPES = [(1024, 2048), (4096, 14336), (1152, 6912), (6912, 1152), (16384, 4096), (384, 50)]


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("group_size", [32, 96, 128])
def test_default_blocks_cover_the_problem(bits, group_size):
    rows = (1, 2, 3, 16, 17, 100, 4096)
    for (k, n), m, dtype in itertools.product(SHAPES, rows, ("bfloat16", "float32")):
        k = k // group_size * group_size
        problem = dataclasses.replace(
            PROBLEM, m=m, d_in=k, n=n, bits=bits, group_size=group_size, dtype=dtype
        )
        if gpu.granule(problem) < 16:
            continue
        t = gpu.blocks(problem)
        slab = k * min(PLANES[bits]) // 8
        assert slab % t.depth == 0, "a step leaves its slab"
        assert group_size % t.depth == 0, "a step leaves its group"
        for size in (t.rows, t.columns, t.depth):
            assert size & (size - 1) == 0
        assert t.rows >= min(m, 16)
        assert m <= 2 or gpu.shared_bytes(t, problem) <= SHARED_BYTES
        steps = slab // t.depth
        each = -(-steps // t.splits)
        assert (t.splits - 1) * each < steps, "a program without a step"
        # Sums of several programs cost at most a quarter of the weight's own bytes.
        assert t.splits == 1 or 4 * m * n * t.splits <= k * n * bits / 8 / 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"group_size": 8}, "for only 8 rows at a time, the kernel needs 16"),
        # 9 octets of 8 rows: a field ends in the middle of a group.
        ({"d_in": 576, "bits": 3, "group_size": 64}, "for only 8 rows at a time"),
        ({"m": 0}, "nothing to compute: 0 rows, 64 columns"),
        ({"n": 0}, "nothing to compute: 1 rows, 0 columns"),
    ],
)
def test_refusals_give_their_reason(change, reason):
    assert gpu.refusal(PROBLEM, "h100") is None
    assert gpu.refusal(PROBLEM, None) is None
    assert "compute capability 8.0 and up, a T4 has 7.5" in gpu.refusal(PROBLEM, "t4")
    why = gpu.refusal(dataclasses.replace(PROBLEM, **change), "h100")
    assert why is not None
    assert re.search(reason, why)


@pytest.mark.parametrize(
    ("layers", "served"), [(255, True), (256, True), (257, False), (511, False), (513, True)]
)
def test_a_stack_that_32_bit_offsets_cannot_reach_is_refused(layers, served):
    k = n = 4096
    shape = jax.ShapeDtypeStruct
    operands = (
        shape((1, k), jnp.bfloat16), (shape((layers, k // 2, n), jnp.uint8),),
        shape((layers, k // 128, n), jnp.bfloat16), None, shape((), jnp.int32),
    )  # fmt: skip
    problem = matmul_problem(operands[0], *operands[2:4], bits=4, group_size=128)
    call = partial(gpu.packed_matmul, problem=problem)
    if served:
        assert jax.eval_shape(call, *operands).shape == (1, n)
    else:
        with pytest.raises(ValueError, match="at most 2 GiB or more than 4 GiB"):
            jax.eval_shape(call, *operands)

"""`packed_matmul` for TPUs, simulated: every width, grid, group and raggedness that it serves."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from packed_weights import EPS, coded_weight, oracle_weight
from tpu_cases import (
    LAYER,
    check_product,
    f64,
    half_step,
    mixed_packed,
    mixed_rows,
    one_layer,
    races_found,
    simulate,
    strict,
)

import pallas_kernels
from pallas_kernels import reference
from pallas_kernels.layout import pack
from pallas_kernels.problem import Problem, matmul_problem
from pallas_kernels.tpu import packed_matmul as kernel

# Rows of codes by width and group: whole groups, whole registers in a slab, no power of two where
# that leaves a choice.
ROWS = {
    2: {32: 384, 64: 640, 96: 384, 128: 384, 256: 768, 384: 384},
    3: {32: 256, 64: 256, 96: 768, 128: 256, 256: 768, 512: 512},
    4: {32: 192, 64: 320, 96: 192, 128: 384, 256: 768, 320: 320},
    5: {32: 256, 64: 256, 96: 768, 128: 256, 256: 512, 768: 768},
    8: {32: 96, 64: 192, 96: 288, 128: 384, 256: 768, 160: 160},
}
CASES = [(bits, group, k) for bits, rows in ROWS.items() for group, k in rows.items()]
MANY = (1, 16, 3, 33, 8, 17, 10, 65, 11)
COLUMNS = (256, 130, 200)
ZEROS = (None, "bfloat16", "uint8", "float32")


def run(m, bits, group, k, n, zeros, scales="bfloat16", cores=1, out_dtype=None, **blocks):
    x = mixed_rows(m, m, k)
    codes, stacks = mixed_packed(k + m, bits, group, k, n, scales, zeros)
    kind = {"bits": bits, "group_size": group, "out_dtype": out_dtype}
    problem, tiles = matmul_problem(x, *stacks[1:], **kind), None
    if blocks:
        default = kernel.default_blocks(problem)
        width = math.gcd(default.width, blocks.get("columns", default.columns))
        tiles = dataclasses.replace(default, cores=cores, width=width, **blocks)
    y = simulate(
        kernel.packed_matmul, x, *stacks, jnp.asarray(LAYER), problem=problem, tiles=tiles,
        cores=cores,
    )  # fmt: skip
    assert y.dtype == (out_dtype or x.dtype)
    return check_product(y, x, codes, stacks, bits=bits, group_size=group)


@pytest.mark.parametrize(("i", "case"), list(enumerate(CASES)))
def test_every_width_and_group(i, case):
    # The steps are coprime to the lists, so all pairs of a width and a grid, and of a width and a
    # way of multiplying, occur.
    zeros = ZEROS[(i + i // 6) % 4]
    run(MANY[i % 9], *case, COLUMNS[i % 3], zeros, "float32" if i % 2 else "bfloat16")


@pytest.mark.parametrize(
    ("m", "bits", "group", "zeros", "blocks"),
    [
        (1, 2, 32, "uint8", {}),
        (17, 3, 64, None, {}),
        (3, 4, 32, "uint8", {"columns": 128, "rows": 16}),
        (16, 4, 128, None, {}),
        (33, 5, 96, "uint8", {}),
        (10, 8, 64, "uint8", {}),
    ],
)
def test_coded_scales(m, bits, group, zeros, blocks):
    run(m, bits, group, ROWS[bits][group], 256, zeros, "coded", **blocks)


@pytest.mark.parametrize(("m", "bits", "group"), [(17, 3, 64), (3, 4, 32)])
def test_pairs_of_scales_and_zero_points(m, bits, group):
    run(m, bits, group, ROWS[bits][group], 256, None, "coded4")


def test_a_layer_of_more_than_a_block_has():
    """The columns' numbers of 19 layers come in blocks of 16: which row, and what is beyond."""
    bits, group, k, n, layers = 4, 32, 64, 128, 19
    every = [coded_weight(i, bits, group, k // group, n) for i in range(layers)]
    codes, scales, zeros = jax.tree.map(lambda *a: jnp.stack([jnp.asarray(b) for b in a]), *every)
    x = mixed_rows(0, 3, k)
    problem = matmul_problem(x, scales, zeros, bits=bits, group_size=group)
    for layer in (3, 17):
        y = simulate(kernel.packed_matmul, x, pack(codes, bits=bits), scales, zeros,
                     jnp.asarray(layer), problem=problem)  # fmt: skip
        weight, size = oracle_weight(*every[layer], bits, group)
        exact = f64(x) @ weight
        wrong = np.abs(f64(y) - exact)
        assert np.all(
            wrong <= half_step(y.dtype) * np.abs(exact) + 2**-16 * (np.abs(f64(x)) @ size)
        )


@pytest.mark.parametrize("m", [1, 17])
def test_float32_sums_of_bfloat16_activations(m):
    run(m, 8, 64, 192, 130, None, out_dtype="float32")


@pytest.mark.parametrize("bits", sorted(ROWS))
def test_few_rows_by_the_bfloat16_unit(bits):
    # What a chip without fast int8 products does with few rows.
    run((1, 3, 8, 10, 9)[bits % 5], bits, 128, ROWS[bits][128], 130, "uint8", columns=128,
        rows=16, integer=False)  # fmt: skip


@pytest.mark.parametrize(
    ("m", "bits", "group", "k", "n", "cores", "blocks"),
    [
        # Three blocks of rows, the last with one that counts; three of columns.
        (33, 4, 64, 128, 300, 1, {"rows": 16, "columns": 128}),
        # Two cores with blocks of columns each, the last ragged, by both ways.
        (16, 5, 32, 256, 450, 2, {"rows": 16, "columns": 128}),
        (3, 3, 128, 256, 250, 2, {"rows": 16, "columns": 128, "integer": True}),
        # The same where blocks divide the columns, which a kernel may fetch on its own; with
        # several blocks of rows, a core comes back to its first block of columns.
        (40, 4, 32, 256, 512, 2, {"rows": 16, "columns": 128}),
        (3, 5, 64, 256, 256, 2, {"rows": 16, "columns": 128}),
        (7, 2, 128, 256, 384, 1, {"rows": 16, "columns": 128}),
        # Planes fetched in parts, of which a group is larger.
        (5, 4, 32, 1024, 130, 1, {"columns": 128, "parts": 4}),
        (17, 3, 32, 2048, 130, 1, {"columns": 128, "parts": 2}),
        (2, 2, 256, 1024, 72, 1, {"columns": 128, "parts": 1}),
        (17, 8, 128, 512, 256, 1, {"columns": 256, "parts": 4}),
        # A group longer than one product of the matrix unit.
        (2, 8, 1056, 1056, 130, 1, {"columns": 128}),
        # Not a multiple of a register's rows, but a whole row.
        (40, 8, 224, 224, 1000, 1, {"columns": 1024}),
    ],
)
def test_blocks(m, bits, group, k, n, cores, blocks):
    run(m, bits, group, k, n, "bfloat16", cores=cores, **blocks)


@pytest.mark.parametrize(
    ("bits", "d_in", "m", "scaled", "rank"),
    [(4, 181, (3,), True, 0), (8, 70, (2, 9), False, 2), (3, 230, (2, 1), True, 3)],
)
def test_public_call_with_fewer_channels_than_rows(bits, d_in, m, scaled, rank):
    group, n = 32, 136
    k = {4: 192, 8: 96, 3: 256}[bits]
    rng = np.random.default_rng(bits)
    x = mixed_rows(bits, int(np.prod(m)), d_in).reshape(*m, d_in)
    codes, stacks = mixed_packed(bits, bits, group, k, n, "float32", "uint8")
    d = jnp.asarray(2.0 ** rng.integers(-1, 2, d_in), jnp.float32) if scaled else None
    low_rank = None
    if rank:
        shapes = (d_in, rank), (rank, n)
        low_rank = tuple(jnp.asarray(np.sign(rng.normal(size=s)), jnp.bfloat16) for s in shapes)
    call = functools.partial(
        pallas_kernels.packed_matmul, bits=bits, group_size=group, layer=LAYER,
        implementation="interpret",
    )  # fmt: skip
    y = jax.jit(call)(x, *stacks, d, low_rank)
    assert y.shape == (*m, n)
    x, y = x.reshape(-1, d_in), y.reshape(-1, n)
    scaled_x = x if d is None else (x.astype(jnp.float32) / d).astype(x.dtype)  # Exact.
    padded = jnp.pad(scaled_x, ((0, 0), (0, k - d_in)))
    if not rank:
        check_product(y, padded, codes, stacks, bits=bits, group_size=group)
        return
    problem = matmul_problem(x, *stacks[1:], bits=bits, group_size=group)
    want = f64(reference.packed_matmul(x, *one_layer(stacks), d, low_rank, problem=problem))
    # The reference sums in float32 as well; y is rounded twice, and x A once.
    size = 2 * np.repeat(f64(stacks[1][LAYER]), group, 0)[:d_in] * (2**bits + 128)
    through = np.abs(f64(x)) @ np.abs(f64(low_rank[0])) @ np.abs(f64(low_rank[1]))
    bound = 2 * (k + 16) * EPS * (np.abs(f64(scaled_x)) @ size + through)
    bound += half_step(y.dtype) * (2 * np.abs(want) + 2 * through + bound)
    assert np.all(np.abs(f64(y) - want) <= bound)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"d_in": 1152, "bits": 3}, "1152 rows of 3-bit codes are slabs of 144 rows"),
        ({"d_in": 160}, "160 rows of 4-bit codes are slabs of 80 rows"),
        ({"group_size": 16}, "group_size 16 is not a multiple of 32"),
        ({"dtype": "float32"}, "x is float32; the matrix unit multiplies bfloat16"),
        ({"dtype": "float16"}, "x is float16"),
    ],
)
def test_refusals_name_their_reason(change, reason):
    served = Problem(
        kernel="packed_matmul", m=4, d_in=256, n=128, bits=4, group_size=32, zero_point="none",
        dtype="bfloat16", store_dtype="float32",
    )  # fmt: skip
    assert kernel.refusal(served) is None
    problem = dataclasses.replace(served, **change)
    assert reason in kernel.refusal(problem)
    k, kind = problem.k, {"bits": problem.bits, "group_size": problem.group_size}
    x, scales = jnp.zeros((4, k), problem.dtype), jnp.ones((k // problem.group_size, 128))
    planes = pallas_kernels.pack(jnp.zeros((k, 128), jnp.uint8), bits=problem.bits)
    with pytest.raises(ValueError, match="implementation='interpret' cannot serve") as error:
        pallas_kernels.packed_matmul(x, planes, scales, None, **kind, implementation="interpret")
    assert reason in str(error.value)


def test_the_simulation_sees_a_race():
    """Else none of these tests would mean what it says."""

    def hasty(x_ref, y_ref, buffer, arrived):
        copy = pltpu.make_async_copy(x_ref, buffer, arrived)
        copy.start()
        y_ref[...] = buffer[...]
        copy.wait()

    pltpu.reset_tpu_interpret_mode_state()
    y = pl.pallas_call(
        hasty, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        interpret=strict(),
    )(jnp.ones((8, 128)))  # fmt: skip
    jax.block_until_ready(y)
    assert races_found()
    assert np.all(np.isnan(y)), "memory that was never written reads as NaN"

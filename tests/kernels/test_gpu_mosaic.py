"""Hopper's packed product on Mosaic GPU: simulated with its copies, and compiled to SASS."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import MODELS, needs_compilers
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from packed_weights import (
    EPS,
    coded_weight,
    oracle_weight,
    paired_weight,
    random_weight,
    stored_grid,
)

from pallas_kernels.gpu import packed_matmul_sm90 as gpu
from pallas_kernels.layout import PLANES, pack
from pallas_kernels.problem import Problem, matmul_problem
from ttq_jax.chips.absent import compile_for
from ttq_jax.chips.released import projections, released_config

SHAPES = sorted({s for name in MODELS for s in projections(released_config(name)).values()})


def simulate(x, planes, scales, zeros, layer, tiles=None, **kind):
    """Copies to shared memory are simulated; an access that is not synchronised is an error."""
    layer = jnp.asarray(layer, jnp.int32)
    races = InterpretGPUParams(detect_races=True)
    problem = matmul_problem(x, scales, zeros, **kind)
    assert gpu.refusal(problem, "h100") is None
    y = gpu.packed_matmul(
        x, planes, scales, zeros, layer, problem=problem, tiles=tiles, interpret=races
    )
    jax.block_until_ready(y)
    assert not interpreter.get_races().races_found
    return y


@pytest.mark.parametrize(
    ("bits", "group_size", "n_group", "n", "m", "zero", "dtype", "tiles"),
    [
        (2, 32, 8, 128, 40, None, "float16", None),
        (4, 64, 4, 256, 5, "bfloat16", "bfloat16", None),
        (4, 32, 8, 128, 70, "uint8", "bfloat16", (32, 32, 2, 2)),
        (8, 96, 2, 128, 1, "uint8", "bfloat16", None),
    ],
)
def test_integers_are_exact_in_a_later_layer(bits, group_size, n_group, n, m, zero, dtype, tiles):
    rng = np.random.default_rng(bits)
    k = group_size * n_group
    codes = rng.integers(0, 2**bits, (2, k, n), np.uint8)
    scales = jnp.asarray(2.0 ** rng.integers(-2, 2, (2, n_group, n)), jnp.bfloat16)
    zeros = None if zero is None else jnp.asarray(rng.integers(0, 2**bits, scales.shape), zero)
    x = jnp.asarray(rng.integers(-2, 3, (m, k)), dtype)
    if tiles is not None:
        tiles = gpu.Tiles(**dict(zip(("rows", "depth", "splits", "stages"), tiles, strict=True)))
    kind = {"bits": bits, "group_size": group_size}
    y = simulate(x, pack(jnp.asarray(codes), bits=bits), scales, zeros, 1, tiles, **kind)
    one = None if zeros is None else zeros[1]
    weight, _ = oracle_weight(codes[1], scales[1], one, bits, group_size)
    exact = np.asarray(x, np.float64) @ weight
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(y), exact.astype(jnp.dtype(dtype)))
    if bits == 8:
        y = simulate(
            x, pack(jnp.asarray(codes), bits=bits), scales, zeros, 1, tiles, **kind,
            out_dtype=jnp.float32,
        )  # fmt: skip
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(y), exact)


@pytest.mark.parametrize("weight", [random_weight, coded_weight, paired_weight])
def test_real_operands_within_the_rounding_bound(weight):
    bits, group_size = 4, 32
    shape = 1, bits, group_size, 8, 128
    types = ("bfloat16", "bfloat16") if weight is random_weight else ()
    codes, scales, zeros = weight(*shape, *types)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 256)), jnp.bfloat16)
    weight = jax.tree.map(lambda a: a[None], (pack(jnp.asarray(codes), bits=bits), scales, zeros))
    y = simulate(x, *weight, 0, bits=bits, group_size=group_size)
    exact, size = oracle_weight(codes, scales, zeros, bits, group_size)
    # Codes carry a constant 128, which the zero point takes back.
    size = size + 256 * np.repeat(stored_grid(scales, zeros, bits)[0], group_size, 0)
    wide = np.asarray(x, np.float64)
    bound = (256 + 8) * (EPS / 2) * (np.abs(wide) @ size)
    bound = bound + float(jnp.finfo(y.dtype).eps) / 2 * (np.abs(wide @ exact) + bound)
    assert np.all(np.abs(np.asarray(y, np.float64) - wide @ exact) <= bound)


PROBLEM = Problem(
    kernel="packed_matmul", m=1, d_in=1024, n=256, bits=4, group_size=32, zero_point="float",
    dtype="bfloat16",
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 3}, "3-bit codes are two bit planes"),
        ({"bits": 5}, "5-bit codes are two bit planes"),
        ({"dtype": "float32"}, "bfloat16 or float16, x is float32"),
        ({"n": 200}, "128 columns at a time, 200 are no multiple"),
        ({"group_size": 16}, "for only 16 rows at a time, the kernel needs 32"),
        ({"m": 0}, "nothing to compute: 0 rows"),
    ],
)
def test_refusals_give_their_reason(change, reason):
    assert gpu.refusal(PROBLEM, "h100") is None
    assert re.search(reason, gpu.refusal(dataclasses.replace(PROBLEM, **change), "h100"))
    assert "written for Hopper's WGMMA, this is a100" in gpu.refusal(PROBLEM, "a100")
    assert "this is a GPU of unknown kind" in gpu.refusal(PROBLEM, None)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_default_blocks_cover_the_problem(bits, group_size):
    for (k, n), m in ((s, m) for s in SHAPES for m in (1, 16, 33, 4096)):
        facts = {"m": m, "d_in": k, "n": n, "bits": bits, "group_size": group_size}
        problem = dataclasses.replace(PROBLEM, **facts)
        why = gpu.refusal(problem, "h100")
        if why is not None:
            # 1152 and 6912 rows: their slabs end in the middle of a group.
            assert k % (32 * 8 // min(PLANES[bits])), why
            continue
        t = gpu.blocks(problem)
        slab = k * bits // 8
        assert group_size % t.depth == 0
        assert slab % (t.depth * t.splits) == 0


@needs_compilers
@pytest.mark.parametrize(
    ("k", "n", "m", "bits", "group_size", "zero", "dtype"),
    [
        (1024, 3072, 1, 4, 128, "bfloat16", "bfloat16"),
        (4096, 14336, 16, 4, 128, "bfloat16", "bfloat16"),
        (14336, 4096, 512, 4, 32, None, "bfloat16"),
        (4096, 4096, 64, 2, 128, "uint8", "float16"),
        (16384, 4096, 16, 8, 64, "uint8", "bfloat16"),
        (2048, 6144, 512, 8, 128, None, "float16"),
    ],
)
def test_compiles_for_an_h100(k, n, m, bits, group_size, zero, dtype):
    shape = jax.ShapeDtypeStruct
    scales = shape((2, k // group_size, n), jnp.bfloat16)
    zeros = None if zero is None else shape(scales.shape, zero)
    operands = (
        shape((m, k), dtype), (shape((2, k * bits // 8, n), jnp.uint8),), scales, zeros,
        shape((), jnp.int32),
    )  # fmt: skip
    problem = matmul_problem(operands[0], scales, zeros, bits=bits, group_size=group_size)
    call = partial(gpu.packed_matmul, problem=problem)
    text = compile_for("h100", call, *operands).as_text()
    assert len(re.findall(r'custom_call_target="mosaic_gpu\w*"', text)) == 1
    entry = text[text.index("\nENTRY ") :].split("\n}")[0]
    # The kernel indexes the layer: no instruction makes packed bytes.
    made = re.findall(r"(?m)^ .*? = (u8\[[\d,]*\])\S* ([\w-]+)\(", entry)
    assert {opcode for _, opcode in made} <= {"parameter", "bitcast"}

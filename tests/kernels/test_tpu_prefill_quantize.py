"""`prefill_quantize` for TPUs, simulated: the product and the packed weight from one read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_cases import (
    LAYER,
    check_packed,
    check_prompt_product,
    f64,
    half_step,
    mixed_rows,
    mixed_weight,
    simulate,
)

import pallas_kernels
from pallas_kernels import reference
from pallas_kernels.tpu import prefill_quantize as kernel

SEARCH = (1.0, 0.85, 0.7)


def run(m, bits, zero_point, group, d_in, n, *, quantized, store="bfloat16", dtype="bfloat16",
        w_dtype="bfloat16", cores=1, blocks=None, shrinks=(1.0,), refits=0, scales="float",
        **weight):  # fmt: skip
    kind = {"bits": bits, "group_size": group, "zero_point": zero_point}
    x = mixed_rows(m, m, d_in, dtype)
    given = mixed_weight(d_in + n, d_in, n, **kind, dtype=w_dtype, **weight)
    kind |= {"store_dtype": store, "shrinks": shrinks, "refits": refits, "scales": scales}
    problem, tiles = given.problem(x, **kind, quantized=quantized), None
    if blocks:
        tiles = dataclasses.replace(kernel.default_blocks(problem), cores=cores, **blocks)
    y, packed = simulate(
        kernel.prefill_quantize, x, *given.operands, problem=problem, tiles=tiles, cores=cores
    )
    assert y.dtype == x.dtype
    check_packed(packed, given, **kind)
    return check_prompt_product(
        y, x, given, packed, bits=bits, group_size=group, quantized=quantized
    )


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("bits", "zero_point", "group", "d_in", "n", "m", "options"),
    [
        (2, "none", 32, 192, 130, 8, {"store": "float32"}),
        (2, "float", 128, 384, 200, 1, {}),
        (3, "integer", 96, 192, 128, 33, {"scaled": False}),
        (3, "none", 64, 299, 130, 11, {}),
        (4, "float", 32, 352, 200, 16, {"w_dtype": "float32"}),
        (4, "integer", 224, 224, 130, 65, {"dtype": "float32", "w_dtype": "float32"}),
        (5, "float", 64, 101, 256, 17, {"store": "float32"}),
        (5, "none", 128, 256, 130, 3, {"real": True}),
        (8, "float", 256, 256, 200, 10, {"scaled": False}),
        (8, "integer", 32, 90, 136, 33, {"real": True, "dtype": "float32"}),
    ],
)
def test_every_width_and_grid(bits, zero_point, group, d_in, n, m, options, quantized):
    run(m, bits, zero_point, group, d_in, n, quantized=quantized, **options)


@pytest.mark.parametrize(
    ("bits", "zero_point", "group", "d_in", "quantized", "options"),
    [
        (3, "float", 32, 96, True, {"shrinks": SEARCH, "refits": 1, "weighed": True, "real": True}),
        (4, "none", 64, 128, False, {"shrinks": SEARCH}),
        (4, "float", 32, 90, True, {"rank": 3, "w_dtype": "float32"}),
        (5, "integer", 64, 192, False, {"rank": 2, "w_dtype": "float32"}),
    ],
)
def test_search_and_low_rank(bits, zero_point, group, d_in, quantized, options):
    run(9, bits, zero_point, group, d_in, 130, quantized=quantized, **options)


@pytest.mark.parametrize(
    ("bits", "zero_point", "group", "d_in", "quantized", "blocks", "scales"),
    [
        (3, "float", 32, 285, False, None, "coded"),
        (4, "none", 64, 192, True, None, "coded"),
        (4, "float", 64, 384, True, {"rows": 128, "columns": 128}, "coded"),
        (3, "float", 32, 285, True, None, "coded4"),
    ],
)
def test_coded_scales(bits, zero_point, group, d_in, quantized, blocks, scales):
    run(17, bits, zero_point, group, d_in, 200, quantized=quantized, scales=scales, blocks=blocks,
        real=True)  # fmt: skip


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    ("bits", "d_in", "n", "m", "quantized", "cores", "blocks"),
    [
        # Three blocks of rows, the last ragged; two of columns.
        (4, 370, 200, 20, False, 1, {"rows": 128, "columns": 128}),
        (3, 512, 450, 20, True, 2, {"rows": 256, "columns": 128, "depth": 128}),
        # Several products of rows of x and of the weight in a block.
        (5, 256, 130, 65, True, 1, {"columns": 128, "depth": 128, "height": 32}),
        (8, 384, 250, 40, False, 2, {"columns": 128, "depth": 128, "height": 16}),
    ],
)
def test_blocks(bits, d_in, n, m, quantized, cores, blocks, resident):
    blocks = {**blocks, "resident": resident}
    run(m, bits, "float", 64, d_in, n, quantized=quantized, cores=cores, blocks=blocks)


@pytest.mark.parametrize(
    ("quantized", "rank", "lead"), [(False, 2, (2, 5)), (True, 0, (11,)), (True, 2, (3, 1))]
)
def test_public_call(quantized, rank, lead):
    kind = {"bits": 3, "group_size": 32, "zero_point": "integer"}
    d_in, n = 90, 130
    x = mixed_rows(4, int(np.prod(lead)), d_in)
    given = mixed_weight(1, d_in, n, **kind, dtype="float32", rank=rank)
    kind |= {"store_dtype": jnp.bfloat16, "shrinks": (1.0,)}

    def call(x, w, *more):
        return pallas_kernels.prefill_quantize(
            x, w, *more, **kind, quantized=quantized, layer=LAYER, implementation="interpret"
        )

    more = given.channel_scale, None, given.low_rank
    y, packed = jax.jit(call)(x.reshape(*lead, d_in), given.w, *more)
    assert y.shape == (*lead, n)
    y = y.reshape(-1, n)
    check_packed(packed, given, **kind)
    if not quantized or not rank:
        check_prompt_product(y, x, given, packed, bits=3, group_size=32, quantized=quantized)
        return
    low_rank = tuple(map(f64, given.low_rank))
    want = f64(reference.packed_matmul(x, *packed, given.channel_scale, given.low_rank,
                                       problem=given.problem(x, **kind)))  # fmt: skip
    rounded_grid = np.abs(reference.dequantize(*packed, bits=3, group_size=32))[:d_in]
    x64 = np.abs(f64(x))
    grid = (x64 / f64(given.channel_scale)) @ f64(rounded_grid)
    through = x64 @ np.abs(low_rank[0]) @ np.abs(low_rank[1])
    # x / D and the weight are rounded to x's dtype, x A too, and y twice; sums take d_in float32
    # roundings, less than one of those.
    bound = half_step(x.dtype) * (3 * grid + 2 * through + 3 * np.abs(want) + through)
    assert np.all(np.abs(f64(y) - want) <= bound)

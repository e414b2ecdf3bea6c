"""`quantize_pack` for TPUs, simulated: codes are the reference's, but for ties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_cases import LAYER, check_packed, mixed_weight, simulate

import pallas_kernels
from pallas_kernels.problem import Problem, rounding_problem
from pallas_kernels.tpu import prefill_quantize as prefill
from pallas_kernels.tpu import quantize_pack as kernel

SEARCH = (1.0, 0.85, 0.7)


def run(bits, zero_point, group, d_in, n, store="bfloat16", dtype="bfloat16", *, cores=1,
        blocks=None, shrinks=(1.0,), refits=0, scales="float", **weight):  # fmt: skip
    kind = {"bits": bits, "group_size": group, "zero_point": zero_point}
    given = mixed_weight(d_in + n, d_in, n, **kind, dtype=dtype, **weight)
    kind |= {"store_dtype": store, "shrinks": shrinks, "refits": refits, "scales": scales}
    problem, tiles = given.problem(**kind), None
    if blocks:
        tiles = dataclasses.replace(kernel.default_blocks(problem), cores=cores, **blocks)
    got = simulate(kernel.quantize_pack, *given.operands, problem=problem, tiles=tiles, cores=cores)
    return check_packed(got, given, **kind)


@pytest.mark.parametrize(
    ("bits", "zero_point", "group", "d_in", "n", "store", "dtype"),
    [
        (2, "none", 32, 192, 200, "float32", "bfloat16"),
        (2, "float", 128, 384, 130, "bfloat16", "float32"),
        (2, "integer", 96, 288, 256, "bfloat16", "bfloat16"),
        (3, "none", 256, 256, 130, "bfloat16", "bfloat16"),
        (3, "float", 64, 192, 200, "float32", "float32"),
        (3, "integer", 32, 128, 136, "float32", "bfloat16"),
        (4, "none", 64, 320, 256, "bfloat16", "float32"),
        (4, "float", 32, 352, 200, "bfloat16", "bfloat16"),
        (4, "integer", 224, 224, 128, "float32", "bfloat16"),
        (5, "none", 128, 256, 200, "float32", "bfloat16"),
        (5, "float", 96, 192, 130, "bfloat16", "bfloat16"),
        (5, "integer", 64, 64, 256, "bfloat16", "float32"),
        (8, "none", 96, 288, 200, "bfloat16", "bfloat16"),
        (8, "float", 256, 512, 130, "bfloat16", "bfloat16"),
        (8, "integer", 128, 128, 136, "float32", "float32"),
    ],
)
def test_every_width_and_grid(bits, zero_point, group, d_in, n, store, dtype):
    run(bits, zero_point, group, d_in, n, store, dtype, scaled=bits % 2 == 0)


@pytest.mark.parametrize(
    ("bits", "zero_point", "group", "d_in", "options"),
    [
        # The last group has fewer rows than the others; padding is zero, exactly.
        (4, "float", 64, 299, {}),
        (3, "none", 128, 130, {"scaled": False}),
        # Real scales and factors: ties only.
        (4, "float", 32, 128, {"real": True}),
        (5, "none", 32, 101, {"real": True, "rank": 5, "store": "float32", "dtype": "float32"}),
        (8, "float", 64, 128, {"real": True, "rank": 17}),
        # Eighths: a low-rank part that is subtracted exactly.
        (3, "integer", 64, 192, {"rank": 3, "dtype": "float32"}),
        (2, "float", 32, 90, {"rank": 8, "dtype": "float32", "scaled": False}),
    ],
)
def test_ragged_rows_scales_and_low_rank(bits, zero_point, group, d_in, options):
    run(bits, zero_point, group, d_in, 130, **options)


@pytest.mark.parametrize(
    ("bits", "zero_point", "group", "d_in", "options"),
    [
        (3, "none", 32, 96, {"real": True}),
        (4, "float", 64, 192, {"weighed": True, "real": True}),
        (2, "integer", 32, 90, {"weighed": True, "rank": 2, "dtype": "float32"}),
        (4, "none", 32, 64, {"shrinks": (0.9,)}),
    ],
)
def test_search_for_the_range(bits, zero_point, group, d_in, options):
    options = {"shrinks": SEARCH, **options}
    if options["shrinks"][0] != 1.0:
        # Whole numbers are not on a smaller grid.
        options["real"] = True
    run(bits, zero_point, group, d_in, 130, **options)


@pytest.mark.parametrize(
    ("bits", "zero_point", "group", "d_in", "n", "cores", "blocks", "options"),
    [
        (4, "float", 32, 384, 200, 1, {"rows": 128, "columns": 128}, {"scaled": True}),
        (3, "integer", 128, 512, 450, 2, {"rows": 256, "columns": 128}, {"rank": 2}),
        (5, "none", 64, 370, 300, 1, {"rows": 128, "columns": 256},
         {"shrinks": SEARCH, "weighed": True}),
        (8, "float", 96, 288, 200, 2, {"columns": 128}, {}),
        # More groups than are rounded at a time, and not a multiple of that.
        (2, "float", 32, 352, 130, 1, {"columns": 128}, {}),
    ],
)  # fmt: skip
def test_blocks(bits, zero_point, group, d_in, n, cores, blocks, options):
    dtype = "float32" if options.get("rank") else "bfloat16"
    run(bits, zero_point, group, d_in, n, dtype=dtype, cores=cores, blocks=blocks, **options)


@pytest.mark.parametrize(
    ("bits", "zero_point", "group", "d_in", "blocks", "options"),
    [
        (2, "integer", 32, 96, None, {"store": "float32"}),
        # More groups than are rounded at a time, and not a multiple of that; a ragged last one.
        (3, "float", 32, 285, None, {}),
        (4, "float", 64, 192, None, {"shrinks": SEARCH, "weighed": True}),
        (4, "none", 64, 128, None, {"rank": 3, "dtype": "float32"}),
        (8, "float", 96, 288, None, {}),
        # Of a column in several blocks, XLA finds the numbers.
        (5, "float", 64, 384, {"rows": 128, "columns": 128}, {}),
        (3, "float", 32, 285, None, {"scales": "coded4", "shrinks": SEARCH}),
        (4, "float", 64, 384, {"rows": 128, "columns": 128}, {"scales": "coded4"}),
    ],
)
def test_coded_scales(bits, zero_point, group, d_in, blocks, options):
    options = {"scales": "coded"} | options
    run(bits, zero_point, group, d_in, 200, blocks=blocks, real=True, **options)


@pytest.mark.parametrize(
    ("bits", "zero_point", "group", "d_in", "blocks", "options"),
    [
        (4, "float", 32, 90, None, {"scales": "coded", "weighed": True, "refits": 2}),
        # Blocks of rows, and padding that nothing weighs.
        (3, "none", 64, 250, {"rows": 128, "columns": 128}, {"shrinks": (0.9,), "refits": 1}),
        # More groups than a step of the loop takes, and not a multiple of that.
        (2, "integer", 128, 2176, None, {"shrinks": (1.0, 0.8), "weighed": True, "refits": 3}),
        (5, "float", 32, 64, None, {"scales": "coded4", "refits": 1}),
    ],
)
def test_refits(bits, zero_point, group, d_in, blocks, options):
    options = {"shrinks": SEARCH} | options
    assert run(bits, zero_point, group, d_in, 128, blocks=blocks, real=True, **options) < 20


def test_nothing_and_constants_stay_what_they_are():
    w = np.zeros((2, 64, 128), np.float32)
    w[LAYER, :32, :4], w[LAYER, :32, 4:8], w[LAYER, 7, 8:12] = 3.0, -0.75, 1e-39
    kind = {"bits": 3, "group_size": 32, "zero_point": "float", "store_dtype": "float32"}
    got = simulate(
        kernel.quantize_pack, jnp.asarray(w), None, None, None, jnp.asarray(LAYER),
        problem=rounding_problem(w, **kind),
    )  # fmt: skip
    back = pallas_kernels.dequantize(*got, bits=3, group_size=32)
    np.testing.assert_allclose(back, w[LAYER], rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("stacked", [False, True])
def test_public_call(stacked):
    kind = {"bits": 5, "group_size": 32, "zero_point": "float"}
    given = mixed_weight(1, 90, 130, **kind, dtype="float32", rank=2)
    kind |= {"store_dtype": jnp.float32, "shrinks": (1.0,)}

    def call(w, *more):
        w, at = (w, {"layer": LAYER}) if stacked else (w[LAYER], {})
        return pallas_kernels.quantize_pack(w, *more, **kind, **at, implementation="interpret")

    got = jax.jit(call)(given.w, given.channel_scale, None, given.low_rank)
    check_packed(got, given, **kind)


@pytest.mark.parametrize("module", [kernel, prefill])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"group_size": 48}, "group_size 48 is not a multiple of 32"),
        ({"n": 64}, "64 columns are fewer than the 128 lanes"),
        ({"dtype": "float16"}, "float16 is no type of the vector unit"),
        ({"store_dtype": "float16"}, "float16 is no type of the vector unit"),
        ({"rank": 2048}, "a low-rank part of rank 2048 exceeds 1024"),
    ],
)
def test_refusals_name_their_reason(module, change, reason):
    facts = {
        "kernel": "quantize_pack", "m": 0, "d_in": 96, "n": 128, "bits": 4, "group_size": 32,
        "dtype": "bfloat16", "zero_point": "none", "shrinks": (1.0,),
    }  # fmt: skip
    if module is prefill:
        facts |= {"kernel": "prefill_quantize", "m": 16, "quantized": True}
    assert module.refusal(Problem(**facts)) is None
    assert reason in module.refusal(Problem(**{**facts, **change}))


@pytest.mark.parametrize(
    ("n", "change", "reason"),
    [
        (64, {}, "64 columns are fewer"),
        (128, {"group_size": 16}, "group_size 16 is not a multiple"),
        (128, {"store_dtype": "float16"}, "float16 is no type"),
    ],
)
def test_a_refused_public_call_says_why(n, change, reason):
    kind = {"bits": 4, "group_size": 32, "zero_point": "none", "store_dtype": "bfloat16", **change}
    w = jnp.ones((96, n), jnp.bfloat16)
    with pytest.raises(ValueError, match="implementation='interpret' cannot serve") as error:
        pallas_kernels.quantize_pack(w, **kind, implementation="interpret")
    assert reason in str(error.value)
    with pytest.raises(ValueError, match="implementation='interpret' cannot serve") as error:
        pallas_kernels.prefill_quantize(
            jnp.ones((3, 96), jnp.bfloat16), w, **kind, implementation="interpret"
        )
    assert reason in str(error.value)


def test_a_column_that_does_not_fit_is_refused():
    facts = {
        "n": 4096, "bits": 4, "group_size": 128, "dtype": "bfloat16", "zero_point": "float",
        "shrinks": (1.0,), "scaled": True,
    }  # fmt: skip
    long = Problem(kernel="quantize_pack", m=0, d_in=2**18, **facts)
    assert kernel.refusal(long, "v4") == (
        "columns of 262144 rows do not fit into 15 MiB of fast memory with what they need"
    )
    assert kernel.refusal(dataclasses.replace(long, d_in=2**13), "v4") is None
    prompt = Problem(kernel="prefill_quantize", m=4096, d_in=2**14, **facts)
    why = prefill.refusal(prompt, "v4")
    assert why.startswith("4096 rows of x beside it: columns of 16384 rows do not fit")
    for chip in ("v5e", "v5p", "v6e", "tpu7x"):
        assert prefill.refusal(dataclasses.replace(prompt, quantized=True), chip) is None

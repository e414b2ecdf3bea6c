"""The TPU kernels, compiled by the real compiler at the shapes of released models."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from compilers import MODELS, needs_compilers

import pallas_kernels
from pallas_kernels.choice import Problem, choose, current_target
from pallas_kernels.grid import put_together
from ttq_jax.chips.absent import CHIPS, compile_for, tracing_for
from ttq_jax.chips.released import projections, released_config

pytestmark = needs_compilers
TPUS = [name for name, chip in CHIPS.items() if chip.platform == "tpu"]
SHAPES = sorted({s for name in MODELS for s in projections(released_config(name)).values()})
BITS, ZERO_POINTS = (4, 3, 8, 5, 2), ("float", "none", "integer")
# A kernel unrolls its groups: compiling a large weight takes seconds, so each is compiled for one
# of the chips in turn, and every width for every chip.
SMALL = 1152 * 1152


def shape(dims, dtype):
    return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))


def packed_shapes(k, n, *, bits, group_size, zero_point, store="bfloat16", layers=(),
                  scales="float"):  # fmt: skip
    planes = tuple(
        shape((*layers, k * width // 8, n), "uint8") for width in pallas_kernels.PLANES[bits]
    )
    codes = shape((*layers, k // group_size, n), store if scales == "float" else "uint8")
    zeros = {"none": None, "float": codes, "integer": shape(codes.shape, "uint8")}[zero_point]
    columns = None if scales == "float" else shape((*layers, n), store)
    zeros = None if scales == "coded4" else zeros
    return planes, put_together(codes, columns, scales), zeros


def calls(text):
    """Kernels by name: how many custom calls of each are in a compiled program."""
    lines = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    names = ("packed_matmul", "quantize_pack", "prefill_quantize")
    return {name: sum(name in line for line in lines) for name in names}


def compile_packed_matmul(chip, m, k, n, *, implementation="tpu", store="bfloat16", **kind):
    call = functools.partial(
        pallas_kernels.packed_matmul, bits=kind["bits"], group_size=kind["group_size"],
        implementation=implementation,
    )  # fmt: skip
    return compile_for(
        chip, call, shape((m, k), "bfloat16"), *packed_shapes(k, n, **kind, store=store)
    )


def compile_quantize(chip, m, k, n, *, implementation="tpu", scaled=True, rank=0, **kind):
    """`quantize_pack`, with m of 0, or `prefill_quantize`."""
    kind = {"store_dtype": "bfloat16", **kind}
    kernel = pallas_kernels.prefill_quantize if m else pallas_kernels.quantize_pack
    call = functools.partial(kernel, implementation=implementation, **kind)
    d = shape((k,), "float32") if scaled else None
    low_rank = (shape((k, rank), "bfloat16"), shape((rank, n), "bfloat16")) if rank else None
    weight = shape((k, n), "bfloat16"), d, d, low_rank
    return compile_for(chip, call, *([shape((m, k), "bfloat16")] if m else []), *weight)


def design(chip, k, n):
    """A width, zero point and group for a shape."""
    i = SHAPES.index((k, n)) + TPUS.index(chip)
    bits = BITS[(i + SHAPES.index((k, n)) // 5) % 5] if k % 256 == 0 else (4, 8, 2)[i % 3]
    group_size = 32 if k * n <= SMALL and i % 2 else 128
    return i, {"bits": bits, "group_size": group_size, "zero_point": ZERO_POINTS[i // 5 % 3]}


CASES = [
    (chip, k, n)
    for i, (k, n) in enumerate(SHAPES)
    for j, chip in enumerate(TPUS)
    if k * n <= SMALL or (i - j) % len(TPUS) == 3
]


def of(cases):
    return pytest.mark.parametrize(
        ("chip", "k", "n"),
        [pytest.param(*c, marks=[pytest.mark.slow] * (c[1] * c[2] > SMALL)) for c in cases],
    )


def quantized_by(turn):
    """Small weights, and of the large ones every second: each is compiled by one quantizer."""
    return [c for c in CASES if c[1] * c[2] <= SMALL or SHAPES.index(c[1:]) % 2 == turn]


def test_every_width_is_compiled_for_every_chip():
    assert {(chip, design(chip, k, n)[1]["bits"]) for chip, k, n in CASES} == {
        (chip, bits) for chip in TPUS for bits in BITS
    }
    assert {(k, n) for _, k, n in CASES} == set(SHAPES)
    assert {*quantized_by(0), *quantized_by(1)} == set(CASES)
    for turn in (0, 1):
        some = [(chip, design(chip, k, n)[1]["bits"]) for chip, k, n in quantized_by(turn)]
        assert {bits for _, bits in some} == set(BITS)
        assert {chip for chip, _ in some} == set(TPUS)


@of(CASES)
def test_packed_matmul(chip, k, n):
    i, kind = design(chip, k, n)
    # Many rows of x take the compiler long on long columns; the chip with the least fast memory has
    # them all the same.
    m = (1, 16, 512)[i % 3] if k <= 8192 else {"v4": 512}.get(chip, 1)
    compiled = compile_packed_matmul(chip, m, k, n, **kind)
    assert calls(compiled.as_text())["packed_matmul"] == 1


@of(quantized_by(0))
def test_quantize_pack(chip, k, n):
    i, kind = design(chip, k, n)
    compiled = compile_quantize(chip, 0, k, n, **kind, scaled=i % 3 > 0)
    assert calls(compiled.as_text())["quantize_pack"] == 1


@of(quantized_by(1))
def test_prefill_quantize(chip, k, n):
    i, kind = design(chip, k, n)
    m = (512, 16, 2048, 1)[i % 4]
    compiled = compile_quantize(chip, m, k, n, **kind, quantized=i % 2 > 0)
    assert calls(compiled.as_text())["prefill_quantize"] == 1


# The chips with least fast memory; the others have twice as much.
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4", "v5p", "tpu7x"])
def test_the_longest_prompt_over_the_longest_columns(chip):
    """What is not refused compiles: fast memory holds it, or the refusal says that it does not."""
    kind = {"bits": 4, "group_size": 128, "zero_point": "float", "quantized": True}
    compiled = compile_quantize(chip, 4096, 16384, 4096, **kind, implementation=None)
    facts = {name: kind[name] for name in ("bits", "group_size", "zero_point", "quantized")}
    with tracing_for(chip):
        problem = Problem(kernel="prefill_quantize", m=4096, d_in=16384, n=4096, shrinks=(1.0,),
                          dtype="bfloat16", scaled=True, **facts)  # fmt: skip
        chosen = choose(problem, current_target()).implementation
    assert calls(compiled.as_text())["prefill_quantize"] == (chosen == "tpu")


@pytest.mark.slow
@pytest.mark.parametrize(("m", "group_size"), [(512, 128), (1, 32)])
def test_rows_give_way_to_columns_longer_than_any_here(m, group_size):
    """llama-3-70b's, by the widest codes, on the chip with the least fast memory."""
    kind = {"bits": 8, "group_size": group_size, "zero_point": "float"}
    compiled = compile_packed_matmul("v4", m, 28672, 1024, **kind)
    assert calls(compiled.as_text())["packed_matmul"] == 1


@pytest.mark.slow
def test_small_groups_of_a_large_weight():
    kind = {"bits": 3, "group_size": 32, "zero_point": "float"}
    compiled = compile_packed_matmul("v5e", 1, 4096, 4096, **kind)
    assert calls(compiled.as_text())["packed_matmul"] == 1
    compiled = compile_quantize("v5e", 2048, 4096, 4096, **kind)
    assert calls(compiled.as_text())["prefill_quantize"] == 1


@pytest.mark.parametrize(
    ("chip", "scales"), [*((chip, "coded") for chip in TPUS), ("v6e", "coded4")]
)
def test_coded_scales(chip, scales):
    """A small weight, from the same operands as models have: stacks, and a layer of them."""
    i = TPUS.index(chip)
    kind = {"bits": BITS[i], "group_size": 32, "zero_point": ZERO_POINTS[i % 3]}
    if scales == "coded4":
        kind |= {"bits": 3, "zero_point": "float"}
    k, n, common = 512, 256, {"layer": 1, "implementation": "tpu"}
    packed = packed_shapes(k, n, **kind, scales=scales, layers=(2,))
    call = functools.partial(
        pallas_kernels.packed_matmul, bits=kind["bits"], group_size=32, **common
    )
    text = compile_for(chip, call, shape((1 + 16 * i, k), "bfloat16"), *packed).as_text()
    assert calls(text)["packed_matmul"] == 1
    kind |= {"scales": scales, "store_dtype": "bfloat16", "shrinks": (1.0, 0.8)[: 1 + i % 2]}
    kind["refits"] = 1 + i % 3
    weight = shape((2, k - 7, n), "bfloat16"), shape((k - 7,), "float32")
    call = functools.partial(pallas_kernels.quantize_pack, **kind, **common)
    text = compile_for(chip, call, *weight).as_text()
    assert calls(text)["quantize_pack"] == 1
    assert " minimum(" not in text, "not the kernel, but XLA finds the columns' numbers"
    call = functools.partial(pallas_kernels.prefill_quantize, **kind, **common, quantized=i % 2 > 0)
    text = compile_for(chip, call, shape((16, k - 7), "bfloat16"), *weight).as_text()
    assert calls(text)["prefill_quantize"] == 1


@pytest.mark.parametrize(
    ("chip", "m", "k", "n", "kind"),
    [
        # Ragged in every way that is served, and with the most that a call can have beside x.
        ("v5e", 5, 192, 200, {"bits": 4, "group_size": 96, "zero_point": "float"}),
        ("v6e", 33, 768, 72, {"bits": 3, "group_size": 256, "zero_point": "integer"}),
        ("v4", 3, 320, 1000, {"bits": 8, "group_size": 160, "zero_point": "float"}),
        ("v5p", 1, 384, 130, {"bits": 2, "group_size": 384, "zero_point": "none"}),
        ("tpu7x", 65, 256, 136, {"bits": 5, "group_size": 64, "zero_point": "float"}),
    ],
)
def test_ragged_and_low_rank(chip, m, k, n, kind):
    compiled = compile_packed_matmul(chip, m, k, n, **kind, store="float32")
    assert calls(compiled.as_text())["packed_matmul"] == 1
    compiled = compile_quantize(chip, m, k - 7, max(n, 128), **kind, rank=16, shrinks=(1.0, 0.8),
                                quantized=True)  # fmt: skip
    assert calls(compiled.as_text())["prefill_quantize"] == 1
    compiled = compile_quantize(chip, 0, k - 7, max(n, 128), **kind, rank=16, shrinks=(1.0, 0.8))
    assert calls(compiled.as_text())["quantize_pack"] == 1


@pytest.mark.parametrize(
    ("chip", "kernel", "change", "reason"),
    [
        # gemma-3-1b's width, whose eighth is not whole registers.
        ("v5e", "packed_matmul", {"bits": 3}, "1152 rows of 3-bit codes are slabs of 144 rows"),
        ("v6e", "packed_matmul", {"bits": 5}, "1152 rows of 5-bit codes are slabs of 144 rows"),
        ("v4", "packed_matmul", {"dtype": "float32"}, "x is float32"),
        ("v5p", "packed_matmul", {"store_dtype": "float16"}, "float16"),
        ("v5e", "quantize_pack", {"group_size": 16}, "group_size 16 is not a multiple of 32"),
        ("tpu7x", "prefill_quantize", {"n": 64}, "64 columns are fewer"),
        ("v5e", "prefill_quantize", {"m": 5000}, "5000 rows of activations"),
        ("v6e", "quantize_pack", {"store_dtype": "float16"}, "float16 is no type"),
    ],
)
def test_what_is_refused_is_said_and_left_to_xla(chip, kernel, change, reason):
    facts = {
        "m": 0 if kernel == "quantize_pack" else 3, "n": 256, "bits": 4, "group_size": 32,
        "dtype": "bfloat16", "store_dtype": "bfloat16", "zero_point": "float",
        "shrinks": () if kernel == "packed_matmul" else (1.0,), **change,
    }  # fmt: skip
    with tracing_for(chip):
        choice = choose(Problem(kernel=kernel, d_in=1152, **facts), current_target())
        assert choice.implementation == "xla"
        assert choice.fallback
        assert reason in choice.reason
    kind = {name: facts[name] for name in ("bits", "group_size", "zero_point")}
    m, n, dtype, store = (facts[name] for name in ("m", "n", "dtype", "store_dtype"))
    for implementation in (None, "tpu"):
        common = {"bits": kind["bits"], "group_size": 32, "implementation": implementation}
        if kernel == "packed_matmul":
            call = functools.partial(pallas_kernels.packed_matmul, **common)
            operands = shape((m, 1152), dtype), *packed_shapes(1152, n, **kind, store=store)
        else:
            call = functools.partial(getattr(pallas_kernels, kernel), **{
                **common, **kind, "store_dtype": store,
            })  # fmt: skip
            operands = (shape((1152, n), dtype),)
            if m:
                operands = shape((m, 1152), dtype), *operands
        if implementation is None:
            text = compile_for(chip, call, *operands).as_text()
            assert "tpu_custom_call" not in text
        else:
            with pytest.raises(ValueError, match="cannot serve this") as error:
                compile_for(chip, call, *operands)
            assert reason in str(error.value)


@pytest.mark.parametrize(
    ("bits", "group_size", "m", "scales"),
    [(4, 128, 1, "float"), (3, 32, 16, "float"), (5, 128, 32, "coded")],
)
def test_a_scan_over_layers_copies_none(bits, group_size, m, scales):
    layers, k = 6, 1024
    kind = {"bits": bits, "group_size": group_size, "zero_point": "float", "scales": scales}
    stacks = packed_shapes(k, k, **kind, layers=(layers,))

    def decode(x, planes, scales, zeros):
        def step(x, layer):
            y = pallas_kernels.packed_matmul(
                x, planes, scales, zeros, bits=bits, group_size=group_size, layer=layer
            )
            return x + y, None

        return jax.lax.scan(step, x, jnp.arange(layers))[0]

    text = compile_for("v5e", decode, shape((m, k), "bfloat16"), *stacks).as_text()
    assert calls(text)["packed_matmul"] == 1
    assert " while(" in text, "the layers are a loop, not unrolled"
    types = set()
    for stack in jax.tree.leaves(stacks):
        short = {"uint8": "u8", "bfloat16": "bf16"}[stack.dtype.name]
        tail = ",".join(map(str, stack.shape[1:]))
        types |= {f"{short}[{lead}{tail}]" for lead in ("", "1,", f"{layers},")}
    # These hand an array on without touching it; all else would write it down again.
    harmless = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "custom-call",
                "optimization-barrier"}  # fmt: skip
    for line in text.splitlines():
        found = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
        if found and found[2] not in harmless:
            assert not any(t in found[1] for t in types), f"a packed layer is copied: {line}"

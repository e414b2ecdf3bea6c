"""Every GPU kernel, by the real CUDA compiler, for chips that are not there.

Each of the released models' projection shapes is compiled by every kernel for one chip in turn.
Widths, groups, zero points, rows and dtypes rotate over the shapes so that each chip sees all of
them with every kernel.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from compilers import MODELS, needs_compilers

import pallas_kernels
from pallas_kernels.choice import KERNELS, Target
from pallas_kernels.grid import put_together
from pallas_kernels.layout import PLANES
from ttq_jax.chips.absent import compile_for
from ttq_jax.chips.released import projections, released_config

pytestmark = needs_compilers

TRITON = "__gpu$xla.gpu.triton"
CHIPS = ("h100", "a100", "l4")
SHAPES = sorted({s for name in MODELS for s in projections(released_config(name)).values()})
LAYERS = 2
# 3 and 5 bits are twice the code of the others, and take the compiler four times as long.
BITS = (4, 2, 4, 3, 8, 4, 5)
GROUPS = (128, 32, 64)
ZEROS = ("float", "none", "integer", "float", "none")
ROWS = (1, 16, 512)
DTYPES = (*"bhbbffb",)
NAMES = {"b": "bfloat16", "h": "float16", "f": "float32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """One program; `m` is 0 for `quantize_pack`."""

    chip: str
    kernel: str
    k: int
    n: int
    bits: int
    group_size: int
    zero_point: str
    m: int
    dtype: str

    def __str__(self):
        return "-".join(str(v) for v in vars(self).values())


def designs():
    for i, (k, n) in enumerate(SHAPES):
        chip, j = CHIPS[i % 3], i // 3 + 2 * (i % 3)
        rest = {
            "chip": chip,
            "k": k,
            "n": n,
            "bits": BITS[j % 7],
            "group_size": GROUPS[j % 3],
            "zero_point": ZEROS[j % 5],
            "dtype": NAMES[DTYPES[j % 7]],
        }
        m = ROWS[(j + j // 3) % 3]
        yield Design(kernel="packed_matmul", m=m, **rest)
        yield Design(kernel="quantize_pack", m=0, **rest)
        yield Design(kernel="prefill_quantize", m=m, **rest)


ALL = list(designs())


@pytest.mark.parametrize("chip", CHIPS)
def test_the_designs_cover_what_they_should(chip):
    mine = [d for d in ALL if d.chip == chip]
    of = {kernel: [d for d in mine if d.kernel == kernel] for kernel in KERNELS}
    for kernel, some in of.items():
        assert {d.bits for d in some} == set(PLANES)
        assert {d.group_size for d in some} == set(GROUPS)
        assert {d.zero_point for d in some} == set(ZEROS)
        assert {d.m for d in some} == ({0} if kernel == "quantize_pack" else set(ROWS))
        assert {d.dtype for d in some} == set(NAMES.values())
        every = {(d.k, d.n) for d in ALL if d.kernel == kernel}
        assert every == set(SHAPES)


def program(design):
    """The public call and the shapes of its operands, the weight stacked over layers."""
    d, shape = design, jax.ShapeDtypeStruct
    x = shape((d.m, d.k), jnp.dtype(d.dtype))
    layer = shape((), jnp.int32)
    kind = {"bits": d.bits, "group_size": d.group_size, "implementation": "triton"}
    if d.kernel == "packed_matmul":
        planes = tuple(shape((LAYERS, d.k * w // 8, d.n), jnp.uint8) for w in PLANES[d.bits])
        scales = shape((LAYERS, d.k // d.group_size, d.n), jnp.bfloat16)
        zeros = shape(scales.shape, jnp.uint8 if d.zero_point == "integer" else jnp.bfloat16)
        zeros = None if d.zero_point == "none" else zeros

        def run(x, planes, scales, zeros, layer):
            return pallas_kernels.packed_matmul(x, planes, scales, zeros, layer=layer, **kind)

        return run, (x, planes, scales, zeros, layer)
    kind |= {"zero_point": d.zero_point, "store_dtype": "bfloat16"}
    w = shape((LAYERS, d.k, d.n), jnp.dtype(d.dtype))
    scale = shape((d.k,), jnp.float32)
    factors = [shape(size, jnp.float32) for size in ((d.k, 5), (5, d.n))]
    factors = tuple(factors) if d.group_size == 64 else None
    if d.kernel == "quantize_pack":

        def run(w, scale, factors, layer):
            return pallas_kernels.quantize_pack(w, scale, None, factors, layer=layer, **kind)

        return run, (w, scale, factors, layer)

    def run(x, w, scale, factors, layer):
        return pallas_kernels.prefill_quantize(
            x, w, scale, None, factors, layer=layer, quantized=d.k > d.n, **kind
        )

    return run, (x, w, scale, factors, layer)


@pytest.mark.parametrize("design", ALL, ids=str)
def test_compiles_to_one_kernel_that_copies_no_weight(design):
    run, shapes = program(design)
    text = compile_for(design.chip, run, *shapes).as_text()
    entry = text[text.index("\nENTRY ") :].split("\n}")[0]
    calls = [line for line in entry.splitlines() if f'custom_call_target="{TRITON}"' in line]
    assert len(calls) == 1
    assert f"{design.kernel}_{design.bits}bit/pallas_call" in calls[0]
    # The layer is indexed by the kernel: nothing cuts it out of the stack or moves it.
    made = re.findall(r"(?m)^ .*? = (\w+\[[\d,]*\])\S* ([\w-]+)\(", entry)
    touched = [kind for kind, opcode in made if opcode not in {"parameter", "bitcast"}]
    if design.kernel == "packed_matmul":
        assert not [kind for kind in touched if kind.startswith("u8[")]
    else:
        wide = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[design.dtype]
        size = rf"{wide}\[([12],)?{design.k},{design.n}\]"
        assert not [kind for kind in touched if re.fullmatch(size, kind)]


@pytest.mark.parametrize(
    ("chip", "coded"), [*((chip, "coded") for chip in CHIPS), ("h100", "coded4")]
)
def test_coded_scales_compile(chip, coded):
    """All three kernels; the quantizers round the columns' numbers as they are stored."""
    i, shape = CHIPS.index(chip), jax.ShapeDtypeStruct
    paired = coded == "coded4"
    bits, k, n, implementation = (
        3 if paired else (4, 2, 8)[i],
        512,
        256,
        {"implementation": "triton"},
    )
    x = shape(((1, 16, 64)[i], k), jnp.dtype(("bfloat16", "float16", "float32")[i]))
    codes = shape((LAYERS, k // 32, n), jnp.uint8)
    scales = put_together(codes, shape((LAYERS, n), jnp.bfloat16), coded)
    planes = tuple(shape((LAYERS, k * w // 8, n), jnp.uint8) for w in PLANES[bits])

    def multiply(x, *stacks):
        return pallas_kernels.packed_matmul(
            x, *stacks, bits=bits, group_size=32, layer=1, **implementation
        )

    kind = {"bits": bits, "group_size": 32, "zero_point": "float" if paired else ZEROS[i],
            "store_dtype": "bfloat16", "scales": coded, "shrinks": (1.0, 0.8),
            "refits": 1 + i}  # fmt: skip

    def quantize(x, w, d):
        return pallas_kernels.prefill_quantize(x, w, d, **kind, quantized=i > 0, **implementation)

    w, d = shape((k, n), x.dtype), shape((k,), jnp.float32)
    packed = planes, scales, None if paired else codes
    for call, operands in ((multiply, (x, *packed)), (quantize, (x, w, d))):
        assert compile_for(chip, call, *operands).as_text().count(TRITON) == 1


def test_a_t4_is_served_by_xla_and_says_why():
    d = Design(
        chip="t4", kernel="packed_matmul", k=1024, n=1024, bits=4, group_size=32,
        zero_point="float", m=4, dtype="float16",
    )  # fmt: skip
    run, shapes = program(d)
    with pytest.raises(ValueError, match=r"cannot serve this packed_matmul: .*a T4 has 7\.5"):
        compile_for("t4", run, *shapes)
    problem = pallas_kernels.Problem(
        kernel="packed_matmul", m=d.m, d_in=d.k, n=d.n, bits=d.bits, group_size=d.group_size,
        zero_point=d.zero_point, dtype=d.dtype,
    )  # fmt: skip
    choice = pallas_kernels.choose(problem, Target(platform="gpu", chip="t4"))
    assert (choice.implementation, choice.fallback) == ("xla", True)
    assert "a T4 has 7.5" in choice.reason

    def default(x, planes, scales, zeros, layer):
        return pallas_kernels.packed_matmul(
            x, planes, scales, zeros, layer=layer, bits=d.bits, group_size=d.group_size
        )

    text = compile_for("t4", default, *shapes).as_text()
    assert TRITON not in text

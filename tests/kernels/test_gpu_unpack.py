"""The PTX of the GPU kernels' unpacking, run by a model of its instructions on NumPy words."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import unpack
from pallas_kernels.layout import PLANES, pack

ALL_BITS = sorted(PLANES)


def floats(words):
    return words.view(np.float32)


def halves(words, dtype):
    """The two 16-bit numbers in each word, low one first."""
    return words.view(np.uint16).reshape(-1, 2).view(dtype)


def word_of(low_and_high, dtype):
    return np.ascontiguousarray(low_and_high.astype(dtype)).view(np.uint32).ravel()


def permute(a, b, selector):
    """prmt: byte i of the result is byte (nibble i of the selector) of the eight in {b, a}."""
    assert not selector & 0x8888, "sign replication is not modelled"
    pool = np.concatenate([x.view(np.uint8).reshape(-1, 4) for x in (a, b)], axis=1)
    picked = pool[:, [selector >> 4 * i & 7 for i in range(4)]]
    return np.ascontiguousarray(picked).view(np.uint32).ravel()


def bf16_fma(a, b, c):
    a, b, c = (halves(x, jnp.bfloat16).astype(np.float64) for x in (a, b, c))
    return word_of(a * b + c, jnp.bfloat16)


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, n: a << n,
    "shr.u32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "prmt.b32": lambda a, b, s: permute(a, b, int(s[0])),
    "sub.f32": lambda a, b: (floats(a) - floats(b)).view(np.uint32),
    # The first source goes to the upper half.
    "cvt.rn.bf16x2.f32": lambda a, b: word_of(np.stack([floats(b), floats(a)], 1), jnp.bfloat16),
    "cvt.rn.f16.f32": lambda a: floats(a).astype(np.float16).view(np.uint16).astype(np.uint32),
    "cvt.f32.f16": lambda a: word_of(a.astype(np.uint16).view(np.float16), np.float32),
    "fma.rn.bf16x2": bf16_fma,
    "add.rn.f16x2": lambda a, b: word_of(halves(a, np.float16) + halves(b, np.float16), np.float16),
}


def run(text, outputs, inputs):
    """Executes PTX on registers of words; gives the output registers."""
    registers = {f"${len(outputs) + i}": words for i, words in enumerate(inputs)}
    size = len(inputs[0])
    declared = set(outputs)

    def value(name):
        if name in registers:
            return registers[name]
        digits = name.removeprefix("0f").removeprefix("0x")
        base = 16 if name != digits else 10
        return np.full(size, int(digits, base), np.uint32)

    for line in text.strip().removeprefix("{").removesuffix("}").split(";"):
        if not line.strip():
            continue
        name, rest = line.split(maxsplit=1)
        operands = [word.strip() for word in rest.split(",")]
        if name == ".reg":
            declared |= {word.split()[-1] for word in operands}
            continue
        target, *sources = operands
        assert target in declared, f"{target} is no register that may be written"
        registers[target] = INSTRUCTIONS[name](*(value(source) for source in sources))
    return [registers[name] for name in outputs]


def numbers(text, constraints, carriers, dtype):
    """What a block of carriers, four to a register, becomes."""
    kinds = constraints.split(",")
    outputs = [f"${i}" for i, kind in enumerate(kinds) if kind.startswith("=")]
    assert len(kinds) == len(outputs) + len(carriers)
    assert set(kinds) == {"=f" if dtype == np.float32 else "=r", "r"}
    words = [np.ascontiguousarray(c).view(np.uint32) for c in carriers]
    found = np.stack(run(text, outputs, words), axis=1)
    return np.ascontiguousarray(found).view(dtype).ravel()


def offsets(bits, dtype):
    """Those that the kernels ask for: none, the symmetric middle, and one that keeps the magic."""
    return [0.0, 2.0 ** (bits - 1)] + ([-128.0] if dtype == np.float32 and bits < 8 else [])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_every_code_in_every_field_becomes_its_number(bits, dtype):
    slabs = unpack.slabs(bits)
    # Each slab has every code in each of a register's four bytes, between others.
    at = np.arange(1024)
    codes = [(at // 4 + 7 * (at % 4) + slab) % 2**bits for slab in range(slabs)]
    codes = np.stack(codes).astype(np.uint8)
    for row in codes:
        assert len(set(zip(row.tolist(), (at % 4).tolist(), strict=True))) == 4 * 2**bits
    planes = [np.asarray(p).ravel() for p in pack(jnp.asarray(codes.reshape(-1, 1)), bits=bits)]
    for slab in range(slabs):
        places = unpack.sources(slab, bits)
        carriers = [
            plane[part * 1024 :][:1024] for plane, (part, _) in zip(planes, places, strict=True)
        ]
        fields = [field for _, field in places]
        for offset in offsets(bits, dtype):
            text, constraints = unpack.assembly(fields, bits=bits, dtype=dtype, offset=offset)
            got = numbers(text, constraints, carriers, dtype)
            expected = codes[slab].astype(np.float64) - offset
            np.testing.assert_array_equal(got.astype(np.float64), expected)
            plain = unpack.numbers(
                [jnp.asarray(c)[:, None] for c in carriers], fields, bits=bits, dtype=dtype,
                offset=offset, interpret=True,
            )  # fmt: skip
            assert plain.dtype == dtype
            np.testing.assert_array_equal(np.asarray(plain, np.float64).ravel(), expected)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_sources_cover_every_bit_once(bits):
    seen = set()
    for slab in range(unpack.slabs(bits)):
        for plane, (part, field) in enumerate(unpack.sources(slab, bits)):
            width = PLANES[bits][plane]
            assert 0 <= part < width // min(PLANES[bits])
            assert 0 <= field < 8 // width
            seen.add((plane, part, field))
    # A row has one field in each plane.
    assert len(seen) == unpack.slabs(bits) * len(PLANES[bits])


@pytest.mark.parametrize("dtype", sorted(unpack.AS_STORED))
def test_a_number_becomes_what_is_stored_of_it(dtype):
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    # Ties to even in either type.
    words[:1000] = words[:1000] & 0xFFFF0000 | 0x8000
    words[1000:2000] = words[1000:2000] & 0xFFFFE000 | 0x1000
    finite = np.isfinite(floats(words)) & (np.abs(floats(words)) < 6e4)
    words = words[finite & (np.abs(floats(words)) > 2.0**-14)]
    (got,) = run(unpack.AS_STORED[dtype], ["$0"], [words])
    want = floats(words).astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(floats(got), want)
    plain = unpack.as_stored(jnp.asarray(floats(words)), dtype, interpret=True)
    np.testing.assert_array_equal(np.asarray(plain), want)

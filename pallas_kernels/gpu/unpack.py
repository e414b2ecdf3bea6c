"""Carriers to numbers, four bytes at a time.

Triton treats every element of a byte array by itself: an extraction, a shift, a mask, a conversion
(which runs at a quarter of the rate of other instructions) and a re-packing per weight, more than
an H100 can issue while memory delivers 4-bit codes. Hence a few lines of PTX: shifts and masks
work on four carriers in one 32-bit register, and ``prmt`` puts a code below a constant byte, which
*is* a floating-point number: in bfloat16 ``0x43qq`` is 128 + q, in float16 ``0x64qq`` is 1024 + q.
A 4-bit code costs 0.9 instructions, and 0.5 more to subtract the constant, exactly.

Where no PTX runs (interpret mode) the same codes come from plain arithmetic; the tests execute the
PTX by a model of its instructions.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import grid
from pallas_kernels.gpu.triton import plgpu
from pallas_kernels.layout import PLANES


def slabs(bits: int) -> int:
    """Slabs that a block of carrier rows of all planes holds: those of the narrowest plane."""
    return 8 // min(PLANES[bits])


def sources(slab: int, bits: int) -> list[tuple[int, int]]:
    """Where the codes of a slab lie.

    Args:
      slab: ``0 .. slabs(bits) - 1``; its rows are ``slab * k // slabs(bits)`` and on.
      bits: Width of a code.

    Returns:
      Per plane ``(part, field)``: carrier row ``t`` of the slab is row ``part * k // slabs(bits) +
      t`` of the plane, the bits are in that field.
    """
    narrow = min(PLANES[bits])
    return [(slab % (width // narrow), slab // (width // narrow)) for width in PLANES[bits]]


def assembly(
    fields: Sequence[int], *, bits: int, dtype: jax.typing.DTypeLike, offset: float
) -> tuple[str, str]:
    """PTX that turns four carriers of each plane into four numbers ``q - offset``.

    Args:
      fields: The field to read, per plane.
      bits: Width of a code.
      dtype: float32, bfloat16 (compute capability 8.0 and up) or float16.
      offset: Exactly representable, as are all ``q - offset``.

    Returns:
      The text, outputs before inputs, and its register constraints.
    """
    words = 4 if dtype == jnp.float32 else 2
    lines = [".reg .b32 q, t, c, f0, f1, f2, f3;"]
    base = 0
    for i, (width, field) in enumerate(zip(PLANES[bits], fields, strict=True)):
        target = "q" if i == 0 else "t"
        shift = base - width * field
        move = f"shl.b32 {target}, ${words + i}, {shift};"
        if shift <= 0:
            move = f"shr.u32 {target}, ${words + i}, {-shift};"
        mask = ((2**width - 1) << base) * 0x01010101
        lines += [move, f"and.b32 {target}, {target}, 0x{mask:08X};"]
        lines += ["or.b32 q, q, t;"] if i else []
        base += width
    if dtype == jnp.float32 or (dtype == jnp.bfloat16 and bits == 8):
        lines += _float32_words(words, bits, offset)
    else:
        lines += _half_words(dtype, offset)
    result = "=f" if dtype == jnp.float32 else "=r"
    constraints = ",".join([result] * words + ["r"] * len(PLANES[bits]))
    return "{ " + " ".join(lines) + " }", constraints


def _float32_words(words: int, bits: int, offset: float) -> list[str]:
    """``128 + q`` with q in the high half; 8 bits do not fit there: ``2**23 + q``."""
    if bits == 8:
        magic, selectors, bias = 0x4B000000, [f"0x744{i}" for i in range(4)], 2.0**23
    else:
        magic, selectors, bias = 0x43000000, [f"0x7{i}44" for i in range(4)], 128.0
    lines = [f"mov.b32 c, 0x{magic:08X};"]
    for i, selector in enumerate(selectors):
        out = f"${i}" if words == 4 else f"f{i}"
        lines.append(f"prmt.b32 {out}, q, c, {selector};")
        if bias + offset:
            lines.append(f"sub.f32 {out}, {out}, 0f{_bits(bias + offset, np.float32):08X};")
    if words == 2:
        lines += ["cvt.rn.bf16x2.f32 $0, f1, f0;", "cvt.rn.bf16x2.f32 $1, f3, f2;"]
    return lines


def _half_words(dtype: jax.typing.DTypeLike, offset: float) -> list[str]:
    bfloat = dtype == jnp.bfloat16
    lines = [f"mov.b32 c, 0x{0x43 if bfloat else 0x64:08X};"]
    lines += [f"prmt.b32 ${i}, q, c, 0x4{2 * i + 1}4{2 * i};" for i in range(2)]
    bias = offset + (128.0 if bfloat else 1024.0)
    if bias == 0:
        return lines
    pair = _bits(-bias, dtype) * 0x10001
    lines.append(f"mov.b32 c, 0x{pair:08X};")
    if not bfloat:
        return [*lines, *(f"add.rn.f16x2 ${i}, ${i}, c;" for i in range(2))]
    # Compute capability 8 has no addition of bfloat16; a product with 1 is the same.
    lines.append("mov.b32 t, 0x3F803F80;")
    return [*lines, *(f"fma.rn.bf16x2 ${i}, ${i}, t, c;" for i in range(2))]


def _bits(value: float, dtype: jax.typing.DTypeLike) -> int:
    word = np.asarray(value, dtype)
    return int(word.view(f"uint{8 * word.itemsize}"))


def numbers(
    carriers: Sequence[jax.Array],
    fields: Sequence[int],
    *,
    bits: int,
    dtype: jax.typing.DTypeLike,
    offset: float,
    interpret: bool,
) -> jax.Array:
    """The codes of one slab as floating-point numbers, inside a kernel.

    Args:
      carriers: ``uint8[r, c]`` per plane.
      fields: The field to read, per plane.
      bits: Width of a code.
      dtype: Of the result; ``q - offset`` is exact in it.
      offset: What to subtract.
      interpret: Whether no PTX can run.

    Returns:
      ``dtype[r, c]``.
    """
    if not interpret:
        text, constraints = assembly(fields, bits=bits, dtype=dtype, offset=offset)
        [out] = plgpu.elementwise_inline_asm(
            text, args=list(carriers), constraints=constraints, pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(carriers[0].shape, dtype)],
        )  # fmt: skip
        return out
    codes = jnp.zeros_like(carriers[0])
    base = 0
    for width, field, carrier in zip(PLANES[bits], fields, carriers, strict=True):
        part = (carrier >> jnp.uint8(width * field)) & jnp.uint8(2**width - 1)
        codes = codes | (part << jnp.uint8(base))
        base += width
    return (codes.astype(jnp.float32) - jnp.float32(offset)).astype(dtype)


def multiply_add(a: jax.Array, b: jax.Array, c: jax.Array, *, interpret: bool) -> jax.Array:
    """``a * b + c`` as one instruction; XLA compiles Triton without contracting the two.

    Args:
      a: float32.
      b: As a.
      c: As a.
      interpret: Whether no PTX can run.

    Returns:
      As a.
    """
    if interpret:
        return a * b + c
    [out] = plgpu.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;", args=[a, b, c], constraints="=f,f,f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(c.shape, c.dtype)],
    )  # fmt: skip
    return out


def nearest(a: jax.Array, *, interpret: bool) -> jax.Array:
    """Rounds to the nearest whole number, ties to even; Pallas does not translate `jnp.round`.

    Args:
      a: float32.
      interpret: Whether no PTX can run.

    Returns:
      As a.
    """
    if interpret:
        return jnp.round(a)
    [out] = plgpu.elementwise_inline_asm(
        "cvt.rni.f32.f32 $0, $1;", args=[a], constraints="=f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, a.dtype)],
    )  # fmt: skip
    return out


AS_STORED = {
    # With zeros below it, a bfloat16 number is its float32.
    "bfloat16": "{ .reg .b32 w; cvt.rn.bf16x2.f32 w, $1, 0f00000000; mov.b32 $0, w; }",
    "float16": "{ .reg .b16 h; cvt.rn.f16.f32 h, $1; cvt.f32.f16 $0, h; }",
}


def as_stored(a: jax.Array, dtype: jax.typing.DTypeLike, *, interpret: bool) -> jax.Array:
    """The nearest numbers of another type, `grid.as_stored`, which Pallas does not translate.

    Args:
      a: float32.
      dtype: float32, bfloat16 or float16.
      interpret: Whether no PTX can run.

    Returns:
      As a.
    """
    name = jnp.dtype(dtype).name
    if interpret or name not in AS_STORED:
        return grid.as_stored(a, dtype)
    [out] = plgpu.elementwise_inline_asm(
        AS_STORED[name], args=[a], constraints="=f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, a.dtype)],
    )  # fmt: skip
    return out

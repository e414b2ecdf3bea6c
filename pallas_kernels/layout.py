"""How b-bit codes lie in memory: true b bits per code, in uint8 carriers, as bit planes.

The insight: the ``k`` rows of a matrix are cut into slabs of consecutive rows, and slab ``f`` is
stored in bit field ``f`` of the same bytes. Unpacking is one shift and one mask of a whole slab;
no value ever changes its lane (the output channel), and with whole groups in a slab, which every
released model's widths have, a group is read from consecutive bytes on every machine.

Glossary
--------
code
    The unsigned integer ``q`` in ``0 .. 2**bits - 1`` that stands for one weight.
carrier
    The uint8 array element that codes are stored in.
plane
    ``width`` bits of every code, stored ``8 // width`` to the carrier. 2-, 4- and 8-bit codes are
    one plane; 3 bits are planes of 2 + 1, 5 bits of 4 + 1, low bits first.
field
    The ``width`` bits of a carrier that belong to one code; field 0 is the least significant.
slab
    The rows that share a field of a plane: ``k * width / 8`` consecutive rows.
octet
    The eighth of the rows, ``k / 8`` consecutive ones, that every plane keeps inside one field.
    Row ``t`` of all eight octets together fills whole carriers that hold nothing else, so it is
    the smallest piece that can be unpacked on its own.
group
    ``group_size`` consecutive rows (input channels) that share, per output channel, a scale and a
    zero point. The layout does not depend on it.
block
    What one step of a kernel loads. It is no part of this contract.

The contract
------------
Codes are ``[..., k, n]``: ``k`` input channels, a multiple of 8, ``n`` output channels, ``n``
minor. The plane of width ``w`` is ``uint8[..., k * w // 8, n]``; its carrier row ``t`` holds, in
field ``f``, that plane's bits of code row ``f * k * w // 8 + t``.

16 rows of 4-bit codes are 8 carrier rows, and of 3-bit codes 4 + 2::

    width 4          bits 7..4   bits 3..0       width 2     7..6  5..4  3..2  1..0
    carrier row 0      row  8      row  0        carrier 0     12     8     4     0
    carrier row 1      row  9      row  1        carrier 1     13     9     5     1
        ..                ..          ..              ..
    carrier row 7      row 15      row  7        width 1       7   6   5   4   3   2   1   0
                                                 carrier 0    14  12  10   8   6   4   2   0
                                                 carrier 1    15  13  11   9   7   5   3   1
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 8: (8,)}
"""Widths of the bit planes of a code, least significant plane first."""


def check_packing(*, bits: int, k: int, group_size: int | None = None) -> None:
    """Refuses a packing that the contract does not cover.

    Args:
      bits: Width of a code.
      k: Rows in all.
      group_size: Rows that share a scale; not checked when None.

    Raises:
      ValueError: ``bits`` is not in ``PLANES``, ``k`` is not a positive multiple of 8, or
        ``group_size`` is not a positive multiple of 8 that divides ``k``.
    """
    if bits not in PLANES:
        raise ValueError(
            f"bits: expected one of {sorted(PLANES)}, got {bits!r}; "
            "choose the next wider one, codes may use less than its range"
        )
    if k <= 0 or k % 8:
        raise ValueError(f"k: expected a positive multiple of 8, got {k} rows; pad the rows")
    if group_size is None:
        return
    if not isinstance(group_size, int) or group_size <= 0 or group_size % 8:
        raise ValueError(f"group_size: expected a positive multiple of 8, got {group_size!r}")
    if k % group_size:
        raise ValueError(
            f"k: expected a multiple of group_size {group_size}, got {k} rows; "
            "choose a group size that divides the input width, or pad the rows"
        )


def check_planes(planes: Sequence[jax.Array], *, bits: int) -> tuple[int, int]:
    """Checks packed planes against the contract.

    Args:
      planes: What `pack` returned.
      bits: Width of a code.

    Returns:
      ``(k, n)``, the rows and columns of the codes that the planes hold.

    Raises:
      ValueError: ``bits`` is unknown, or the number, dtype or shapes of the planes do not fit it.
    """
    check_packing(bits=bits, k=8)
    widths = PLANES[bits]
    if not isinstance(planes, (tuple, list)) or len(planes) != len(widths):
        came = f"{len(planes)}" if isinstance(planes, (tuple, list)) else type(planes).__name__
        raise ValueError(
            f"planes: expected a tuple of {len(widths)} for bits={bits} (widths {widths}), "
            f"got {came}; pass what pack returned, with the same bits"
        )
    for plane in planes:
        if plane.dtype != jnp.uint8 or plane.ndim < 2:
            raise ValueError(
                "planes: expected uint8[..., k*width//8, n], "
                f"got {plane.dtype}{list(plane.shape)}; pass what pack returned"
            )
    k = planes[0].shape[-2] * 8 // widths[0]
    check_packing(bits=bits, k=k)
    *lead, _, n = planes[0].shape
    expected = [(*lead, k * width // 8, n) for width in widths]
    if [plane.shape for plane in planes] != expected:
        raise ValueError(
            f"planes: expected shapes {expected} for bits={bits}, "
            f"got {[plane.shape for plane in planes]}; keep the planes of one pack call together"
        )
    return k, n


@functools.partial(jax.jit, static_argnames="bits")
def pack(codes: jax.Array, *, bits: int) -> tuple[jax.Array, ...]:
    """Stores codes at their true width.

    Args:
      codes: ``uint8[..., k, n]``, each in ``0 .. 2**bits - 1``; higher bits are dropped. ``k`` is a
        multiple of 8.
      bits: Width of a code: 2, 3, 4, 5 or 8.

    Returns:
      One ``uint8[..., k * width // 8, n]`` for each width in ``PLANES[bits]``.

    Raises:
      ValueError: ``codes`` is not uint8 with at least two axes, or `check_packing` refuses.
    """
    if codes.dtype != jnp.uint8 or codes.ndim < 2:
        raise ValueError(
            f"codes: expected uint8[..., k, n], got {codes.dtype}{list(codes.shape)}; "
            "round and clip to 0 .. 2**bits - 1, then cast with .astype(jnp.uint8)"
        )
    *lead, k, n = codes.shape
    check_packing(bits=bits, k=k)
    planes = []
    base = 0
    for width in PLANES[bits]:
        mask = jnp.uint8(2**width - 1)
        slabs = codes.reshape(*lead, 8 // width, k * width // 8, n)
        carriers = jnp.zeros_like(slabs[..., 0, :, :])
        for field in range(8 // width):
            part = (slabs[..., field, :, :] >> jnp.uint8(base)) & mask
            carriers = carriers | (part << jnp.uint8(field * width))
        planes.append(carriers)
        base += width
    return tuple(planes)


@functools.partial(jax.jit, static_argnames="bits")
def unpack(planes: Sequence[jax.Array], *, bits: int) -> jax.Array:
    """Reads back what `pack` stored.

    Args:
      planes: One ``uint8[..., k * width // 8, n]`` for each width in ``PLANES[bits]``.
      bits: Width of a code.

    Returns:
      ``uint8[..., k, n]``, each in ``0 .. 2**bits - 1``.

    Raises:
      ValueError: `check_planes` refuses.
    """
    k, n = check_planes(planes, bits=bits)
    lead = planes[0].shape[:-2]
    codes = jnp.zeros((*lead, k, n), jnp.uint8)
    base = 0
    for width, plane in zip(PLANES[bits], planes, strict=True):
        # Shifting by an iota along the field axis keeps this one fused loop that vectorises over n;
        # concatenating the fields instead makes XLA:CPU branch per element (3 times slower).
        shifts = lax.broadcasted_iota(jnp.uint8, (8 // width, 1, 1), 0) * jnp.uint8(width)
        part = (plane[..., None, :, :] >> shifts) & jnp.uint8(2**width - 1)
        codes = codes | (part.reshape(*lead, k, n) << jnp.uint8(base))
        base += width
    return codes

"""The packing contract: nothing lost, nothing wasted, and every bit where the docstring says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.layout import PLANES, pack, unpack

ALL_BITS = sorted(PLANES)


@st.composite
def packings(draw):
    bits = draw(st.sampled_from(ALL_BITS))
    group_size = 8 * draw(st.integers(1, 9))
    k = group_size * draw(st.integers(1, 3))
    n = draw(st.sampled_from([1, 3, 19]))
    lead = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    seed = draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(0, 2**bits, (*lead, k, n), dtype=np.uint8)
    return bits, group_size, codes


@settings(deadline=None, max_examples=30)
@given(packings())
def test_unpack_inverts_pack(packing):
    bits, group_size, codes = packing
    planes = pack(jnp.asarray(codes), bits=bits, group_size=group_size)
    back = unpack(planes, bits=bits, group_size=group_size)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, codes)


@settings(deadline=None, max_examples=15)
@given(packings())
def test_stored_bytes_are_exactly_the_bits(packing):
    bits, group_size, codes = packing
    planes = pack(jnp.asarray(codes), bits=bits, group_size=group_size)
    assert all(plane.dtype == jnp.uint8 for plane in planes)
    assert sum(plane.nbytes for plane in planes) * 8 == codes.size * bits
    assert [plane.shape[-2] * 8 for plane in planes] == [
        codes.shape[-2] * width for width in PLANES[bits]
    ]


@settings(deadline=None, max_examples=15)
@given(packings())
def test_every_bit_is_where_the_contract_says(packing):
    bits, group_size, codes = packing
    planes = pack(jnp.asarray(codes), bits=bits, group_size=group_size)
    rows = np.arange(codes.shape[-2])
    group, row = rows // group_size, rows % group_size
    base = 0
    for width, plane in zip(PLANES[bits], planes, strict=True):
        slab = group_size * width // 8
        carriers = np.asarray(plane)[..., group * slab + row % slab, :]
        fields = (carriers >> (width * (row // slab))[:, None]) & (2**width - 1)
        np.testing.assert_array_equal(fields, (codes >> base) & (2**width - 1))
        base += width


@pytest.mark.parametrize("bits", ALL_BITS)
def test_jit_and_scan_over_layers_agree(bits):
    rng = np.random.default_rng(bits)
    codes = jnp.asarray(rng.integers(0, 2**bits, (3, 48, 5), dtype=np.uint8))

    @jax.jit
    def per_layer(codes):
        def layer(_, one):
            return None, pack(one, bits=bits, group_size=24)

        return jax.lax.scan(layer, None, codes)[1]

    scanned = per_layer(codes)
    for one, other in zip(scanned, pack(codes, bits=bits, group_size=24), strict=True):
        np.testing.assert_array_equal(one, other)
    unpacked = jax.jit(lambda planes: unpack(planes, bits=bits, group_size=24))(scanned)
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_pack_drops_bits_above_the_code(bits):
    codes = jnp.arange(256, dtype=jnp.uint8).reshape(8, 32)
    planes = pack(codes, bits=bits, group_size=8)
    back = unpack(planes, bits=bits, group_size=8)
    np.testing.assert_array_equal(back, np.asarray(codes) & (2**bits - 1))


@pytest.mark.parametrize(
    ("shape", "dtype", "bits", "group_size", "message"),
    [
        ((32, 4), jnp.uint8, 7, 32, r"bits: expected one of \[2, 3, 4, 5, 8\], got 7"),
        ((32, 4), jnp.uint8, 4, 12, "group_size: expected a positive multiple of 8, got 12"),
        ((32, 4), jnp.uint8, 4, 0, "group_size: expected a positive multiple of 8, got 0"),
        ((32, 4), jnp.uint8, 4, -8, "group_size: expected a positive multiple of 8, got -8"),
        ((40, 4), jnp.uint8, 4, 32, "k: expected a positive multiple of group_size 32, got 40"),
        ((0, 4), jnp.uint8, 4, 32, "k: expected a positive multiple of group_size 32, got 0"),
        ((32, 4), jnp.int8, 4, 32, r"codes: expected uint8.*got int8\[32, 4\]"),
        ((32,), jnp.uint8, 4, 32, r"codes: expected uint8\[\.\.\., k, n\]"),
    ],
)
def test_pack_refuses(shape, dtype, bits, group_size, message):
    with pytest.raises(ValueError, match=message):
        pack(jnp.zeros(shape, dtype), bits=bits, group_size=group_size)


@pytest.mark.parametrize(
    ("planes", "bits", "group_size", "message"),
    [
        ([(16, 4)], 7, 32, "bits: expected one of"),
        ([(16, 4)], 4, 20, "group_size: expected a positive multiple of 8, got 20"),
        ([(16, 4)], 3, 32, r"planes: expected a tuple of 2 for bits=3 \(widths \(2, 1\)\), got 1"),
        ([(20, 4)], 4, 32, "k: expected a positive multiple of group_size 32, got 40"),
        ([(8, 4), (8, 4)], 3, 32, "planes: expected shapes .* keep the planes of one pack call"),
        ([(4,)], 4, 8, "planes: expected uint8"),
    ],
)
def test_unpack_refuses(planes, bits, group_size, message):
    carriers = tuple(jnp.zeros(shape, jnp.uint8) for shape in planes)
    with pytest.raises(ValueError, match=message):
        unpack(carriers, bits=bits, group_size=group_size)


def test_unpack_refuses_a_wrong_dtype():
    with pytest.raises(ValueError, match=r"planes: expected uint8.*got int32"):
        unpack((jnp.zeros((16, 4), jnp.int32),), bits=4, group_size=32)

"""The packing contract: nothing lost, nothing wasted, and every bit where the docstring says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.layout import PLANES, check_packing, pack, unpack

ALL_BITS = sorted(PLANES)


@st.composite
def packings(draw):
    bits = draw(st.sampled_from(ALL_BITS))
    k = 8 * draw(st.integers(1, 27))
    n = draw(st.sampled_from([1, 3, 19]))
    lead = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    seed = draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(0, 2**bits, (*lead, k, n), dtype=np.uint8)
    return bits, codes


@settings(deadline=None, max_examples=30)
@given(packings())
def test_unpack_inverts_pack(packing):
    bits, codes = packing
    planes = pack(jnp.asarray(codes), bits=bits)
    back = unpack(planes, bits=bits)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, codes)


@settings(deadline=None, max_examples=15)
@given(packings())
def test_stored_bytes_are_exactly_the_bits(packing):
    bits, codes = packing
    planes = pack(jnp.asarray(codes), bits=bits)
    assert all(plane.dtype == jnp.uint8 for plane in planes)
    assert sum(plane.nbytes for plane in planes) * 8 == codes.size * bits
    assert [plane.shape[-2] * 8 for plane in planes] == [
        codes.shape[-2] * width for width in PLANES[bits]
    ]


@settings(deadline=None, max_examples=15)
@given(packings())
def test_every_bit_is_where_the_contract_says(packing):
    bits, codes = packing
    planes = pack(jnp.asarray(codes), bits=bits)
    k = codes.shape[-2]
    row = np.arange(k)
    base = 0
    for width, plane in zip(PLANES[bits], planes, strict=True):
        slab = k * width // 8
        carriers = np.asarray(plane)[..., row % slab, :]
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
            return None, pack(one, bits=bits)

        return jax.lax.scan(layer, None, codes)[1]

    scanned = per_layer(codes)
    for one, other in zip(scanned, pack(codes, bits=bits), strict=True):
        np.testing.assert_array_equal(one, other)
    unpacked = jax.jit(lambda planes: unpack(planes, bits=bits))(scanned)
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_pack_drops_bits_above_the_code(bits):
    codes = jnp.arange(256, dtype=jnp.uint8).reshape(8, 32)
    planes = pack(codes, bits=bits)
    back = unpack(planes, bits=bits)
    np.testing.assert_array_equal(back, np.asarray(codes) & (2**bits - 1))


@pytest.mark.parametrize(
    ("shape", "dtype", "bits", "message"),
    [
        ((32, 4), jnp.uint8, 7, r"bits: expected one of \[2, 3, 4, 5, 8\], got 7"),
        ((20, 4), jnp.uint8, 4, "k: expected a positive multiple of 8, got 20"),
        ((0, 4), jnp.uint8, 4, "k: expected a positive multiple of 8, got 0"),
        ((32, 4), jnp.int8, 4, r"codes: expected uint8.*got int8\[32, 4\]"),
        ((32,), jnp.uint8, 4, r"codes: expected uint8\[\.\.\., k, n\]"),
    ],
)
def test_pack_refuses(shape, dtype, bits, message):
    with pytest.raises(ValueError, match=message):
        pack(jnp.zeros(shape, dtype), bits=bits)


@pytest.mark.parametrize(
    ("planes", "bits", "message"),
    [
        ([(16, 4)], 7, "bits: expected one of"),
        ([(18, 4)], 4, "k: expected a positive multiple of 8, got 36"),
        ([(16, 4)], 3, r"planes: expected a tuple of 2 for bits=3 \(widths \(2, 1\)\), got 1"),
        ([(8, 4), (8, 4)], 3, "planes: expected shapes .* keep the planes of one pack call"),
        ([(4,)], 4, "planes: expected uint8"),
    ],
)
def test_unpack_refuses(planes, bits, message):
    carriers = tuple(jnp.zeros(shape, jnp.uint8) for shape in planes)
    with pytest.raises(ValueError, match=message):
        unpack(carriers, bits=bits)


@pytest.mark.parametrize(
    ("k", "group_size", "message"),
    [
        (32, 12, "group_size: expected a positive multiple of 8, got 12"),
        (32, 0, "group_size: expected a positive multiple of 8, got 0"),
        (32, -8, "group_size: expected a positive multiple of 8, got -8"),
        (40, 32, "k: expected a multiple of group_size 32, got 40"),
    ],
)
def test_groups_must_divide_the_rows(k, group_size, message):
    with pytest.raises(ValueError, match=message):
        check_packing(bits=4, k=k, group_size=group_size)


def test_unpack_refuses_a_wrong_dtype():
    with pytest.raises(ValueError, match=r"planes: expected uint8.*got int32"):
        unpack((jnp.zeros((16, 4), jnp.int32),), bits=4)

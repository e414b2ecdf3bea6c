"""A weight in blocks has the codes and the products of the whole one, at every width."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import DEVICES

from pallas_kernels import Split, dequantize, pack, packed_matmul, quantize_pack, unpack
from pallas_kernels.sharded import BATCH

MESH = jax.make_mesh((2, 4), (BATCH, "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
ROWS, COLUMNS = Split(rows=("model",)), Split(columns=("model",))
KINDS = {
    2: ("coded4", "float"), 3: ("coded", "none"), 4: ("float", "float"), 5: ("coded", "float"),
    8: ("float", "integer"),
}  # fmt: skip
D_IN, D_OUT = 256, 32


def check(bits):
    """Against the operations run one by one on one device."""
    rng = np.random.default_rng(bits)
    w = jnp.asarray(rng.normal(size=(D_IN, D_OUT)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 8, D_IN)), jnp.float32)
    d, importance = (jnp.asarray(rng.uniform(0.5, 2, D_IN), jnp.float32) for _ in range(2))
    scales, zero_point = KINDS[bits]
    grouping = {"bits": bits, "group_size": 32}
    how = {"zero_point": zero_point, "scales": scales, "store_dtype": "bfloat16",
           "shrinks": (1.0, 0.8), **grouping}  # fmt: skip

    def packed(split, blocks):
        made = quantize_pack(w, d, importance, split=split, **how)
        return made, dequantize(*made, row_blocks=blocks, **grouping)

    with jax.disable_jit():
        (_, *grid), weight = packed(None, 1)
    want = x @ (weight / d[:, None])

    @jax.jit
    def shared():
        found = []
        for split, blocks in ((ROWS, 4), (COLUMNS, 1)):
            made, dense = packed(split, blocks)
            found.append((made[1:], dense, packed_matmul(x, *made, d, split=split, **grouping)))
        return found

    with jax.set_mesh(MESH):
        both = shared()
    for *codes, y in both:
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(codes),
                     jax.tree.leaves((grid, weight)))  # fmt: skip
        np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("bits", KINDS)
def test_codes_do_not_depend_on_the_split(bits):
    check(bits)


@pytest.mark.slow
def test_nor_do_they_as_users_compile_it():
    """With XLA's default flags, at every width, in a process of its own."""
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    program = "import test_sharded as t\nfor bits in t.KINDS: t.check(bits)\n"
    env = os.environ | {"PYTHONPATH": path, "XLA_FLAGS": DEVICES}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)


def test_blocks_of_rows_are_packed_by_themselves():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 8, (64, 16)), jnp.uint8)
    planes = pack(codes, bits=3, row_blocks=4)
    for i in range(4):
        own = [p.reshape(4, -1, 16)[i] for p in planes]
        np.testing.assert_array_equal(unpack(own, bits=3), codes[16 * i : 16 * i + 16])
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(unpack(planes, bits=3), codes)


def test_without_a_mesh_or_inside_of_one_a_weight_is_whole():
    assert ROWS.here() is None
    with jax.set_mesh(MESH):
        assert ROWS.here() == ROWS
        assert Split(rows=("other",)).here() == Split()
        inside = []
        run = lambda x: inside.append(ROWS.here()) or x  # noqa: E731
        spec = jax.sharding.PartitionSpec()
        jax.shard_map(run, in_specs=spec, out_specs=spec)(jnp.zeros(8))
        assert inside == [None]

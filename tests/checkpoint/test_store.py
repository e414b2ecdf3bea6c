"""Stores: what comes back is what was saved, bit for bit, on any sharding."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import QUICK
from jax.sharding import NamedSharding, PartitionSpec
from stores import (
    CASES,
    CHAT,
    CONFIG,
    DECODED,
    LATER,
    MIXTURE,
    MODEL,
    RTN,
    WINDOWS,
    decoded,
    made,
    offline_of,
    refused,
    same_bits,
)

from ttq_jax.checkpoint import store_files
from ttq_jax.checkpoint.store import (
    fingerprint,
    load_conversation,
    load_offline,
    save_conversation,
    save_offline,
)
from ttq_jax.offline.calibrate import calibrate, prepare
from ttq_jax.prefill import first_turn
from ttq_jax.quant.lowrank import LowRankRule
from ttq_jax.quant.presets import preset
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import LowRank, MixedLinear, Offline, QuantizedLinear, kernels

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES)
def test_what_is_restored_decodes_as_before(tmp_path, case):
    recipe, offline = CASES[case], offline_of(case)
    save_offline(tmp_path / "store", MODEL, recipe, offline)
    restored = load_offline(tmp_path / "store", MODEL, recipe)
    assert same_bits(restored, offline)
    if case in DECODED:
        assert decoded(recipe, restored)[0] == decoded(recipe, offline)[0]


def test_stores_from_before_there_were_sums_of_x_and_packed_tables_are_read(tmp_path):
    recipe, offline = CASES["gram"], offline_of("gram")
    save_offline(tmp_path / "store", MODEL, recipe, offline)
    path = tmp_path / "store" / "ttq.json"
    header = json.loads(path.read_text())
    for site in header["tree"]["fields"]["moments"]["dict"].values():
        assert site["fields"].pop("first") is None
    assert header["tree"]["fields"].pop("head") is None
    header["sha256"] = store_files._digest_of(header)
    path.write_text(json.dumps(header))
    assert same_bits(load_offline(tmp_path / "store", MODEL, recipe), offline)


EXPERTS = {
    # For those that a prompt does not reach there is a prior, whatever the recipe says.
    "prior for the unreached": preset("ttq", group_size=16, rank=2, select="layers/down"),
    "gptq, widths": dataclasses.replace(CASES["gptq"], widths=CASES["awq, widths"].widths),
    "prior from samples": CASES["prior from samples"],
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_are_restored(tmp_path, case):
    recipe, offline = EXPERTS[case], prepare(MIXTURE, EXPERTS[case], WINDOWS)
    assert offline.packed or offline.moments["mlp_out"].sums.shape[:2] == (2, 4)
    save_offline(tmp_path / "store", MIXTURE, recipe, offline)
    assert same_bits(load_offline(tmp_path / "store", MIXTURE, recipe), offline)


def test_the_cases_hold_every_kind_of_thing():
    trees = [offline_of(case) for case in CASES]
    assert {str(a.dtype) for a in jax.tree.leaves(trees)} >= {
        "bfloat16", "float32", "int8", "uint8", "int32"
    }  # fmt: skip
    packed = [k for t in trees if t.packed for k in kernels(t.packed["layers"]).values()]
    assert {type(k) for k in packed} > {QuantizedLinear, MixedLinear}
    assert any(t.moments and t.moments["attn_in"].gram is not None for t in trees)


def test_a_packed_tree_does_not_store_the_model_again(tmp_path):
    save_offline(tmp_path / "store", MODEL, RTN, offline_of("rtn"))
    header = json.loads((tmp_path / "store" / "ttq.json").read_text())
    assert header["recipe"]["grid"]["bits"] == 3
    packed = header["tree"]["fields"]["packed"]["dict"]
    assert set(packed) == {"q", "down"}
    assert packed["down"]["static"] == {"bits": 3, "group_size": 16, "d_in": 48, "d_out": 32}
    restored = load_offline(tmp_path / "store", MODEL, RTN).packed
    for name in ("embed", "final_norm"):
        for a, b in zip(
            jax.tree.leaves(restored[name]), jax.tree.leaves(MODEL.params[name]), strict=True
        ):
            assert a is b
    assert restored["layers"]["up"]["kernel"] is MODEL.params["layers"]["up"]["kernel"]


def test_a_conversation_goes_on_where_it_was(tmp_path):
    begin = offline_of("prior, int8 factors")
    _, moments = decoded(CHAT, begin)
    save_conversation(tmp_path / "chat", MODEL, CHAT, moments)
    restored = load_conversation(tmp_path / "chat", MODEL, CHAT)
    assert same_bits(restored, moments)
    second, after = decoded(CHAT, dataclasses.replace(begin, carried=moments), LATER)
    again, after_again = decoded(CHAT, dataclasses.replace(begin, carried=restored), LATER)
    assert again == second and same_bits(after, after_again)
    assert not same_bits(after, decoded(CHAT, begin, LATER)[1])


def test_moments_without_a_power_are_restored(tmp_path):
    recipe = CASES["gptq"]
    offline = Offline(moments=calibrate(MODEL, WINDOWS, recipe.reads))
    assert offline.moments["attn_in"].sums.shape == (2, 0, 32)
    save_offline(tmp_path / "store", MODEL, recipe, offline)
    assert same_bits(load_offline(tmp_path / "store", MODEL, recipe), offline)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "uint8"])
def test_every_bit_pattern_of_a_type_survives(tmp_path, dtype):
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(dtype)
    size = dtype.itemsize
    # Not a number, infinities, subnormals and minus zero are among 65536 random patterns.
    patterns = rng.integers(0, 256, (2, 32 * 32, 32, size), np.uint8)
    patterns[0, 0, 0] = 0
    patterns[0, 0, 0, -1] = 128
    a = jnp.asarray(patterns.view(dtype)[..., 0])
    assert np.asarray(a).tobytes() == patterns.tobytes()
    recipe = Recipe(low_rank=LowRankRule(rank=4))
    offline = Offline(low_rank={"q": LowRank(a, a[:, :3], down_scale=a[0, 0], up_scale=None)})
    save_offline(tmp_path / "store", MODEL, recipe, offline)
    assert same_bits(load_offline(tmp_path / "store", MODEL, recipe), offline)


def test_an_empty_store_is_a_store(tmp_path):
    save_offline(tmp_path / "store", MODEL, Recipe(), Offline())
    assert same_bits(load_offline(tmp_path / "store", MODEL, Recipe()), Offline())


def reshard(folder: Path) -> None:
    """One device to four and back; run where JAX sees four."""
    assert len(jax.devices()) == 4
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("x"))
    names = set()

    def columns(name, shape):
        names.add(name)
        if not shape or shape[-1] % 4:
            return whole
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "x"))

    spread = made(jax.device_put(MODEL.params, whole))
    in_parts = jax.tree.map(lambda a: jax.device_put(a, columns("", a.shape)), MODEL.params)
    assert fingerprint(spread) == fingerprint(made(in_parts)) == fingerprint(MODEL)
    offline = offline_of("rtn")
    save_offline(folder / "rtn", MODEL, RTN, offline)
    restored = load_offline(folder / "rtn", MODEL, RTN, sharding=columns)
    assert same_bits(restored, offline)
    assert decoded(RTN, restored)[0] == decoded(RTN, offline)[0]
    scales = restored.packed["layers"]["down"]["kernel"].scales
    assert len(scales.sharding.device_set) == 4 and scales.addressable_data(0).shape[-1] == 8
    everywhere = load_offline(folder / "rtn", spread, RTN, sharding=whole)
    assert same_bits(everywhere, offline)
    # Back: what was saved from four devices is restored on one.
    save_offline(folder / "back", spread, RTN, restored)
    single = load_offline(folder / "back", MODEL, RTN)
    assert same_bits(single, offline)
    assert all(a.devices() == {jax.devices()[0]} for a in jax.tree.leaves(single))
    # What has no sharding is not committed to its device: it goes with what has.
    column = single.packed["layers"]["down"]["kernel"].scales
    assert len((column + scales).sharding.device_set) == 4

    moments = jax.tree.map(
        lambda a: jax.random.normal(jax.random.key(1), a.shape),
        first_turn(MODEL.params, CONFIG, CHAT),
    )
    save_conversation(folder / "chat", MODEL, CHAT, moments)
    spread_out = load_conversation(folder / "chat", MODEL, CHAT, sharding=columns)
    assert same_bits(spread_out, moments)
    assert len(spread_out["mlp_out"].sums.sharding.device_set) == 4
    assert {"packed.q.planes.0", "packed.down.scales", "mlp_out.sums", "mlp_out.count"} <= names
    refused("could not be restored", load_offline, folder / "rtn", MODEL, RTN, sharding=split)


def test_restored_into_another_sharding(tmp_path):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(here.parent.parent)])
    environment = os.environ | {
        # Compiled as here, the same seed makes the same weights.
        "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count=4", "PYTHONPATH": path,
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    }  # fmt: skip
    program = (
        "from pathlib import Path; import test_store; "
        f"test_store.reshard(Path({str(tmp_path)!r})); print('resharded')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and done.stdout == "resharded\n", done.stderr
    # Here is one device; the store comes from four.
    back = load_offline(tmp_path / "back", MODEL, RTN)
    assert same_bits(back, offline_of("rtn"))
    leaves = jax.tree.leaves(back.packed["layers"]["q"])
    assert all(isinstance(a, jax.Array) and not a.committed for a in leaves)

"""What a model takes of a chip: by its compiler, and by sums that must agree with it."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from compilers import needs_compilers
from jax.experimental import topologies
from small import small_config

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.chips import plan as planning
from ttq_jax.chips.absent import CHIPS, QUIET, ChipError
from ttq_jax.chips.plan import chip_of, plan
from ttq_jax.chips.released import released_config
from ttq_jax.chips.share import exchange_seconds, slice_of
from ttq_jax.config import ConfigError
from ttq_jax.mesh import parse
from ttq_jax.quant.presets import preset

TTQ = preset("ttq", bits=4, group_size=128)
GIB = 2**30
LLAMA = released_config("llama-3-8b")
RESULTS = Path(__file__).parents[2] / "experiments" / "results"


@needs_compilers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "chip", "bits", "memory", "fits", "gib"),
    [
        ("llama-3-8b", "v5e", 4, "host", True, 5.92),
        ("llama-3-8b", "v5e", 4, "device", False, 18.62),
        ("gemma-3-27b", "v6e", 3, "host", True, 13.5),
    ],
)
def test_a_model_that_outgrows_a_chip_is_streamed(model, chip, bits, memory, fits, gib):
    how = {"recipe": preset("ttq", bits=bits, group_size=128), "dense_memory": memory}
    config = released_config(model)
    made = plan(config, chip, **how)
    assert (made.by, made.fits) == ("compiler", fits)
    assert made.total / GIB == pytest.approx(gib, rel=0.02)
    assert (made.device["dense"] == 0) == (memory == "host") == (made.host > 0)
    # Packed weights and cache, a layer of dense weights, activations, and nothing else.
    summed = plan(config, chip, **how, compiled=False)
    assert summed.by == "arithmetic"
    assert summed.fits == fits
    assert summed.total == pytest.approx(made.total, rel=0.03)


def test_sums_say_what_is_where():
    device, host = (
        plan(LLAMA, "v5e", TTQ, dense_memory=where, compiled=False) for where in ("device", "host")
    )
    blocks = 2 * 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert device.device["dense"] == host.host == blocks
    assert not device.fits
    assert host.fits
    assert device.total - host.total == blocks - blocks // 32, "of a stream one layer is there"
    assert host.device["cache"] == 2 * 2 * 32 * (512 + 128) * 8 * 128 + 5 * 640 + 4
    assert host.why == "as asked"
    assert host.first_token_seconds["read"] == pytest.approx(blocks / 16e9)
    assert host.token_seconds == device.token_seconds == host.bytes_per_token / 820e9


def test_without_a_recipe_every_token_fetches_the_blocks():
    host = plan(LLAMA, "l4", None, dense_memory="host", link=10e9, compiled=False)
    assert host.device["packed"] == 0
    assert host.token_seconds > host.host / 10e9
    assert host.token_seconds == pytest.approx(
        host.host / 10e9 + (host.bytes_per_token - host.host) / 300e9
    )


def test_prompts_are_padded_as_they_are_when_they_run():
    def cache(tokens):
        return plan(LLAMA, "v5e", TTQ, prompt_tokens=tokens, compiled=False).device["cache"]

    assert cache(257) == cache(512) > cache(256)


def test_a_chip_without_its_compiler_is_planned_by_arithmetic(monkeypatch):
    def missing(*_, **__):
        raise ChipError("compiling for v5e needs the TPU compiler: pip install libtpu")

    monkeypatch.setattr(planning, "compile_generate", missing)
    made = plan(LLAMA, "v5e", TTQ)
    assert made.by == "arithmetic"
    assert "pip install libtpu" in made.why
    monkeypatch.undo()
    # The compilers of absent GPUs drop memory kinds: nothing may be compiled that would lie.
    made = plan(LLAMA, "a100-40", TTQ, dense_memory="host")
    assert made.by == "arithmetic"
    assert made.fits


def test_what_the_compiler_refuses_for_another_reason_is_not_a_plan(monkeypatch):
    def broken(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(planning, "compile_generate", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        plan(LLAMA, "v5e", TTQ)


def test_a_device_of_a_mesh_has_its_share():
    one = plan(LLAMA, "v5e", TTQ, compiled=False)
    eight = plan(LLAMA, "v5e", TTQ, compiled=False, mesh={"data": 1, "model": 8})
    for kind in ("dense", "packed"):
        # Each device has all of D where it has some of the columns.
        assert eight.device[kind] * 8 == pytest.approx(one.device[kind], rel=3e-3), kind
    # Norms are whole everywhere, and so are the positions and the marks of the cache's slots.
    norms = 2 * 4096 * (2 * 32 + 1)
    assert eight.device["tables"] == (one.device["tables"] - norms) // 8 + norms
    assert eight.device["cache"] == (one.device["cache"] - 5 * 640 - 4) // 8 + 5 * 640 + 4
    assert eight.fits
    assert eight.token_seconds == eight.bytes_per_token / 820e9 < one.token_seconds / 7
    assert eight.first_token_seconds["multiply"] == one.first_token_seconds["multiply"] / 8
    assert eight.collectives == {"token's layer": ["bf16[1,1,4096] all-reduce"] * 2}
    assert eight.collectives_by == "arithmetic"
    # Two sums of 4096 bfloat16 numbers in each of 32 layers.
    assert eight.exchange_seconds == 32 * 2 * 4096 * 2 / 200e9
    assert one.exchange_seconds is None
    # gate, up and down are the largest: 32 layers of 4096 x 14336, of which one host has all.
    assert eight.per_host == {
        "hosts": 1, "devices": 8, "device_bytes": 8 * eight.total,
        "reading": 2 * 32 * 4096 * 14336,
    }  # fmt: skip
    # Four hosts of four chips; each reads a quarter.
    many = plan(LLAMA, "v5e", TTQ, compiled=False, mesh={"data": 1, "model": 16}).per_host
    assert (many["hosts"], many["devices"]) == (4, 4)
    assert many["reading"] == 2 * 32 * 4096 * 14336 // 4
    # Two groups of devices have a prompt each; one prompt they both read.
    dealt, whole = (
        plan(LLAMA, "v5e", TTQ, compiled=False, mesh={"data": 2, "model": 4}, batch=batch)
        for batch in (2, 1)
    )
    assert dealt.device == whole.device
    assert dealt.collectives == whole.collectives == eight.collectives
    # Devices with prompts of their own, and whole weights, exchange nothing for a token.
    apart = plan(LLAMA, "v5e", TTQ, compiled=False, mesh={"data": 2}, batch=2)
    assert apart.exchange_seconds == 0


@pytest.mark.parametrize(
    ("chip", "mesh", "why"),
    [
        ("v5e", {"model": 2}, "slices of 4, 8, 16, 32, 64, 128, 256 v5e, not for 2 v5e"),
        ("h100", {"model": 8}, "for slices of v5e, v5p, v6e, tpu7x, not for 8 h100"),
    ],
)
def test_a_mesh_that_no_compiler_knows_is_planned_by_arithmetic(chip, mesh, why):
    made = plan(LLAMA, chip, TTQ, mesh=mesh)
    assert made.by == made.collectives_by == "arithmetic"
    assert why in made.why


def test_the_sum_of_a_share_is_what_the_compiler_said():
    programs = json.loads((RESULTS / "compiled_slices.json").read_text())["programs"]
    for one in programs:
        made = plan(
            released_config(one["model"]), one["slice"].partition(":")[0], TTQ,
            mesh=parse(one["mesh"]), dense_memory=one["dense_memory"], compiled=False,
        )  # fmt: skip
        assert made.host / GIB == pytest.approx(one["host_gib"], rel=1e-3)
        assert made.total / GIB == pytest.approx(one["memory_gib"]["peak"], rel=0.03), one["slice"]
        assert made.collectives["token's layer"] == one["collectives"]["token's layer"]


@needs_compilers
@pytest.mark.slow
def test_a_slice_s_compiler_tells_what_a_device_takes_and_what_is_exchanged():
    shares = {"vocab_size": 104, "n_heads": 8, "n_kv_heads": 4, "head_dim": 32, "d_ff": 256}
    recipe, mesh = preset("ttq", group_size=32), {"data": 1, "model": 4}
    made = plan(small_config(**shares), "v5e", recipe, mesh=mesh)
    summed = plan(small_config(**shares), "v5e", recipe, mesh=mesh, compiled=False)
    assert made.by == made.collectives_by == "compiler"
    assert made.collectives["token's layer"] == summed.collectives["token's layer"]
    assert {"once", "token", "prompt's layer"} < made.collectives.keys()
    assert made.collectives["token"]
    assert made.exchange_seconds > summed.exchange_seconds
    kinds = ("dense", "packed", "tables", "cache")
    assert [made.device[kind] for kind in kinds] == [summed.device[kind] for kind in kinds]
    # Sums know nothing of a program's own buffers, which are most of so small a one.
    assert summed.total < made.total < 8 * 2**20


def test_a_mixture_s_experts_are_dealt_out_and_only_a_compiler_tells_what_is_exchanged():
    config = released_config("qwen3-30b-a3b")
    one, four = (plan(config, "v5e", TTQ, compiled=False, mesh=m) for m in (None, {"model": 4}))
    assert four.device["packed"] * 4 == pytest.approx(one.device["packed"], rel=0.01)
    assert four.collectives == {}
    assert four.exchange_seconds is None


def test_what_is_exchanged_takes_its_bytes_over_the_links():
    exchanged = {
        "token's layer": ["bf16[2,1,8] all-reduce", "u8[4,8] all-gather"],
        "token": ["(f32[8], s32[8]) all-reduce", "pred[] all-reduce"],
        "once": ["f32[1000] all-reduce"], "prompt's layer": ["f32[1000] all-reduce"],
    }  # fmt: skip
    # Of what is gathered, a device may have had half.
    assert exchange_seconds(exchanged, 3, 10.0) == (3 * (32 + 32 / 2) + 2 * 32 + 1) / 10
    assert exchange_seconds({"once": []}, 3, 10.0) is None
    assert all(chip.peers >= chip.link for chip in CHIPS.values())


@needs_compilers
def test_the_compiler_knows_the_slices_that_are_asked_for(monkeypatch):
    for key, value in QUIET.items():
        monkeypatch.setenv(key, value)
    for chip, devices in (("v5e", 16), ("v5p", 16), ("tpu7x", 8)):
        name = slice_of(chip, devices)
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
        assert len(found.devices) == devices, name


def test_a_group_may_not_lie_on_several_devices():
    with pytest.raises(ConfigError, match="14336 input channels of down, 448 each, and groups of"):
        plan(LLAMA, "v5e", TTQ, compiled=False, mesh={"model": 32})


def test_another_memory_is_refused():
    with pytest.raises(CheckpointError, match="expected device or host, got 'disk'"):
        plan(LLAMA, "v5e", TTQ, dense_memory="disk", compiled=False)


def test_each_device_of_a_mesh_fetches_its_own_part_from_the_host():
    how = {"mesh": {"data": 2, "model": 4}, "compiled": False, "link": 10e9}
    device, host = (plan(LLAMA, "v5e", TTQ, dense_memory=m, **how) for m in ("device", "host"))
    whole = plan(LLAMA, "v5e", TTQ, dense_memory="host", compiled=False)
    assert host.host * 4 == whole.host
    assert host.device == device.device | {
        "dense": 0, "temporaries": device.device["temporaries"] + host.host // LLAMA.n_layers,
    }  # fmt: skip
    assert host.first_token_seconds["read"] == host.host / 10e9
    assert host.token_seconds == device.token_seconds
    assert host.collectives == device.collectives


def test_a_smaller_model_of_a_chip_has_its_own_memory():
    base, chip = chip_of("a100-40")
    assert base == "a100"
    assert chip == dataclasses.replace(CHIPS["a100"], memory=40 * GIB, bandwidth=1555e9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "above 0, got 0, 512 and 128"),
        ({"link": -1.0}, "a link speed above 0"),
        ({"recipe": preset("awq")}, "a recipe that reads the prompt alone"),
        ({"recipe": preset("ttq", rank=4)}, "without static factors"),
        ({"mesh": {"data": 1, "model": 3}}, "4 heads, which 3 devices cannot share equally"),
        ({"mesh": {"data": 1, "model": 2}}, "97 tokens of the vocabulary, which 2 devices cannot"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, message):
    how = {"recipe": TTQ, "compiled": False} | changes
    with pytest.raises(ConfigError, match=message):
        plan(small_config(), "v5e", **how)

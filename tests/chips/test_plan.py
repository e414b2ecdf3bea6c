"""What a model takes of a chip: by its compiler, and by sums that must agree with it."""

import dataclasses

import jax
import pytest
from compilers import needs_compilers
from small import small_config

from ttq_jax.chips import plan as planning
from ttq_jax.chips.absent import CHIPS, ChipError
from ttq_jax.chips.plan import chip_of, plan
from ttq_jax.chips.released import released_config
from ttq_jax.config import ConfigError
from ttq_jax.quant.recipe import preset

TTQ = preset("ttq", bits=4, group_size=128)
GIB = 2**30
LLAMA = released_config("llama-3-8b")


@needs_compilers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "chip", "bits", "memory", "fits", "gib"),
    [
        ("llama-3-8b", "v5e", 4, "host", True, 5.92),
        ("llama-3-8b", "v5e", 4, "device", False, 18.62),
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
    ],
)
def test_what_cannot_be_planned_is_refused(changes, message):
    how = {"recipe": TTQ, "compiled": False} | changes
    with pytest.raises(ConfigError, match=message):
        plan(small_config(), "v5e", **how)

"""Whole programs, compiled for several TPUs that are not here."""

import pytest
from compilers import needs_compilers
from decode_loop import decode_loop, makers
from small import small_config

from ttq_jax.chips.absent import ChipError
from ttq_jax.chips.programs import memory_of
from ttq_jax.chips.released import params_shapes, released_config
from ttq_jax.chips.slices import collectives, compile_on_slice
from ttq_jax.config import ConfigError
from ttq_jax.quant.presets import preset
from ttq_jax.types import kernels, stored_bytes

pytestmark = needs_compilers
TTQ = preset("ttq", bits=4, group_size=128)


@pytest.mark.slow
def test_a_layer_sums_twice_and_nothing_is_gathered():
    compiled = compile_on_slice("llama-3-8b", "v5e:2x4", {"model": 8}, TTQ)
    text = compiled.as_text()
    said = collectives(text)
    assert said["token's layer"] == ["bf16[1,1,4096] all-reduce"] * 2
    wide = [one for one in said["prompt's layer"] if one != "f32[] all-reduce"]
    assert wide == ["bf16[1,512,4096] all-reduce"] * 2
    # Of the rest: the embedding's rows, and the choice of a token.
    everything = [one for found in said.values() for one in found]
    assert all(one.endswith(" all-reduce") for one in everything), everything

    # An eighth of a device's codes: q, k, v, o, gate, up and down, of which none is copied.
    own = [(2048, 512), (2048, 128), (256, 4096), (2048, 1792), (896, 4096)]
    codes = {f"u8[{lead}{k},{n}]" for k, n in own for lead in ("32,", "1,", "")}
    assert all(f"u8[32,{k},{n}]" in text for k, n in own)
    assert makers(decode_loop(text), codes) == []

    size = memory_of(compiled, "v5e")
    assert size["peak"] < size["chip"] / 5
    # 8.03 billion parameters of two bytes, among eight.
    assert size["arguments"] == pytest.approx(2 * 8.03e9 / 8 / 2**30, rel=0.01)


@pytest.mark.slow
def test_sixteen_chips_share_seventy_billion_weights():
    compiled = compile_on_slice("llama-3-70b", "v5e:4x4", {"model": 16}, TTQ)
    said = collectives(compiled.as_text())
    assert said["token's layer"] == ["bf16[1,1,8192] all-reduce"] * 2
    assert all(one.endswith(" all-reduce") for found in said.values() for one in found), said
    size = memory_of(compiled, "v5e")
    assert size["peak"] < 0.75 * size["chip"]


@pytest.mark.slow
def test_four_chips_fetch_their_parts_of_seventy_billion_weights_from_the_host():
    compiled = compile_on_slice("llama-3-70b", "v5e:2x2", {"model": 4}, TTQ, dense_memory="host")
    said = collectives(compiled.as_text())
    assert said["token's layer"] == ["bf16[1,1,8192] all-reduce"] * 2
    assert all(one.endswith(" all-reduce") for found in said.values() for one in found), said
    size = memory_of(compiled, "v5e")
    assert size["peak"] < 0.7 * size["chip"]
    # The tables of 128256 tokens, two bytes each, among four; the blocks are elsewhere.
    assert size["arguments"] == pytest.approx(2 * 2 * 128256 * 8192 / 4 / 2**30, rel=0.01)
    blocks = stored_bytes(kernels(params_shapes(released_config("llama-3-70b"))["layers"]))
    assert compiled.memory_analysis().host_argument_size_in_bytes == blocks / 4


def test_what_a_mesh_streams_is_exchanged_no_more_than_what_it_holds():
    # Each device's widths are whole tiles of 128: no part is padded in memory.
    sizes = {"vocab_size": 104, "n_heads": 8, "n_kv_heads": 8, "head_dim": 32, "d_ff": 256}
    config, recipe = small_config(**sizes), preset("ttq", group_size=32)
    compiled = compile_on_slice(
        config, "v5e:2x2", {"data": 2, "model": 2}, recipe, prompt_tokens=16, new_tokens=8,
        dense_memory="host",
    )  # fmt: skip
    said = collectives(compiled.as_text())
    assert said["token's layer"] == ["bf16[1,1,64] all-reduce"] * 2
    assert all(one.endswith(" all-reduce") for found in said.values() for one in found), said
    # Both groups of devices have a copy of the blocks.
    blocks = stored_bytes(kernels(params_shapes(config)["layers"]))
    memory = compiled.memory_analysis()
    assert memory.host_argument_size_in_bytes == blocks / 2
    assert memory.host_temp_size_in_bytes == 0


def test_a_slice_that_is_none_is_refused():
    with pytest.raises(ChipError, match="expected a TPU and a shape, such as v5e:2x4, got 'h100'"):
        compile_on_slice("llama-3-8b", "h100", {"model": 8}, TTQ)
    with pytest.raises(ConfigError, match="take 16 devices, and there are 4"):
        compile_on_slice("llama-3-8b", "v5e:2x2", {"model": 16}, TTQ)


def test_gathers_are_seen_wherever_they_are():
    text = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %x = f32[8]{0} add(%a, %b)
}
%layer (p: f32[8]) -> f32[8] {
  %y = f32[8]{0} all-gather-start(%p), replica_groups={{0,1}}
}
%token (p: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(%p), condition=%c, body=%layer
  %z = s32[2]{0} all-reduce(%w), to_apply=%sum
}
%prompt (p: f32[8]) -> f32[8] {
  %v = f32[4]{0:T(4)} collective-permute(%p)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %a = f32[8]{0} while(%p), condition=%c, body=%prompt
  %b = f32[8]{0} while(%a), condition=%c, body=%token
  ROOT %d = f32[1]{0} all-to-all(%b)
}
"""
    assert collectives(text) == {
        "once": ["f32[1] all-to-all"], "token": ["s32[2] all-reduce"],
        "token's layer": ["f32[8] all-gather"], "prompt's layer": ["f32[4] collective-permute"],
    }  # fmt: skip

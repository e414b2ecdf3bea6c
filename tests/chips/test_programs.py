"""Whole programs at full size, compiled for chips that are not here, and what is in them."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from compilers import needs_compilers
from decode_loop import decode_loop, makers
from marks import slow_but
from small import small_config

from pallas_kernels import xla
from ttq_jax.chips.absent import CHIPS, ChipError, compile_for, tracing_for
from ttq_jax.chips.programs import compile_generate, memory_of, streamed
from ttq_jax.chips.released import params_shapes, released_config
from ttq_jax.draft_costs import LENGTHS
from ttq_jax.generate import generate_tokens
from ttq_jax.offline.prior import for_unreached
from ttq_jax.prefill import decoded_shapes
from ttq_jax.quant.head import pack_head
from ttq_jax.quant.presets import preset
from ttq_jax.sampling import Sampling
from ttq_jax.stages import go_on, start
from ttq_jax.types import Offline, Prompts, kernels, stored_bytes

pytestmark = needs_compilers
SHORT = {"uint8": "u8", "bfloat16": "bf16"}


def calls(text):
    """Kernels by name: how many custom calls of each there are."""
    names = {"packed_matmul": 0, "prefill_quantize": 0, "quantize_pack": 0}
    for line in text.splitlines():
        found = re.search(r' custom-call\(.*op_name="[^"]*/(\w+?)(_\dbit)?/pallas_call"', line)
        if found:
            names[found[1]] += 1
    return names


def packed_tree(config, recipe):
    """Shapes of the packed kernels, by projection."""
    tree = decoded_shapes(params_shapes(config), config, recipe, Offline())
    return kernels(tree["layers"])


def types_of(array):
    """HLO types of a stacked array and of one layer of it."""
    short, (depth, *shape) = SHORT[str(array.dtype)], array.shape
    tail = ",".join(map(str, shape))
    return {f"{short}[{lead}{tail}]" for lead in (f"{depth},", "1,", "")}


@pytest.mark.parametrize(
    ("model", "chip", "group_size"),
    [
        pytest.param("llama-3-8b", "v6e", 128, marks=pytest.mark.slow),
        ("llama-3-8b", "h100", 32),
    ],
)
def test_reading_quantizing_and_decoding_are_one_program_that_fits(model, chip, group_size):
    recipe = preset("ttq", bits=4, group_size=group_size)
    compiled = compile_generate(model, chip, recipe)
    config = released_config(model)
    assert len(compiled.runtime_executable().hlo_modules()) == 1
    text = compiled.as_text()
    assert not re.search(r"\b(infeed|outfeed|send|recv)\(|callback", text)

    # A block's seven projections, once in the prompt's layer scan and once in the decode loop's.
    made = calls(text)
    assert made["prefill_quantize"] == 7
    assert made["packed_matmul"] == 7
    assert made["quantize_pack"] == 0
    loop = decode_loop(text)
    assert calls("\n".join(loop)) == made | {"prefill_quantize": 0}

    packed = packed_tree(config, recipe)
    codes, rest = set(), set()
    for kernel in packed.values():
        codes |= set().union(*map(types_of, kernel.planes))
        rest |= types_of(kernel.scales) | types_of(kernel.zeros)
    assert makers(loop, codes) == [], "the decode loop copies packed codes"
    assert makers(loop, rest) == [], "the decode loop copies scales or zero points"
    dense = kernels(params_shapes(config)["layers"]).values()
    whole = set().union(*map(types_of, dense))
    assert makers(text.splitlines(), whole) == [], "a dense weight is copied on its way to a kernel"

    size = memory_of(compiled, chip)
    assert size["peak"] < size["chip"]
    # Beside the dense weights there is the packed copy, and little else: cache, activations.
    gib = stored_bytes(packed) / 2**30
    assert gib < size["temporaries"] < 1.25 * gib
    count = sum(math.prod(a.shape) for a in jax.tree.leaves(params_shapes(config)))
    assert size["arguments"] == pytest.approx(2 * count / 2**30, rel=0.01)


def test_the_check_sees_a_copied_layer():
    """A loop that slices its packed weights out of a stack, as a plain scan over them would."""

    def generate(planes):
        def layer(x, plane):
            return x + jnp.sum(plane.astype(jnp.float32) ** x), None

        def token(state):
            held = jax.lax.optimization_barrier(planes)
            return state[0] + 1, jax.lax.scan(layer, state[1], held)[0]

        return jax.lax.while_loop(lambda s: s[0] < 9, token, (0, jnp.float32(0)))

    stack = jax.ShapeDtypeStruct((7, 256, 128), jnp.uint8)
    loop = decode_loop(compile_for("v5e", generate, stack).as_text())
    assert makers(loop, types_of(stack))


WIDTHS = {
    "d_model": 256, "embed_dim": 256, "n_heads": 2, "n_kv_heads": 1, "head_dim": 128, "d_ff": 512,
}  # fmt: skip


@pytest.mark.slow
def test_drafts_add_the_unquantized_tables_to_a_program_s_arguments():
    config = small_config(**WIDTHS, vocab_size=4096)
    plain, drafting = (
        memory_of(compile_generate(
            config, "v5e", preset("fast", group_size=128), prompt_tokens=128, new_tokens=8,
            drafts=drafts,
        ), "v5e")
        for drafts in (0, 2)
    )  # fmt: skip
    table = params_shapes(config)["embed"]["embedding"]
    added = drafting["arguments"] - plain["arguments"]
    assert added == pytest.approx(2 * math.prod(table.shape) / 2**30, abs=0.0011)


def compile_small(chip, dtype, recipe, drafts=0, on_host=None, **changes):
    """`generate_tokens` of a small model whose widths the kernels serve."""
    config = small_config(**WIDTHS, **changes)
    params = params_shapes(config, dtype)
    unreached = partial(for_unreached, config=config, reads=recipe.reads)
    offline = Offline(moments=jax.eval_shape(unreached, params, {}))
    if recipe.head is not None:
        with tracing_for(chip):
            params |= jax.eval_shape(partial(pack_head, bits=recipe.head), params)
    shape = jax.ShapeDtypeStruct
    prompts = Prompts(shape((2, 32), jnp.int32), shape((2, 32), jnp.bool_))
    return compile_for(
        chip, generate_tokens, params, prompts, offline,
        jax.eval_shape(lambda: jax.random.key(0)), shape((), jnp.int32), config=config,
        recipe=recipe, sampling=Sampling(), capacity=4, eos_ids=(0,), drafts=drafts,
        on_host=on_host,
    )  # fmt: skip


@pytest.fixture
def no_fallback(monkeypatch):
    """Plain XLA's implementations raise."""

    class FellBackError(Exception):
        pass

    def refuse(*_, **__):
        raise FellBackError

    for name in ("packed_matmul", "dense_matmul", "quantize_pack", "prefill_quantize"):
        assert callable(getattr(xla, name))
        monkeypatch.setattr(xla, name, refuse)
    return FellBackError


PROJECTED = [("v5e", 4, "full"), ("v5e", 3, "quantized"), ("h100", 4, "full")]


@pytest.mark.parametrize(("chip", "bits", "prefill"), slow_but(PROJECTED, PROJECTED[:1]))
def test_every_projection_runs_on_a_kernel(chip, bits, prefill, no_fallback):
    recipe = preset("ttq", bits=bits, group_size=32, prefill=prefill)
    made = calls(compile_small(chip, "bfloat16", recipe).as_text())
    assert made["packed_matmul"] == 7
    assert made["prefill_quantize"] == 7


def test_drafting_and_verifying_copy_no_packed_weight():
    """Nor does a row's own slot in the cache cost a copy of it."""
    recipe = preset("ttq", bits=4, group_size=32)
    text = compile_small("v5e", "bfloat16", recipe, drafts=4).as_text()
    made, loop = calls(text), decode_loop(text)
    assert made == {"packed_matmul": 7, "prefill_quantize": 7, "quantize_pack": 0}
    assert calls("\n".join(loop)) == made | {"prefill_quantize": 0}
    for kernel in packed_tree(small_config(**WIDTHS), recipe).values():
        for array in (*kernel.planes, kernel.scales, kernel.zeros):
            assert makers(loop, types_of(array)) == []


@pytest.mark.slow
def test_chosen_numbers_of_drafts_copy_no_packed_weight_and_no_cache():
    recipe, config = preset("ttq", bits=4, group_size=32), small_config(**WIDTHS)
    params, shape = params_shapes(config, "bfloat16"), jax.ShapeDtypeStruct
    prompts = Prompts(shape((2, 32), jnp.int32), shape((2, 32), jnp.bool_))
    key = jax.eval_shape(lambda: jax.random.key(0))
    how = {"config": config, "recipe": recipe, "sampling": Sampling(), "eos_ids": (0,),
           "drafts": LENGTHS}  # fmt: skip
    with tracing_for("v5e"):
        read = partial(start, capacity=32, **how)
        begun, state = jax.eval_shape(read, params, prompts, Offline(), key)
    limit, costs = shape((), jnp.int32), shape((len(LENGTHS),), jnp.float32)
    text = compile_for("v5e", go_on, params, Offline(), begun, state, limit, costs, **how).as_text()
    assert calls(text)["packed_matmul"] == 7
    loop = decode_loop(text)
    for kernel in packed_tree(config, recipe).values():
        for array in (*kernel.planes, kernel.scales, kernel.zeros):
            assert makers(loop, types_of(array)) == []
    cache = f"bf16[{','.join(map(str, state.cache.k.shape))}]"
    assert not [line for line in text.splitlines() if f"= {cache}" in line and " copy(" in line]


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_every_expert_runs_on_a_kernel(chip, no_fallback):
    """And compiles: on a TPU a kernel must not be fused with the stack of a loop over experts."""
    recipe, experts = preset("fast"), {"n_experts": 4, "experts_per_token": 2, "vocab_size": 256}
    made = calls(compile_small(chip, "bfloat16", recipe, **experts).as_text())
    # With the head, of the prompt's last token and of each further one.
    assert made == {"packed_matmul": 9, "prefill_quantize": 4, "quantize_pack": 3}


def test_experts_and_a_refresh_are_streamed_from_the_host():
    """Fetches inside loops over experts, and inside a branch of the decode loop."""
    recipe = preset("ttq", bits=4, group_size=32)
    recipe = dataclasses.replace(recipe, moments=dataclasses.replace(recipe.source, refresh=2))
    experts = {"n_experts": 4, "experts_per_token": 2, "vocab_size": 256}
    said = compile_small("v5e", "bfloat16", recipe, on_host=streamed, **experts).memory_analysis()
    params = params_shapes(small_config(**WIDTHS, **experts))
    blocks = stored_bytes(kernels(params["layers"]))
    assert said.host_argument_size_in_bytes == blocks
    assert said.host_temp_size_in_bytes == 0
    assert said.argument_size_in_bytes < 1.5 * (stored_bytes(params) - blocks)


def test_the_host_of_an_absent_gpu_is_refused():
    recipe = preset("ttq", bits=4, group_size=32)
    with pytest.raises(ChipError, match="of an absent GPU does not know memory kinds"):
        compile_small("h100", "bfloat16", recipe, on_host=streamed)


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_the_check_sees_a_fallback(chip, no_fallback):
    # A group of 8 is too short for the kernels of both.
    with pytest.raises(no_fallback):
        compile_small(chip, "bfloat16", preset("ttq", bits=4, group_size=8), vocab_size=98)


def test_programs_of_chips_without_a_kernel_compile_too():
    t4 = compile_small("t4", "float16", preset("ttq", bits=4, group_size=32), vocab_size=99)
    assert calls(t4.as_text()) == {"packed_matmul": 0, "prefill_quantize": 0, "quantize_pack": 0}


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_memory_figures_are_the_programs(chip):
    a = jax.ShapeDtypeStruct((8192, 8192), jnp.float32)
    size = memory_of(compile_for(chip, lambda a: a @ a, a), chip)
    assert size["arguments"] == size["outputs"] == 4 * 8192**2 / 2**30
    parts = sum(size[name] for name in ("arguments", "temporaries", "outputs", "code"))
    assert size["peak"] == pytest.approx(parts, abs=0.002)
    assert size["chip"] == CHIPS[chip].memory / 2**30

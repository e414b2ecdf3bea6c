"""`ttq kernels`: who serves which projection; it tells what a traced program then does."""

import functools

import jax
import jax.numpy as jnp
import pytest
from compilers import needs_compilers

from pallas_kernels import Target, dispatch
from pallas_kernels.gpu import triton
from ttq_jax.chips.absent import tracing_for
from ttq_jax.chips.released import RELEASED, params_shapes, released_config
from ttq_jax.commands.chip_options import COMPILED
from ttq_jax.commands.kernels import listing, target_of
from ttq_jax.generate import generate_tokens
from ttq_jax.offline.prior import for_unreached
from ttq_jax.quant.head import pack_head
from ttq_jax.quant.presets import preset
from ttq_jax.sampling import Sampling
from ttq_jax.types import Offline, Prompts

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow

SERVES = {"t4": "xla", "cpu": "xla"} | {
    c: "triton" if c in {"a100", "l4", "h100"} else "tpu" for c in COMPILED if c != "t4"
}


@pytest.mark.parametrize("chip", [*COMPILED, "cpu"])
def test_each_chip(cli_json, chip):
    dtype = "float16" if chip == "t4" else "bfloat16"
    # The default's clip search needs more fast memory for `down` than a v4 has.
    (found,) = cli_json(
        "kernels", "--model", "llama-3-8b", "--chip", chip, "--dtype", dtype, "--recipe", "ttq"
    )
    assert (found["model"], found["chip"], found["dtype"]) == ("llama-3-8b", chip, dtype)
    assert found["recipe"]["grid"]["bits"] == 4
    rows = found["kernels"]
    assert [r["projection"] for r in rows[::2]] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert {r["kernel"] for r in rows[::2]} == {"prefill_quantize"}
    assert {r["kernel"] for r in rows[1::2]} == {"packed_matmul"}
    assert {(r["m"], r["k"], r["n"]) for r in rows if r["projection"] == "down"} == {
        (512, 14336, 4096), (1, 14336, 4096),
    }  # fmt: skip
    assert {r["implementation"] for r in rows} == {SERVES[chip]}
    assert {r["fallback"] for r in rows} == {chip == "t4"}
    assert all(r["reason"] for r in rows)


def test_text_marks_a_fallback_and_says_why(cli):
    # Gemma's 1152 channels are no whole registers of 3-bit codes.
    code, out, err = cli("kernels", "--model", "gemma-3-1b", "--chip", "v5e", "--bits", 3,
                         "--no-compilation-cache")  # fmt: skip
    assert (code, err) == (0, "")
    title, _, head, *rows, _, attention = out.splitlines()
    assert attention == (
        "attention to prompts of 512 tokens: xla (512 tokens; from 1024 on it is faster)"
    )
    assert title == "gemma-3-1b on v5e, bfloat16 activations"
    assert head.split() == ["projection", "kernel", "bits", "rows", "shape", "why"]
    assert len(rows) == 16
    assert [row.split()[:2] for row in rows[14:]] == [
        ["head", "quantize_pack"], ["head", "packed_matmul"],
    ]  # fmt: skip
    fallen = [row for row in rows if "xla (fallback)" in row]
    assert fallen
    assert all("packed_matmul" in row and "tpu: " in row for row in fallen)
    assert any("1152x6912" in row and "3-bit" in row for row in fallen)
    assert all(" tpu " in row for row in rows if row not in fallen)


def test_one_line_tells_that_jax_will_remove_the_triton_backend(cli, monkeypatch):
    model = ("kernels", "--model", "qwen3-0.6b", "--recipe", "ttq", "--no-compilation-cache")
    for notice, ending in ((None, []), ("It will go.", ["", "It will go."])):
        monkeypatch.setattr(triton, "NOTICE", notice)
        code, out, err = cli(*model, "--chip", "a100")
        assert (code, err) == (0, "")
        rows, rest = out.splitlines()[3:17], out.splitlines()[19:]
        assert all(" triton " in row for row in rows)
        assert rest == ending
    assert "It will go." not in cli(*model, "--chip", "v5e")[1]
    monkeypatch.setattr(triton, "plgpu", None)
    gone = cli(*model, "--chip", "a100")[1]
    assert gone.count("xla (fallback)") == gone.count("has no Pallas Triton backend") == 14
    assert "It will go." not in gone


@pytest.mark.parametrize(
    ("model", "options", "attends", "why"),
    [
        ("qwen3-0.6b", (), "triton", "the kernel for a100"),
        ("qwen3-0.6b", ("--dtype", "float32"), "xla", "float32 products"),
        ("gemma-3-1b", (), "xla", "heads of 256"),
        ("qwen3-0.6b", ("--mesh", "model=4"), "triton", "4 query heads on each device"),
    ],
)
def test_it_says_what_attends_to_a_prompt_on_a_gpu(cli_json, model, options, attends, why):
    (found,) = cli_json(
        "kernels", "--model", model, "--chip", "a100", "--prompt-tokens", 2048, *options
    )
    assert found["attention"]["implementation"] == attends
    assert why in found["attention"]["reason"]


def test_recipes_change_who_is_asked(cli_json):
    model = ("kernels", "--model", "qwen3-0.6b", "--chip", "v5e")
    (ahead,) = cli_json(*model, "--method", "rtn", "--select", "layers/(q|down)")
    assert [(r["projection"], r["kernel"], r["m"]) for r in ahead["kernels"]] == [
        ("q", "quantize_pack", 0), ("q", "packed_matmul", 1),
        ("down", "quantize_pack", 0), ("down", "packed_matmul", 1),
    ]  # fmt: skip
    (batch,) = cli_json(*model, "--batch-size", 3, "--prompt-tokens", 64)
    assert {(r["kernel"], r["m"]) for r in batch["kernels"]} == {
        ("prefill_quantize", 192), ("packed_matmul", 3), ("quantize_pack", 0),
    }  # fmt: skip
    assert batch["kernels"][-1]["n"] == 151936


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_a_search_with_refits_has_the_kernels(cli_json, chip):
    options = ["--model", "qwen3-0.6b", "--chip", chip, "--set", "rounding.refits=2"]
    (found,) = cli_json("kernels", *options)
    rows = [r for r in found["kernels"] if r["kernel"] == "prefill_quantize"]
    assert rows
    for row in rows:
        kernel = {"v5e": "tpu", "h100": "triton"}[chip]
        assert (row["implementation"], row["fallback"]) == (kernel, False)
        assert row["reason"] == f"the kernel for {chip}"


def test_a_model_on_disk_here(cli_json, tiny):
    (found,) = cli_json("kernels", "--model", tiny, "--dtype", "float32")
    assert found["chip"] == "cpu"
    assert {r["implementation"] for r in found["kernels"]} == {"xla"}
    assert not any(r["fallback"] for r in found["kernels"])


def test_a_model_on_disk_for_activations_of_any_type(cli_json, tiny):
    (found,) = cli_json("kernels", "--model", tiny, "--dtype", "float16", "--chip", "v5e")
    products = [r for r in found["kernels"] if r["kernel"] == "packed_matmul"]
    assert all(r["fallback"] and "float16" in r["reason"] for r in products)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--chip", "v5e"], ["--model"]),
        (["--model", "qwen3-1.7b", "--chip", "v9"], ["v9", "v5e", "h100"]),
        (["--model", "qwen3-1.7b", "--dtype", "int8"], ["int8", "bfloat16"]),
        (["--model", "qwen3-1.7b", "--method", "none"], ["none", "no kernel"]),
        (["--model", "qwen3-1.7b", "--bits", "6"], ["2, 3, 4, 5, 8", "6"]),
        (["--model", "qwen3-1.7b", "--group-size", "12"], ["multiple of 8", "12"]),
        (["--model", "qwen3-1.7b", "--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["--model", "qwen3-1.7b", "--prompt-tokens", "0"], ["--prompt-tokens", "at least 1"]),
        (["--model", "qwen3-1.7b", "--select", "head"], ["expected a match", "layers/q"]),
        (["--model", "/no/such/model", "--chip", "v5e"], ["/no/such/model"]),
        (["--model", "qwen3-1.7b", "--ignore-key", "x"], ["--ignore-key", "without its files"]),
    ],
)
def test_what_cannot_be_listed_is_one_line(cli, options, parts):
    code, out, err = cli("kernels", "--no-compilation-cache", *options)
    lines = [line for line in err.splitlines() if "error" in line]
    assert (code, out, len(lines)) == (2, "", 1), err
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.mark.parametrize("model", RELEASED)
def test_released_sizes_are_listed_without_their_weights(model):
    rows = listing(
        released_config(model), preset("ttq"), Target(platform="tpu", chip="v5e"), batch=1,
        prompt_tokens=512, dtype="bfloat16",
    )  # fmt: skip
    assert len(rows) == 2 * (6 if model == "opt-6.7b" else 7)


LISTED = [
    ("gemma-3-1b", {"bits": 3, "group_size": 96}),
    ("gemma-3-1b", {"batch": "per_prompt", "group_size": 128}),
    ("gemma-3-1b", {"head": 8, "select": "layers/q"}),
    ("olmoe-1b-7b", {}),
]  # fmt: skip


@needs_compilers
@pytest.mark.parametrize("chip", ["v5e", "h100", "t4"])
@pytest.mark.parametrize(("model", "options"), LISTED)
def test_the_list_is_what_a_traced_program_chooses(chip, model, options, monkeypatch):
    recipe = preset("ttq", **options)
    dtype = "float16" if chip == "t4" else "bfloat16"
    config = released_config(model)
    params = params_shapes(config, dtype)
    unreached = functools.partial(for_unreached, config=config, reads=recipe.reads)
    offline = Offline(moments=jax.eval_shape(unreached, params, {}))
    traced = set()
    real = dispatch.choose

    def choose(problem, target, implementation=None):
        made = real(problem, target, implementation)
        traced.add((problem.kernel, problem.m, problem.k, problem.n, made))
        return made

    monkeypatch.setattr(dispatch, "choose", choose)
    shape = jax.ShapeDtypeStruct
    prompts = Prompts(shape((2, 64), jnp.int32), shape((2, 64), jnp.bool_))
    with tracing_for(chip):
        if recipe.head:
            params |= jax.eval_shape(functools.partial(pack_head, bits=recipe.head), params)
        generate_tokens.trace(
            params, prompts, offline,
            jax.eval_shape(lambda: jax.random.key(0)), shape((), jnp.int32), config=config,
            recipe=recipe, sampling=Sampling(), capacity=5, eos_ids=(1,),
        )  # fmt: skip
    rows = listing(config, recipe, target_of(chip), batch=2, prompt_tokens=64, dtype=dtype)
    listed = {
        (r["kernel"], r["m"], r["k"], r["n"], r["implementation"], r["reason"], r["fallback"])
        for r in rows
    }
    assert listed == {
        (*at, made.implementation, made.reason, made.fallback) for *at, made in traced
    }

import json
import re

import pytest
from stores import MIXTURE

from ttq_jax.quant.names import DEFAULT, METHODS
from ttq_jax.quant.presets import PRESETS

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow

HEAD = {"model", "dtype", "method", "recipe", "device", "versions", "effective_bits"}


def test_methods_on_offer_are_the_presets():
    assert list(METHODS) == list(PRESETS)


def test_the_default_is_a_preset():
    assert DEFAULT in PRESETS


@pytest.mark.parametrize("method", METHODS)
def test_json_of_every_method(cli_json, tiny, text_file, method):
    recipe = PRESETS[method].recipe
    calibration = ["--calibration", text_file, "--calibration-tokens", 128]
    needed = recipe is not None and recipe.source.reads_corpus
    # One projection: what else is compiled is the same for all of them.
    options = ["--model", tiny, "--method", method]
    options += ["--bits", 3, "--select", "layers/down"] if method != "none" else []
    (got,) = cli_json(
        "generate", *options, "--prompt", "Hello there", "--max-new-tokens", 5,
        *(calibration if needed else []),
    )  # fmt: skip
    (told,) = cli_json("inspect", *options)
    assert got["effective_bits"] == told["effective_bits"]
    assert set(got) >= HEAD | {"text", "prompt_tokens", "new_tokens", "sampling", "stopped"}
    assert got["timings"] is None
    assert got["stopped"] == ("end" if got["new_tokens"] < 5 else "limit")
    assert set(got["versions"]) >= {"ttq_jax", "jax", "jaxlib", "flax", "python"}
    assert (got["model"], got["method"]) == (tiny, method)
    assert got["prompt_tokens"] == len("Hello there") + 1
    assert got["new_tokens"] <= 5
    if method == "none":
        assert got["recipe"] is None
        assert got["effective_bits"] == 32
    else:
        assert got["recipe"]["grid"]["bits"] == 3
        (down,) = (g for g in told["groups"] if g["path"] == "layers/down/kernel")
        assert 3 < down["bits"] < 8


def test_the_share_of_experts_without_a_token_is_told(cli, cli_json, monkeypatch):
    monkeypatch.setattr("ttq_jax.commands.generate.load_model", lambda *_, **how: (MIXTURE, None))
    options = ["--model", "mixture", "--prompt", "x", "--max-new-tokens", 1]
    options += ["--select", "layers/down", "--group-size", 16]
    (got,) = cli_json("generate", *options)
    # One token reaches two of four experts in each layer.
    assert got["unreached_experts"] == 0.5
    _, _, err = cli("generate", "--no-compilation-cache", *options)
    assert "50% of the experts got no token of the prompt and were quantized by the prior" in err
    (got,) = cli_json("generate", *options, "--method", "rtn")
    assert "unreached_experts" not in got


def test_options_reach_the_recipe(cli_json, tiny):
    (got,) = cli_json(
        "generate", "--model", tiny, "--prompt", "x", "--max-new-tokens", 1, "--bits", 5,
        "--group-size", 16, "--rank", 2, "--symmetric", "--clip", "--alpha", 0.75, "--lam", 0.1,
        "--p", 1, "--prefill", "quantized", "--select", "layers/(q|k)", "--store-dtype",
        "float32", "--zero-point", "float", "--scales", "coded", "--head", 4,
    )  # fmt: skip
    recipe = got["recipe"]
    assert recipe["grid"] == {
        "bits": 5, "group_size": 16, "symmetric": True, "zero_point": "float",
        "store_dtype": "float32", "scales": "coded",
    }  # fmt: skip
    assert recipe["head"] == 4
    assert recipe["scale"] == {"rule": "power_law", "alpha": 0.75, "lam": 0.1, "p": 1.0}
    assert recipe["rounding"]["rule"] == "clip"
    assert recipe["low_rank"]["rank"] == 2
    assert (recipe["prefill"], recipe["select"]) == ("quantized", "layers/(q|k)")


def test_a_line_per_prompt_in_order(cli_json, tiny, tmp_path):
    prompts = ["first", "zweite Zeile: größer", "三", "  spaces kept  "]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n", "utf-8")
    common = ["--model", tiny, "--max-new-tokens", 4]
    got = cli_json("generate", *common, "--prompts-file", path)
    assert [g["prompt"] for g in got] == prompts
    assert got[2]["prompt_tokens"] == 1 + len("三".encode())
    for one in got:
        (alone,) = cli_json("generate", *common, "--prompt", one["prompt"])
        assert alone["text"] == one["text"]
    batch = cli_json("generate", *common, "--prompts-file", path, "--batch-size", 3, "--per-prompt")
    assert [g["text"] for g in batch] == [g["text"] for g in got]
    assert [g["batch_size"] for g in batch] == [3, 3, 3, 1]


def test_prompts_from_standard_input(cli_json, tiny, monkeypatch):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("größe\nb\n".encode())))
    got = cli_json("generate", "--model", tiny, "--max-new-tokens", 2, "--prompts-file", "-")
    assert [g["prompt"] for g in got] == ["größe", "b"]


def test_prompts_from_a_pipe(cli_json, tiny, tmp_path):
    import os
    import threading

    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("a\nb\n",))
    writer.start()
    got = cli_json(
        "generate", "--model", tiny, "--max-new-tokens", 2, "--prompts-file", tmp_path / "pipe"
    )
    writer.join()
    assert [g["prompt"] for g in got] == ["a", "b"]


def test_prompt_of_one_token(cli_json, tmp_path):
    from tiny_files import write_model

    model = write_model(tmp_path / "no-bos", bos=False)
    (got,) = cli_json("generate", "--model", model, "--prompt", "a", "--max-new-tokens", 3)
    assert got["prompt_tokens"] == 1


def test_seeds_reproduce(cli_json, tiny):
    def text(seed):
        (got,) = cli_json(
            "generate", "--model", tiny, "--prompt", "abc", "--max-new-tokens", 24,
            "--temperature", 1.5, "--top-k", 100, "--top-p", 0.95, "--seed", seed,
        )  # fmt: skip
        return got["text"]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_human_output(cli, tiny):
    code, out, err = cli(
        "generate", "--model", tiny, "--prompt", "abc", "--max-new-tokens", 3,
        "--no-compilation-cache",
    )  # fmt: skip
    assert code == 0
    assert out.startswith("abc")
    assert out.count("\n") == 1  # the answer and nothing else
    assert re.search(r"4 prompt tokens, \d new; stopped by: (end|limit)", err)
    assert "fast, 4 bits, group 64, coded scales, moments prompt + weights prior (16 tokens)" in err
    assert "loading" in err
    assert "generating" in err
    assert "\r" not in err


def test_quiet_says_nothing_on_stderr(cli, tiny):
    code, out, err = cli(
        "generate", "--model", tiny, "--prompt", "abc", "--max-new-tokens", 2, "--json",
        "--quiet", "--no-compilation-cache",
    )  # fmt: skip
    assert code == 0
    assert err == ""
    json.loads(out)


def test_a_corpus_that_is_not_used_is_mentioned(cli, tiny, text_file):
    code, _, err = cli(
        "generate", "--model", tiny, "--prompt", "abc", "--max-new-tokens", 2, "--calibration",
        text_file, "--no-compilation-cache",
    )  # fmt: skip
    assert code == 0
    assert "calibration corpus is not used: recipe fast needs none" in err


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("generate", ["--seed", 3], "--seed has no effect: at temperature 0 nothing is drawn"),
        ("generate", ["--per-prompt"], "--per-prompt has no effect: one prompt has its own"),
        ("generate", ["--calibration-tokens", 64], "--calibration-tokens has no effect: no cal"),
        ("perplexity", ["--protocol", "window", "--prompt-tokens", 8], "--prompt-tokens has no"),
        ("perplexity", ["--recipe", "none", "--with-baseline"], "--with-baseline has no effect"),
        ("generate", ["--seed", 3, "--temperature", 1.0], None),
        ("perplexity", ["--prompt-tokens", 8], None),
    ],
)
def test_an_option_without_effect_is_noted(cli, tiny, text_file, command, options, says):
    what = {
        "generate": ["--prompt", "ab", "--max-new-tokens", 1],
        "perplexity": ["--corpus", text_file, "--window", 16, "--max-windows", 1],
    }[command]
    if command == "perplexity" and "--prompt-tokens" not in options:
        what += ["--prompt-tokens", 8]
    recipe = [] if "--recipe" in options else ["--recipe", "rtn", "--select", "layers/q"]
    code, _, err = cli(command, "--model", tiny, *what, *recipe, *options, "--no-compilation-cache")
    assert code == 0, err
    assert (says in err) if says else ("has no effect" not in err)


@pytest.mark.parametrize("recipe", ["none", "ttq"])
def test_both_sizes_are_said(cli_json, tiny, recipe):
    (got,) = cli_json("generate", "--model", tiny, "--prompt", "ab", "--max-new-tokens", 1,
                      "--recipe", recipe)  # fmt: skip
    (told,) = cli_json("inspect", "--model", tiny, "--recipe", recipe)
    assert got["model_bits"] == told["model_bits"]
    assert (got["model_bits"] > got["effective_bits"]) == (recipe == "ttq")

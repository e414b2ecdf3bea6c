"""Input that cannot be used: exit code 2, one line that says why, nothing on stdout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

GENERATE = ["generate", "--max-new-tokens", "4", "--prompt", "hello", "--model"]


def refused(result, *parts):
    code, out, err = result
    lines = [line for line in err.splitlines() if "error" in line]
    assert code == 2
    assert out == ""
    assert len(lines) == 1
    assert lines[0].startswith("ttq: error: ")
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.fixture
def broken(tiny, tmp_path):
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


def edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory, change):
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["COMMAND"]),
        (["generate", "--model", "m"], ["--prompt"]),
        (["generate", "--model", "m", "--prompt", "x", "--prompts-file", "f"], ["not allowed"]),
        (["generate", "--model", "m", "--prompt", "x", "--method", "gtpq"], ["gtpq", "awq"]),
        (["perplexity", "--model", "m"], ["--corpus"]),
        (["perplexity", "--model", "m", "--corpus", "f", "--window", "many"], ["--window"]),
        (["inspect"], ["--model"]),
    ],
)
def test_options(cli, arguments, parts):
    refused(cli(*arguments), *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--bits", "7"], ["bits", "2, 3, 4, 5, 8", "7"]),
        (["--group-size", "0"], ["group size", "0"]),
        (["--group-size", "12"], ["multiple of 8", "12"]),
        (["--rank", "-1"], ["rank", "-1"]),
        (["--select", "("], ["regular expression"]),
        (["--select", "head"], ["expected a match", "layers/q", "'head'"]),
        (["--method", "awq"], ["--calibration"]),
        (["--method", "awq", "--alpha", "1"], ["--alpha", "ttq"]),
        (["--method", "awq", "--calibration", "/no/such/file"], ["/no/such/file"]),
        (["--alpha", "-1"], ["alpha"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "0"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--top-p", "0"], ["top_p"]),
        (["--prompt", ""], ["prompt", "found none"]),
        (["--prompt", "x" * 300], ["301 tokens", "256"]),
        (["--max-new-tokens", "400"], ["400", "256"]),
    ],
)
def test_generate(cli, tiny, options, parts):
    refused(cli(*GENERATE, tiny, "--no-compilation-cache", *options), *parts)


def test_prompts_files(cli, tiny, tmp_path):
    path = tmp_path / "prompts.txt"
    command = ["generate", "--model", tiny, "--no-compilation-cache", "--prompts-file", path]
    refused(cli(*command), str(path), "no such file")
    path.write_text("good\n\ngood\n")
    refused(cli(*command), "line 2")
    # The first prompt is fine, but nothing of the output may be written.
    path.write_text("good\n" + "x" * 300 + "\n")
    refused(cli(*command), "prompt 2", "256")
    path.write_bytes(b"\xff\xfe\x00x")
    refused(cli(*command), "UTF-8")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--corpus", "/no/such/corpus"], ["/no/such/corpus", "no such file"]),
        (["--corpus", "."], ["cannot be read"]),
        (["--window", "1"], ["window"]),
        (["--prompt-tokens", "64"], ["prompt tokens", "64"]),
        (["--window", "300"], ["300", "256"]),
        (["--max-windows", "0"], ["windows"]),
        (["--corpus", "hf:"], ["hf:NAME"]),
        (["--method", "awq", "--calibration-tokens", "100000"], ["calibration", "100000"]),
        (["--method", "awq", "--calibration-tokens", "1"], ["at least 2"]),
    ],
)
def test_perplexity(cli, tiny, text_file, options, parts):
    command = [
        "perplexity", "--model", tiny, "--corpus", text_file, "--window", 64, "--prompt-tokens",
        32, "--calibration", text_file, "--no-compilation-cache",
    ]  # fmt: skip
    refused(cli(*command, *options), *parts)


def test_corpus_shorter_than_a_window(cli, tiny, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    command = ["perplexity", "--model", tiny, "--no-compilation-cache", "--corpus", path]
    refused(cli(*command, "--window", 64, "--prompt-tokens", 32), "9 tokens", "64")
    path.write_text(" \n")
    refused(cli(*command), "found none")


def test_models_that_are_not_there(cli):
    refused(cli(*GENERATE, "/no/such/model"), "/no/such/model")
    refused(cli(*GENERATE, "nobody/no-such-model"), "nobody/no-such-model", "HF_HUB_OFFLINE")
    refused(cli(*GENERATE, "missing.gguf"), "missing.gguf")


def test_damaged_checkpoints(cli, broken):
    command = [*GENERATE, broken, "--no-compilation-cache"]
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(cli(*command), "model.safetensors")
    (broken / "model.safetensors").write_bytes(whole)

    edit(broken, architectures=["MambaForCausalLM"], model_type="mamba")
    refused(cli(*command), "mamba")
    edit(broken, architectures=["LlamaForCausalLM"], model_type="llama", secret_new_key=3)
    refused(cli(*command), "secret_new_key")
    (broken / "config.json").unlink()
    refused(cli(*command), "config.json")


def test_damaged_weights(cli, broken):
    command = [*GENERATE, broken, "--no-compilation-cache"]
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_weights(broken, lambda w: w.update({name: w[name][:, :32].copy()}))
    refused(cli(*command), "q_proj")
    edit_weights(broken, lambda w: w.update({name: np.full((64, 64), np.nan, np.float32)}))
    refused(cli(*command), "q_proj")


def test_truncated_gguf(cli, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    refused(cli(*GENERATE, path), "model.gguf")

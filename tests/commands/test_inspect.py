import math
import re

import pytest
from tiny_files import FFN, KV, LAYERS, VOCAB, WIDTH, tensors

from ttq_jax.checkpoint import load
from ttq_jax.commands.inspect import _text, inspect_model, packed_shapes
from ttq_jax.offline.calibrate import prepare
from ttq_jax.quant.presets import preset
from ttq_jax.types import stored_bytes


def test_json(cli_json, tiny):
    (got,) = cli_json("inspect", "--model", tiny, "--bits", 3)
    assert got["family"] == "llama"
    assert got["context"] == 256
    assert got["parameters"] == sum(t.size for t in tensors().values())
    assert got["bytes"] == sum(g["bytes"] for g in got["groups"])
    assert got["stored_bytes"] == sum(g["stored_bytes"] for g in got["groups"])
    groups = {g["path"]: g for g in got["groups"]}
    assert groups["layers/down/kernel"]["shape"] == [LAYERS, FFN, WIDTH]
    assert groups["layers/k/kernel"]["shape"] == [LAYERS, WIDTH, WIDTH * KV // 4]
    kernels = {f"layers/{n}/kernel" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {p for p, g in groups.items() if g["quantized"]} == kernels | {"embed/embedding"}
    # The recipe packs the table, so it was never loaded as it is.
    table = groups["embed/embedding"]
    assert (table["shape"], table["dtype"]) == ([VOCAB, WIDTH], "8 bits")
    assert table["bytes"] == table["stored_bytes"] < VOCAB * WIDTH * 4 / 3
    dense = [g for g in got["groups"] if g is not table]
    assert {g["dtype"] for g in dense} == {"float32"}
    assert sum(g["bytes"] for g in dense) == 4 * (got["parameters"] - VOCAB * WIDTH)
    # A byte of code, and of each group a byte of scale, and two of the column.
    assert groups["embed/embedding"]["bits"] == 8 * (64 + 1 + 2) / 64
    assert got["tokenizer"] == {
        "vocab_size": 258, "bos_id": 256, "bos_token": "<s>", "adds_bos": True, "eos_ids": [257],
        "eos_tokens": ["</s>"],
    }  # fmt: skip
    assert 3 < got["effective_bits"] < got["model_bits"] < 9
    # Of a tied table all is read, and nothing else than what is stored.
    assert got["bytes_per_token"] == got["stored_bytes"]
    assert got["model_bits"] == pytest.approx(8 * got["stored_bytes"] / got["parameters"], abs=1e-4)
    assert got["format"] == ""
    assert math.prod(groups["embed/embedding"]["shape"]) == VOCAB * WIDTH


def test_selection_and_method_none(cli_json, tiny):
    (got,) = cli_json("inspect", "--model", tiny, "--select", "layers/down")
    packed = [g["path"] for g in got["groups"] if g["quantized"]]
    assert packed == ["embed/embedding", "layers/down/kernel"]
    (got,) = cli_json("inspect", "--model", tiny, "--method", "none")
    assert got["stored_bytes"] == got["bytes"]
    assert got["effective_bits"] == 32


@pytest.mark.parametrize("rank", [0, 4])
def test_sizes_from_shapes_are_the_sizes_made(tiny, rank):
    model = load(tiny)
    recipe = preset("rtn", bits=3, rank=rank)
    made = prepare(model, recipe).packed
    assert stored_bytes(packed_shapes(model, recipe)) == stored_bytes(made)


def test_awq_needs_no_corpus_to_be_inspected(cli_json, tiny):
    (awq,) = cli_json("inspect", "--model", tiny, "--method", "awq")
    (ttq,) = cli_json("inspect", "--model", tiny, "--method", "ttq")
    assert awq["stored_bytes"] == ttq["stored_bytes"]


def test_human_output(cli, tiny):
    code, out, _ = cli("inspect", "--model", tiny, "--no-compilation-cache")
    assert code == 0
    assert "layers/gate/kernel" in out
    assert "over the whole model, 0.1 MB read per token without the KV cache)" in out
    assert "already rounded" not in out
    assert "quantized" in out
    assert out.splitlines()[-1].startswith("total")
    assert re.search(r"^a text begins with +'<s>' \(256\)$", out, re.M)
    assert re.search(r"^and ends with +'</s>' \(257\)$", out, re.M)


def test_a_quantized_file_is_named_with_what_it_spoils():
    model = load("smollm2")
    found = inspect_model(model, preset("fast"))
    assert (model.format, found["format"]) == ("Q4_1", "Q4_1")
    out = _text("smollm2", found, "fast")
    assert re.search(r"^model +SmolLM2-135M-Instruct, Q4_1 file$", out, re.M)
    assert "such a result says nothing about a method" in out

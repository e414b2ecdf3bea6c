"""`ttq plan`: no weights, one answer."""

import json
import re

import pytest

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 97,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip


def test_it_answers_without_weights(cli, cli_json, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    words = ["plan", "--model", tmp_path, "--chip", "v5e", "--recipe", "ttq", "--group-size", 32,
             "--dense-memory", "host", "--arithmetic"]  # fmt: skip
    (row,) = cli_json(*words)
    assert row["fits"]
    assert row["host"] == 2 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert sum(row["device"].values()) == row["total"]
    assert row["speeds"]["host_link_assumed"]
    code, out, _ = cli(*words)
    assert code == 0
    assert f"{tmp_path} fits v5e: 512 + 128 tokens, batch 1, by arithmetic (as asked)" in out
    assert "the host's at 16 GB/s (assumed)" in out
    assert "unquantized blocks" not in out, "none of them is on the device"


def test_a_given_link_is_not_assumed(cli_json):
    words = ["plan", "--model", "llama-3-8b", "--chip", "v6e", "--dense-memory", "host"]
    (row,) = cli_json(*words, "--host-link", 20, "--arithmetic")
    assert row["speeds"]["host_link"] == 20e9
    assert not row["speeds"]["host_link_assumed"]
    assert row["first_token_seconds"]["read"] == pytest.approx(row["host"] / 20e9)


def test_a_mesh_is_planned_by_the_device_and_by_the_host(cli_json, cli):
    words = ["plan", "--model", "llama-3-8b", "--chip", "v5e", "--mesh", "model=8", "--recipe",
             "ttq", "--group-size", 128, "--arithmetic"]  # fmt: skip
    (row,) = cli_json(*words)
    assert row["mesh"] == {"data": 1, "model": 8}
    assert row["per_host"]["device_bytes"] == 8 * row["total"]
    assert row["collectives"] == {"token's layer": ["bf16[1,1,4096] all-reduce"] * 2}
    code, out, _ = cli(*words)
    assert code == 0
    assert "llama-3-8b fits each v5e of a mesh of model=8: 512 + 128 tokens" in out
    assert "on the 8 devices of the host" in out
    assert "in each layer of a decoded token the devices exchange, by arithmetic: 2 x bf16" in out
    assert row["exchange_seconds"] == pytest.approx(2.6e-6, rel=0.01)
    assert row["speeds"]["peers"] == 200e9
    assert "takes at least 0.0026 ms, an estimate: its bytes over links of 200 GB/s one way" in out
    code, out, _ = cli(*words, "--dense-memory", "host")
    assert code == 0
    assert re.search(r"in the memory of the host +13.00 GiB", out)


def test_a_batch_that_is_not_dealt_out_is_said(cli):
    words = ["plan", "--model", "llama-3-8b", "--chip", "v5e", "--recipe", "none", "--arithmetic"]
    said = "data=2 of the mesh does not divide a batch of 3 prompts: each of its 2 groups"
    for batch, told in ((3, True), (4, False)):
        code, _, err = cli(*words, "--mesh", "data=2,model=4", "--batch-size", batch)
        assert code == 0
        assert (said in err) == told


def test_what_is_no_model_is_refused(cli):
    code, out, err = cli("plan", "--model", "nowhere/model", "--chip", "v5e")
    assert (code, out) == (2, "")
    assert "expected a directory with config.json, or one of qwen3-0.6b" in err


def test_a_key_is_ignored_where_there_is_one(cli, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"odd_key": 1}))
    words = ["plan", "--chip", "v5e", "--recipe", "none", "--arithmetic"]
    code, _, err = cli(*words, "--model", tmp_path)
    assert code == 2
    assert "--ignore-key odd_key" in err
    code, _, err = cli(*words, "--model", tmp_path, "--ignore-key", "odd_key")
    assert code == 0
    assert "odd_key = 1 is ignored, as asked" in err
    code, _, err = cli(*words, "--model", "qwen3-8b", "--ignore-key", "odd_key")
    assert code == 2
    assert "--ignore-key: the sizes of qwen3-8b are known" in err

"""Files that say what cannot be are refused before anything is built of them."""

import json
import os
import resource

import pytest
from tiny_files import write_model

from ttq_jax.checkpoint import CheckpointError, load


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "tiny")


def changed(model, file, **values):
    path = model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 20_000_000},
        {"vocab_size": 2**31 - 1},
        {"hidden_size": 2**30},
        {"intermediate_size": 2**30},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**400},
        {"num_hidden_layers": True},
        {"rms_norm_eps": "1e-5"},
        {"eos_token_id": 5000},
        {"bos_token_id": -3},
        {"architectures": {"deep": [[[[]]]]}, "model_type": ["llama"]},
    ],
)
def test_a_config_that_cannot_be(model, values):
    changed(model, "config.json", **values)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as e:
        load(model)
    assert len(str(e.value)) < 700
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_shard_outside_its_directory(model):
    (model.parent / "outside.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (model / "model.safetensors").rename(model / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside"):
        load(model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pipe_is_no_file_of_a_model(model, name):
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(CheckpointError, match=r"pipe|expected|file"):
        load(model)


def test_a_pipe_is_no_model(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match=r"pipe|expected|file"):
        load(tmp_path / "pipe.gguf")


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/x", "a\0b"])
def test_a_name_that_no_model_has(name):
    with pytest.raises(CheckpointError) as e:
        load(name)
    assert len(str(e.value)) < 300


def test_files_that_are_not_read_may_be_anything(model):
    os.mkfifo(model / "other.json")
    (model / "folder.json").mkdir()
    (model / "gone.json").symlink_to("nowhere")
    assert load(model).origin["fingerprint"]


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_tokenizer_that_multiplies_a_text(model, part):
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    name = {"normalizer": "normalizers", "decoder": "decoders"}[part]
    changed(model, "tokenizer.json", **{part: {"type": "Sequence", name: [step] * 4}})
    with pytest.raises(CheckpointError, match="10000 times as long"):
        load(model)
    step["content"] = "aa"
    changed(model, "tokenizer.json", **{part: {"type": "Sequence", name: [step] * 4}})
    load(model)

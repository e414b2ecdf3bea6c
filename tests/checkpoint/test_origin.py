"""What a name stands for: told from the files, without loading them."""

import os
import shutil

import pytest
from tiny_files import write_model

from ttq_jax.checkpoint import CheckpointError, load
from ttq_jax.checkpoint.origin import find, origin


def test_copies_are_the_same_and_other_weights_are_not(tmp_path):
    first = write_model(tmp_path / "a" / "tiny")
    shutil.copytree(first, tmp_path / "b")
    shutil.copy(tmp_path / "b" / "config.json", tmp_path / "b" / "README.md")
    ours = origin(first)
    assert origin(tmp_path / "b") == ours | {"file": "b"}
    weights = tmp_path / "b" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert origin(tmp_path / "b")["fingerprint"] != ours["fingerprint"]


def test_a_large_file_is_sampled_from_end_to_end(tmp_path):
    path, seen = tmp_path / "large.gguf", set()
    data = bytes(range(256)) * 4096
    path.write_bytes(data)
    seen.add(origin(path)["fingerprint"])
    for change in (0, 4095, len(data) - 4096, len(data) - 1):
        path.write_bytes(data[:change] + b"\xee\xee"[: len(data) - change] + data[change + 2 :])
        seen.add(origin(path)["fingerprint"])
    path.write_bytes(data + b"\0")
    seen.add(origin(path)["fingerprint"])
    assert len(seen) == 6
    # Another name and place, the same file.
    other = tmp_path / "elsewhere" / "other.gguf"
    other.parent.mkdir()
    path.write_bytes(data)
    other.write_bytes(data)
    assert origin(other) == origin(path) | {"file": "other.gguf"}


def test_a_model_knows_its_own_and_no_dtype_changes_it(tmp_path):
    path = write_model(tmp_path / "tiny")
    models = [load(path, dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert models[0].origin == models[1].origin == origin(find(path)) | {"format": ""}
    assert models[1].dtype == "bfloat16"


def test_a_revision_pins_a_hub_model(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--some--llama"
    (repo / "refs").mkdir(parents=True)
    commits = {"main": "a" * 40, "v1": "b" * 40}
    for (name, commit), context in zip(commits.items(), (128, 256), strict=True):
        (repo / "refs" / name).write_text(commit)
        folder = repo / "snapshots" / commit
        folder.mkdir(parents=True)
        write_model(folder, max_position_embeddings=context)
    newest, pinned = load("some/llama"), load("some/llama@v1")
    assert (newest.config.max_positions, pinned.config.max_positions) == (128, 256)
    assert newest.origin["file"] == pinned.origin["file"] == "some/llama"
    assert (newest.origin["revision"], pinned.origin["revision"]) == tuple(commits.values())
    assert load("some/llama@" + commits["v1"]).origin == pinned.origin
    with pytest.raises(CheckpointError, match="some/llama@v2"):
        load("some/llama@v2")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match="expected a file, found a pipe or device"):
        origin(find(tmp_path / "pipe.gguf"))

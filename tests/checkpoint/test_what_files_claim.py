"""Checkpoints that nobody vouches for: what they claim is compared with what they hold."""

import json
import os
import struct
import sys
import tracemalloc
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
from fuzz_inputs import CHAT, CONFIGS, write_inputs
from fuzz_mutations import gguf_of, parts_of_gguf

from ttq_jax.checkpoint import CheckpointError, load
from ttq_jax.checkpoint.store import load_conversation
from ttq_jax.checkpoint.store_files import _digest_of

ARCHS = ("llama", "qwen3", "gemma3")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    return root


@pytest.fixture
def changed(inputs):
    """Changes a file for the time of a test."""
    before = {}

    def change(name, data):
        path = inputs / name
        before.setdefault(path, path.read_bytes())
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())

    yield change
    for path, data in before.items():
        path.write_bytes(data)


def refused(place, *parts):
    with pytest.raises(CheckpointError) as found:
        load(place)
    text = str(found.value).replace(str(place), "")
    assert all(part in text for part in parts), text
    assert len(text) < 600 and "\n" not in text


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("size", [3000, 20_000_000, 2**31, 10**400])
def test_a_size_is_compared_with_the_weights_before_anything_is_built(
    inputs, changed, family, size
):
    wide = "ffn_dim" if family == "opt" else "intermediate_size"
    for key in ("num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads", wide):
        config = CONFIGS[family] | {key: size}
        if key == "num_hidden_layers":
            config.pop("layer_types", None)
        changed(f"{family}/config.json", config)
        tracemalloc.start()
        heads = key == "num_attention_heads" and "head_dim" in config and size == 3000
        refused(inputs / family, str(size * config["head_dim"] if heads else size)[:70])
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 50e6


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "feed_forward_length"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_gguf_header_is_compared_with_its_tensors(inputs, changed, arch, key):
    name = f"gguf_{arch}/model.gguf"
    keys, tensors, data = parts_of_gguf((inputs / name).read_bytes())
    made = [
        [k, t, struct.pack("<I", 5000) if k.decode() == f"{arch}.{key}" else v] for k, t, v in keys
    ]
    changed(name, gguf_of(made, tensors, data))
    refused(inputs / name, "5000")


def test_special_ids_are_rows_of_the_embedding(inputs, changed):
    for value in (264, [257, 264]):
        changed("llama/generation_config.json", {"eos_token_id": value})
        refused(inputs / "llama", "ends a text, got 264")
    for value in (264, [257, 264], 2**31, -1, "</s>", [None]):
        changed("llama/generation_config.json", {})
        changed("llama/config.json", CONFIGS["llama"] | {"eos_token_id": value})
        refused(inputs / "llama", "expected")
    changed("llama/config.json", CONFIGS["llama"])
    changed("llama/generation_config.json", {"eos_token_id": 263})
    assert load(inputs / "llama").eos_ids == (263, 257)
    changed("llama/config.json", CONFIGS["llama"] | {"bos_token_id": 264})
    changed("llama/tokenizer_config.json", {})
    refused(inputs / "llama", "begins a text, got 264")


def test_an_index_names_files_beside_it(inputs, changed, tmp_path):
    name = "sharded/model.safetensors.index.json"
    index = json.loads((inputs / name).read_text())
    first = next(iter(index["weight_map"]))
    shard = inputs / "sharded" / index["weight_map"][first]
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(shard.read_bytes())
    up = os.path.relpath(outside, inputs / "sharded")
    for other in (str(outside), up, "/dev/zero", ""):
        changed(name, index | {"weight_map": index["weight_map"] | {first: other}})
        refused(inputs / "sharded", "expected names of files beside it")
    for other in (7, None, ["a"]):
        changed(name, index | {"weight_map": index["weight_map"] | {first: other}})
        refused(inputs / "sharded", f"weight_map.{first}: expected a text")


def test_a_hub_cache_of_links_is_read(inputs, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for i, file in enumerate(sorted((inputs / "sharded").iterdir())):
        (tmp_path / "blobs" / str(i)).write_bytes(file.read_bytes())
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{i}")
    assert load(tmp_path / "snapshot").config == load(inputs / "sharded").config


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json",
                                  "model.safetensors"])  # fmt: skip
def test_a_pipe_is_not_waited_for(inputs, tmp_path, name):
    for file in (inputs / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    load(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    refused(tmp_path, "expected")
    refused(tmp_path / name, "expected a file, found a directory, pipe or device")
    refused("/dev/zero", "expected a file")


def test_a_tensor_twice_in_a_safetensors_header(inputs, changed):
    data = (inputs / "llama/model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + size].decode().rstrip()
    name, entry = next((k, v) for k, v in json.loads(header).items() if k != "__metadata__")
    twice = f"{header[:-1]}, {json.dumps(name)}: {json.dumps(entry)}}}".encode()
    changed("llama/model.safetensors", struct.pack("<Q", len(twice)) + twice + data[8 + size :])
    refused(inputs / "llama", f"the key '{name}' is there twice")


def edited(inputs, change):
    data = json.loads((inputs / "llama/tokenizer.json").read_text())
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["model"]["vocab"].update(he=259), "two tokens have the same id"),
        (lambda t: t["model"]["vocab"].update(he=-1), "model.vocab.he: expected an integer from 0"),
        (lambda t: t["model"]["vocab"].update(he=2**40), "model.vocab.he: expected an integer"),
        (lambda t: t["model"]["vocab"].update(zz=264), "has 265 tokens, the embedding only 264"),
        (lambda t: t["added_tokens"][0].update(id=3), "has id 3, but by the vocabulary it is 256"),
        (lambda t: t["added_tokens"][0].update(content=3), "added_tokens[0].content"),
        (lambda t: t.update(model=None), "model: expected an object, got None"),
        (lambda t: t["model"].update(vocab={}), "cannot be read"),
        (lambda t: t["model"].update(type="x" * 9999), "cannot be read"),
    ],
)
def test_a_tokenizer_contradicts_itself(inputs, changed, change, said):
    changed("llama/tokenizer.json", edited(inputs, change))
    refused(inputs / "llama", "tokenizer" if "embedding" in said else "tokenizer.json", said)


def test_moments_of_other_axes_are_no_moments(inputs, changed):
    model, name = load(inputs / "llama"), "conversation/ttq.json"
    header = json.loads((inputs / name).read_text())
    sums = header["tree"]["dict"]["attn_in"]["fields"]["sums"]
    assert len(sums["shape"]) == 3
    for shape in ([], [32]):
        sums["shape"] = shape
        changed(name, header | {"sha256": _digest_of(header)})
        with pytest.raises(CheckpointError, match="attn_in are no power sums"):
            load_conversation(inputs / "conversation", model, CHAT)


def parts(inputs, arch="llama"):
    keys, tensors, data = parts_of_gguf((inputs / f"gguf_{arch}/model.gguf").read_bytes())
    return keys, [list(t) for t in tensors], data


def test_gguf_parts_are_what_was_read(inputs):
    for arch in ARCHS:
        whole = (inputs / f"gguf_{arch}/model.gguf").read_bytes()
        assert gguf_of(*parts_of_gguf(whole)) == whole


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("move", [32, -32, 1, 2**63, "swap", "same"])
def test_gguf_tensors_follow_each_other(inputs, changed, arch, move):
    name = f"gguf_{arch}/model.gguf"
    keys, sound, data = parts(inputs, arch)
    for i in (1, 5):
        tensors = [list(tensor) for tensor in sound]
        if move == "swap":
            tensors[i][3], tensors[i + 1][3] = tensors[i + 1][3], tensors[i][3]
        elif move == "same":
            tensors[i][3] = tensors[i - 1][3]
        else:
            tensors[i][3] += move
        changed(name, gguf_of(keys, tensors, data))
        refused(inputs / name, tensors[i][0].decode(), "bytes into the data, found")


def test_gguf_names_occur_once(inputs, changed):
    name = "gguf_llama/model.gguf"
    keys, tensors, data = parts(inputs)
    for i in (0, 4, len(keys) - 1):
        changed(name, gguf_of([*keys, keys[i]], tensors, data))
        refused(inputs / name, f"the key '{keys[i][0].decode()}' occurs twice")
    changed(name, gguf_of(keys, [*tensors, tensors[0]], data))
    refused(inputs / name, f"tensor '{tensors[0][0].decode()}' occurs twice")


TEXT, FLAG, WHOLE, REAL = (
    (8, struct.pack("<Q", 1) + b"x"),
    (7, b"\1"),
    (4, b"\1\0\0\0"),
    (6, b"\0" * 4),
)
LIST = (9, struct.pack("<IQI", 4, 1, 7))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("value", [TEXT, FLAG, WHOLE, REAL, LIST])
def test_every_gguf_value_that_is_used_has_its_type(inputs, changed, arch, value):
    name = f"gguf_{arch}/model.gguf"
    keys, tensors, data = parts(inputs, arch)
    refusals = 0
    for i, (key, kind, _) in enumerate(keys):
        changed(name, gguf_of([*keys[:i], [key, *value], *keys[i + 1 :]], tensors, data))
        # A whole number is a number.
        if (kind != value[0] or kind == 9) and (kind, value) != (REAL[0], WHOLE):
            refused(inputs / name, "expected" if key != b"general.architecture" else "supported")
            refusals += 1
    assert refusals > 5
    for extra in (b"general.alignment", b"split.count"):
        if value is not WHOLE:
            changed(name, gguf_of([*keys, [extra, *value]], tensors, data))
            refused(inputs / name, "expected")


def test_gguf_arrays_end_within_the_file_and_fit_the_vocabulary(inputs, changed):
    name = "gguf_gemma3/model.gguf"
    keys, tensors, data = parts(inputs, "gemma3")
    for i, (key, kind, value) in enumerate(keys):
        if kind == 9:
            inner, count = struct.unpack_from("<IQ", value)
            for other in (2**40, 2**63):
                longer = struct.pack("<IQ", inner, other) + value[12:]
                changed(name, gguf_of([*keys[:i], [key, 9, longer], *keys[i + 1 :]], tensors, data))
                refused(inputs / name, "truncated")
            if inner in {5, 6}:
                shorter = struct.pack("<IQ", inner, count - 1) + value[12:-4]
                changed(
                    name, gguf_of([*keys[:i], [key, 9, shorter], *keys[i + 1 :]], tensors, data)
                )
                refused(inputs / name, key.decode(), "for each token")

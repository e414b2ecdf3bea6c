"""The begin and the ends of a text: what several files name, put together."""

import json
import os

import numpy as np
import pytest
from tiny_files import VOCAB, write_model
from tiny_gguf import random_llama, write_gguf
from tokenizers import AddedToken, Tokenizer

import ttq_jax as ttq
from ttq_jax.checkpoint import CheckpointError, load
from ttq_jax.checkpoint.gguf_tokenizer import build_tokenizer

NAMED = ["<s>", "</s>", "<|eot|>", "<|eom|>"]  # 256 and on


@pytest.fixture
def make(tmp_path):
    """Writes a model of which only the given files name a begin or an end."""

    def written(*, config=None, tokenizer=None, **files):
        path = write_model(tmp_path / "tiny")
        backend = Tokenizer.from_file(str(path / "tokenizer.json"))
        backend.add_special_tokens([AddedToken(t, normalized=False) for t in NAMED[2:]])
        backend.save(str(path / "tokenizer.json"))
        kept = json.loads((path / "config.json").read_text())
        kept = {k: v for k, v in kept.items() if k not in {"bos_token_id", "eos_token_id"}}
        files |= {"config": kept | (config or {}), "tokenizer_config": tokenizer or {}}
        for stem, data in files.items():
            raw = data if isinstance(data, bytes) else json.dumps(data).encode()
            (path / f"{stem}.json").write_bytes(raw)
        return path

    return written


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": {"eos_token_id": 257}}, (257,)),
        ({"config": {"eos_token_id": [257, 258]}}, (257, 258)),
        ({"generation_config": {"eos_token_id": 258}}, (258,)),
        ({"tokenizer": {"eos_token": "<|eom|>"}}, (259,)),
        ({"tokenizer": {"eos_token": {"content": "<|eom|>", "lstrip": False}}}, (259,)),
        ({"special_tokens_map": {"eos_token": "<|eot|>"}}, (258,)),
        (
            {
                "config": {"eos_token_id": 257}, "generation_config": {"eos_token_id": [258, 257]},
                "tokenizer": {"eos_token": "<|eom|>"}, "special_tokens_map": {"eos_token": "</s>"},
            },
            (258, 257, 259),
        ),
        ({"config": {"eos_token_id": None, "bos_token_id": None},
          "generation_config": {"eos_token_id": None}, "tokenizer": {"eos_token": "</s>"}}, (257,)),
        ({"config": {"eos_token_id": 257}, "tokenizer": {"eos_token": "not a token"}}, (257,)),
    ],
)  # fmt: skip
def test_every_end_that_a_file_names_ends_a_text(files, expected, make):
    model = load(make(**files))
    assert model.eos_ids == model.tokenizer.eos_ids == expected
    assert model.notes == ()


def test_no_file_names_an_end(make):
    path = make()
    model = load(path)
    # Llama's usual end is 2, which is a letter here.
    assert model.eos_ids == ()
    (note,) = model.notes
    assert "no file names a token that ends a text" in note
    data = json.loads((path / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    letter = next(text for text, i in vocab.items() if i == 2)
    vocab |= {"</s>": 2, letter: 257, "<s>": 256, "<|eot|>": 258, "<|eom|>": 259}
    for token in data["added_tokens"]:
        token["id"] = vocab[token["content"]]
    (path / "tokenizer.json").write_text(json.dumps(data))
    model = load(path)
    assert model.eos_ids == (2,)
    assert model.notes == ("no file names the end of a text; '</s>' (2) is taken as usual",)


def test_an_end_without_a_row(make):
    path = make(config={"eos_token_id": 257}, tokenizer={"eos_token": "<far>"})
    data = json.loads((path / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab |= {text: 256 + i for i, text in enumerate(NAMED)}
    vocab |= {f"<{i}>": i for i in range(260, VOCAB)}
    data["added_tokens"].append(data["added_tokens"][0] | {"id": VOCAB, "content": "<far>"})
    (path / "tokenizer.json").write_text(json.dumps(data))
    model = load(path)
    assert model.eos_ids == (257,)
    assert model.notes == (f"no answer ends with '<far>' ({VOCAB}): the embedding has {VOCAB} rows"
                           " and none for it",)  # fmt: skip
    (path / "config.json").write_text(
        json.dumps(json.loads((path / "config.json").read_text()) | {"eos_token_id": VOCAB + 1})
    )
    with pytest.raises(CheckpointError, match=f"ends a text, got {VOCAB + 1}"):
        load(path)


BROKEN = {
    "empty": b"", "no JSON": b"{oops", "a list": b"[]", "no text": b"\xff\xfe\x00",
    "half": b'{"eos_token_id": [25', "a word": b'{"eos_token_id": "</s>"}',
}  # fmt: skip


@pytest.mark.parametrize("stem", ["generation_config", "special_tokens_map"])
@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_damaged_optional_file_is_a_note(data, stem, make):
    if (stem, data) == ("special_tokens_map", BROKEN["a word"]):
        data = b'{"eos_token": 3}'
    model = load(make(config={"eos_token_id": 257}, **{stem: data}))
    assert model.eos_ids == (257,)
    (note,) = model.notes
    assert note.startswith(f"{stem}.json is left out: ") and len(note) < 400 and "\n" not in note


def test_a_pipe_as_an_optional_file_is_a_note(make):
    path = make(config={"eos_token_id": 257})
    os.mkfifo(path / "generation_config.json")
    assert load(path).notes[0].startswith("generation_config.json is left out: expected a file")


def test_a_byte_order_mark_is_none(make):
    data = b"\xef\xbb\xbf" + json.dumps({"eos_token_id": 258}).encode()
    model = load(make(config={"eos_token_id": 257}, generation_config=data))
    assert (model.eos_ids, model.notes) == ((258, 257), ())


@pytest.mark.parametrize(
    ("files", "begin", "note"),
    [
        ({"config": {"bos_token_id": 256}, "tokenizer": {"bos_token": "<s>"}}, 256, None),
        ({"config": {"bos_token_id": [256]}}, 256, None),
        ({"config": {"bos_token_id": None}}, None, None),
        (
            {"config": {"bos_token_id": 258}, "tokenizer": {"bos_token": "<s>"}}, 256,
            "'<s>' (256) is taken as the begin of a text, which is what the tokenizer names, though"
            " config.json names '<|eot|>' (258)",
        ),
        (
            {"config": {"bos_token_id": 258, "text_config": {"bos_token_id": 259}},
             "generation_config": {"bos_token_id": 256}}, 256,
            "'<s>' (256) is taken as the begin of a text, as generation_config.json says, though "
            "config.json names '<|eot|>' (258) and text_config of config.json names '<|eom|>' "
            "(259)",
        ),
    ],
)  # fmt: skip
def test_one_begin(files, begin, note, make):
    files["config"] = {"eos_token_id": 257} | files["config"]
    if "text_config" in files["config"]:
        from ttq_jax.checkpoint.ends import settled_begin
        from ttq_jax.checkpoint.huggingface import _ends

        path = make(**files)
        backend = Tokenizer.from_file(str(path / "tokenizer.json"))
        assert settled_begin(None, _ends(path)[0], backend) == (begin, [note])
        return
    model = load(make(**files))
    assert model.tokenizer.bos_id == begin
    assert model.notes == (() if note is None else (note,))


def test_a_prompt_that_begins_with_the_begin_gets_no_second_one(make):
    files = {"config": {"eos_token_id": 257}, "tokenizer": {"bos_token": "<s>"}}
    model = load(make(**files | {"tokenizer": {"bos_token": "<s>", "add_bos_token": True}}))
    ours = model.tokenizer
    assert ours.encode("<s>ab") == ours.encode("ab") == [256, *ours.encode("ab", add_bos=False)]
    assert ours.encode("<s>ab", add_bos=False)[0] == 256
    assert ours.encode("<s><s>a") == [256, 256, *ours.encode("a", add_bos=False)]
    made = ttq.generate(model, ["<s>ab", "ab"], recipe=None, max_new_tokens=2)
    assert made.tokens[0] == made.tokens[1] and made.prompt_tokens == [3, 3]
    silent = load(make(**files)).tokenizer
    assert silent.encode("<s>a") == [256, *silent.encode("a")]


def test_an_end_behind_every_prompt_is_left_out_with_a_note(make):
    model = load(make(config={"eos_token_id": 257}, tokenizer={"add_eos_token": True}))
    assert 257 not in model.tokenizer.encode("ab")
    assert model.notes[0].startswith("add_eos_token is true, but no end-of-text token is put")


KEY = "tokenizer.ggml."


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({}, (257,)),
        ({"eot_token_id": 258}, (257, 258)),
        ({"eot_token_id": 258, "eom_token_id": 259}, (257, 258, 259)),
        ({"eos_token_ids": [260, 257, 258]}, (257, 260, 258)),
    ],
)
def test_ends_of_a_gguf_file(header, expected, tmp_path):
    base, tensors = random_llama()
    header = base | {KEY + name: value for name, value in header.items()}
    write_gguf(tmp_path / "m.gguf", "llama", header, tensors)
    model = load(tmp_path / "m.gguf")
    assert model.eos_ids == model.tokenizer.eos_ids == expected and model.notes == ()


@pytest.mark.parametrize("value", [[264], [-1, 257], ["</s>"], 257, [True]])
def test_ends_of_a_gguf_file_are_ids_of_tokens(value, tmp_path):
    header, tensors = random_llama()
    write_gguf(tmp_path / "m.gguf", "llama", header | {KEY + "eos_token_ids": value}, tensors)
    with pytest.raises(CheckpointError, match="eos_token_ids: expected ids of tokens, got"):
        load(tmp_path / "m.gguf")


def test_a_gguf_file_that_names_no_end(tmp_path):
    header, tensors = random_llama()
    del header[KEY + "eos_token_id"]
    write_gguf(tmp_path / "m.gguf", "llama", header, tensors)
    model = load(tmp_path / "m.gguf")
    assert model.eos_ids == () and "no file names a token" in model.notes[0]


@pytest.mark.parametrize("control", [True, False])
def test_a_sentencepiece_header_that_names_neither(control):
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [2, 3, 3, 1, 1] if control else [2, 1, 1, 1, 1]
    header = {
        "model": "llama", "tokens": tokens, "scores": np.zeros(len(tokens), np.float32),
        "token_type": np.array(kinds + [6] * 256), "unknown_token_id": 0,
    }  # fmt: skip
    header = {KEY + name: value for name, value in header.items()}
    ours = build_tokenizer(header, "file", len(tokens), 2)
    assert (ours.bos_id, ours.eos_ids) == ((1, (2,)) if control else (None, ()))
    assert ours.encode("a", add_bos=True)[:1] == ([1] if control else [3])
    assert len(ours.notes) == 1

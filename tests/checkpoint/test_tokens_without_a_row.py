"""Tokens past the embedding, which no text produces unless it spells them out: Gemma 3's for an
image, the padding that somebody added to Llama 2. Models that have them load; no prompt may."""

import json
import re

import numpy as np
import pytest
from tiny_files import VOCAB, write_model
from tiny_gguf import random_llama, write_gguf
from tokenizers import Tokenizer

import ttq_jax as ttq
from ttq_jax.checkpoint import CheckpointError, load
from ttq_jax.commands.main import main
from ttq_jax.evaluation.continuations import continue_until, score_continuations
from ttq_jax.prompts import PromptError
from ttq_jax.sampling import make_key
from ttq_jax.types import Offline

IMAGE, PAD = "<image_soft_token>", "[PAD]"


def add_tokens(path, *contents, special=True, into_vocab=False):
    """Adds tokens behind the last row, as fine-tuning scripts and Gemma 3's own files do."""
    file = path / "tokenizer.json"
    data = json.loads(file.read_text())
    ids = range(VOCAB, VOCAB + len(contents))
    for i, content in zip(ids, contents, strict=True):
        data["added_tokens"].append(
            data["added_tokens"][0] | {"id": i, "content": content, "special": special}
        )
    vocab = data["model"]["vocab"]
    vocab |= {"<s>": 256, "</s>": 257} | {f"<unused{i}>": i for i in range(258, VOCAB)}
    if into_vocab:
        vocab |= dict(zip(contents, ids, strict=True))
    file.write_text(json.dumps(data))
    assert Tokenizer.from_file(str(file)).token_to_id(contents[0]) == VOCAB


@pytest.fixture
def path(tmp_path):
    return write_model(tmp_path / "tiny")


@pytest.mark.parametrize("into_vocab", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_a_model_with_such_tokens_loads_and_no_prompt_has_them(path, special, into_vocab):
    plain = load(path)
    add_tokens(path, IMAGE, PAD, special=special, into_vocab=into_vocab)
    model = load(path)
    assert model.tokenizer.vocab_size == VOCAB + 2
    assert model.tokenizer.encode("a picture") == plain.tokenizer.encode("a picture")
    ours = ttq.generate(model, ["a picture"], recipe=None, max_new_tokens=3)
    assert ours.tokens == ttq.generate(plain, ["a picture"], recipe=None, max_new_tokens=3).tokens
    for token, i in ((IMAGE, VOCAB), (PAD, VOCAB + 1)):
        said = re.escape(f"cannot read the token '{token}', id {i}: its embedding has {VOCAB} rows")
        for use in (
            lambda text: model.tokenizer.encode(text, add_bos=False),
            lambda text: ttq.generate(model, ["sound", text], recipe=None),
            lambda text: ttq.cut_windows(model.tokenizer, text * 20, 4),
        ):
            with pytest.raises(PromptError, match=said):
                use(f"a {token} here")


USES = {
    "perplexity": lambda m, ids: ttq.perplexity(m, np.array([ids]), recipe=None),
    "calibrate": lambda m, ids: ttq.calibrate(m, np.array([ids]), ttq.preset("awq").reads),
    "prompt": lambda m, ids: score_continuations(m, ids, [[1]], recipe=None, offline=Offline()),
    "score": lambda m, ids: score_continuations(
        m, [256], [[1], ids], recipe=None, offline=Offline()
    ),
    "continue": lambda m, ids: continue_until(
        m, ids, [], 2, make_key(0), recipe=None, offline=Offline(), sampling=ttq.Sampling()
    ),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_ids_handed_to_functions_are_checked_too(path, use):
    add_tokens(path, IMAGE)
    model = load(path)
    with pytest.raises(PromptError, match=f"the token '{IMAGE}', id {VOCAB}"):
        use(model, [256, 5, VOCAB, 7])
    for i in (VOCAB + 1, -1):
        with pytest.raises(PromptError, match=f"from 0 to {VOCAB - 1}, got {i}"):
            use(model, [256, 5, i, 7])


def test_a_tokenizer_whose_ordinary_tokens_have_no_row_is_another_models(path):
    file = path / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"] |= {"<s>": 256, "</s>": 257, "zz": VOCAB}
    file.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=f"has {VOCAB + 1} tokens, the embedding only"):
        load(path)


def test_a_gguf_file_with_fewer_rows_than_tokens(tmp_path):
    header, tensors = random_llama()
    header["tokenizer.ggml.tokens"] += [PAD]
    header["tokenizer.ggml.token_type"] += [3]
    write_gguf(tmp_path / "m.gguf", "llama", header, tensors)
    ours = load(tmp_path / "m.gguf").tokenizer
    assert ours.vocab_size == VOCAB + 1
    assert ours.encode("ab") == [VOCAB - 1]
    with pytest.raises(PromptError, match=r"the token '\[PAD\]', id 264"):
        ours.encode("ab[PAD]")
    header["tokenizer.ggml.token_type"][-1] = 1
    write_gguf(tmp_path / "n.gguf", "llama", header, tensors)
    with pytest.raises(CheckpointError, match=f"has {VOCAB + 1} tokens, the embedding only"):
        load(tmp_path / "n.gguf")


def test_the_command_line_names_the_token(path, capfd):
    add_tokens(path, IMAGE)
    where = ["generate", "--model", str(path), "--prompt", f"see {IMAGE}", "--method", "none"]
    assert main(where) == 2
    assert f"cannot read the token '{IMAGE}', id {VOCAB}" in capfd.readouterr().err

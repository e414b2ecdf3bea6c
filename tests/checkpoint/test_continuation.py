"""The text of new tokens is what they add to the prompt's text, whatever the decoder does."""

import json

import numpy as np
import pytest
from tiny_files import write_model
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ttq_jax import Sampling, generate, load
from ttq_jax.checkpoint import Tokenizer
from ttq_jax.checkpoint.gguf_tokenizer import build_tokenizer
from ttq_jax.evaluation.continuations import continue_until
from ttq_jax.sampling import make_key
from ttq_jax.types import Offline

WORDS = ["▁", "▁of", "▁France", "▁is", "▁Paris", ",", "▁not", "s", "日"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
VOCAB = ["<unk>", "<s>", "</s>", *BYTES, *WORDS]


def steps(strip):
    made = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*made, decoders.Strip(" ", 1, 0)] if strip else made)


def sentencepiece(decoder):
    """Whole words, so that the ids are known; the decoders are those of published files."""
    backend = Backend(models.BPE({t: i for i, t in enumerate(VOCAB)}, [], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in VOCAB[:3]])
    return Tokenizer(backend, bos_id=1, adds_bos=True)


def from_gguf(prefix):
    key = "tokenizer.ggml."
    header = {
        "model": "llama", "tokens": VOCAB, "scores": np.zeros(len(VOCAB), np.float32),
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(WORDS)), "bos_token_id": 1,
        "unknown_token_id": 0, "add_space_prefix": prefix,
    }  # fmt: skip
    return build_tokenizer({key + name: value for name, value in header.items()}, "file")


LLAMA = {
    "tokenizer.json": lambda: sentencepiece(steps(strip=True)),
    "metaspace": lambda: sentencepiece(decoders.Metaspace(prepend_scheme="first")),
    "GGUF": lambda: from_gguf(prefix=True),
}
GEMMA = {
    "tokenizer.json": lambda: sentencepiece(steps(strip=False)),
    "GGUF": lambda: from_gguf(prefix=False),
}


def ids(*words):
    return [VOCAB.index(word) for word in words]


def in_bytes(text):
    return ids(*(f"<0x{byte:02X}>" for byte in text.encode()))


@pytest.mark.parametrize("made", LLAMA.values(), ids=LLAMA)
def test_a_decoder_that_strips_keeps_the_space_of_the_answer(made):
    ours = made()
    prompt = [1, *ids("▁of", "▁France", "▁is")]
    assert ours.decode(prompt) == "of France is"
    assert ours.decode(ids("▁Paris", ",")) == "Paris,"
    assert ours.continuation(prompt, ids("▁Paris", ",")) == " Paris,"
    assert ours.continuation(prompt, ids("s")) == "s"
    assert ours.continuation(prompt, ids("▁", "▁Paris")) == "  Paris"
    assert ours.continuation(prompt, [2]) == ours.continuation(prompt, []) == ""
    # At the start of a text the space is the prefix, which is not part of it.
    assert ours.continuation([1], ids("▁Paris")) == ours.continuation([], ids("▁Paris")) == "Paris"


@pytest.mark.parametrize("made", GEMMA.values(), ids=GEMMA)
def test_a_decoder_that_keeps_all_spaces(made):
    ours = made()
    assert ours.continuation([1, *ids("▁of")], ids("▁Paris", "s")) == " Pariss"
    assert ours.continuation([1], ids("▁Paris")) == " Paris"


@pytest.mark.parametrize("made", [LLAMA["tokenizer.json"], LLAMA["GGUF"], *GEMMA.values()])
def test_byte_fallback_cut_inside_a_character(made):
    ours = made()
    begin, (first, *rest) = [1, *ids("▁of")], in_bytes("é")
    assert ours.continuation([*begin, first], rest) == "é"
    assert ours.continuation([*begin, first], [*rest, *ids("▁is")]) == "é is"
    # The prompt's own characters, though the library now spells them otherwise, are not repeated.
    whole = [*begin, *in_bytes("日本")]
    assert ours.continuation(whole, [first]) == "\ufffd"
    assert ours.continuation(whole, [first, *rest]) == "é"
    assert ours.continuation(whole, in_bytes("😀")[:3]) == "\ufffd" * 3


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", normalized=False)])
    return Tokenizer(backend, bos_id=256, adds_bos=True)


TEXTS = ["a é", "日本語", "x😀y", "\ufffd", "a\ufffd\ufffd é", " ", "  b "]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokens_cut_anywhere(text):
    ours = byte_level()
    tokens, size = ours.encode(text), len(text.encode())
    assert len(tokens) == 1 + size
    for cut in range(len(tokens) + 1):
        complete = text.encode()[: max(cut - 1, 0)].decode(errors="ignore")
        got = ours.continuation(tokens[:cut], tokens[cut:])
        # What the prompt shows of an unfinished character may be the start of a real one.
        assert complete + got == text or (complete + "\ufffd" + got == text)
    for end in range(1, size + 1):
        shown = text.encode()[:end].decode(errors="replace")
        assert ours.continuation(tokens[:1], tokens[1 : 1 + end]) == shown


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Llama whose tokenizer strips, and whose tokens nearly all begin with a space."""
    path = write_model(tmp_path_factory.mktemp("strips"), eos_token_id=263)
    data = json.loads((path / "tokenizer.json").read_text())
    alphabet = list(data["model"]["vocab"])
    vocab = {f"▁{c}" if c.isalnum() else f"▁<{i}>": i for i, c in enumerate(alphabet)}
    backend = Backend(models.BPE(vocab, [], unk_token=next(iter(vocab))))
    backend.decoder = steps(strip=True)
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>")])
    backend.save(str(path / "tokenizer.json"))
    return load(path)


def test_texts_and_the_harness_show_the_space(model):
    made = generate(model, ["a", "b and c"], recipe=None, max_new_tokens=4, batch_size=2)
    for prompt, new, text in zip(["a", "b and c"], made.tokens, made.texts, strict=True):
        read = model.tokenizer.encode(prompt)
        assert text == model.tokenizer.continuation(read, new)
        assert new and text.startswith(" ") and not model.tokenizer.decode(new).startswith(" ")
    how = {"recipe": None, "offline": Offline(), "sampling": Sampling()}
    answer = continue_until(model, model.tokenizer.encode("a"), [], 4, make_key(0), **how)
    assert answer == made.texts[0]
    start = f" {answer.split()[0]}"
    assert answer.startswith(start)
    assert continue_until(model, model.tokenizer.encode("a"), [start], 4, make_key(0), **how) == ""

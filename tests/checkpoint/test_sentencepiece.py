"""Directories with SentencePiece's `tokenizer.model` alone: the ids are SentencePiece's own."""

import functools
import io
import json
import random
from pydoc_data.topics import topics

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tiny_files import VOCAB, write_model

import ttq_jax as ttq
from ttq_jax.checkpoint import CheckpointError, load
from ttq_jax.checkpoint.hf_tokenizer import load_tokenizer
from ttq_jax.prompts import PromptError

# As Llama's was trained.
LLAMA = {
    "vocab_size": 700, "model_type": "bpe", "byte_fallback": True, "split_digits": True,
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True, "minloglevel": 2,
}  # fmt: skip
KINDS = {
    "llama": {},
    "no prefix": {"add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False, "character_coverage": 0.99},
    "control": {"control_symbols": ["<sep>"]},
    "user-defined": {"user_defined_symbols": ["<cut>", "▁▁", "\n\n", "<cut>>"]},
    "spaces removed": {"remove_extra_whitespaces": True},
    "characters mapped": {"normalization_rule_name": "nmt_nfkc"},
    "Unigram": {"model_type": "unigram"},
    "letters": {"model_type": "char", "vocab_size": 80, "byte_fallback": False},
}
ALPHABET = [*"abcdest .,()\n\t▁é🤖", "  "]


RANDOM = random.Random(0)
TEXTS = [
    "Hello, world!", "a  b   c    d          e\n\n\n\n\n\nf \t \n  g", "trailing   ", "   leading",
    "\n", " ", "", "  ", "emoji 👩‍👩‍👧‍👦 🇨🇭 🤖!", "naïve café — “quotes” ﬁ e\u0301",
    "你好，世界 مرحبا", "x▁y ▁z", "\x00\x01 \r\n w", "1984 3.14159", "<0x41> <s", "▁", "▁▁a",
    "aaaaaaaaaaaaa ssssssss tttt", "<cut>a<cut> b <cut>  c<cut>>>", topics["typesseq"][:3000],
    *("".join(RANDOM.choices(ALPHABET, k=RANDOM.randrange(1, 60))) for _ in range(200)),
]  # fmt: skip


@functools.cache
def trained(**changes):
    """A model file, trained on the pages of Python's help."""
    lines = [line.replace("    ", "  ") for topic in topics.values() for line in topic.split("\n")]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines[:4000] if line.strip()]),
        model_writer=out, **LLAMA | {k: list(v) if isinstance(v, tuple) else v
                                     for k, v in changes.items()},
    )  # fmt: skip
    return out.getvalue()


def model_of(kind):
    return trained(**{k: tuple(v) if isinstance(v, list) else v for k, v in KINDS[kind].items()})


def changed(change):
    """A sound model file after a change."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained())
    change(proto)
    return proto.SerializeToString()


@pytest.fixture
def write(tmp_path):
    """Writes a directory; JSON files by their stem."""

    def make(raw, **files):
        (tmp_path / "tokenizer.model").write_bytes(raw)
        for stem, data in files.items():
            (tmp_path / f"{stem}.json").write_text(json.dumps(data))
        return tmp_path

    return make


def opened(directory):
    return load_tokenizer(directory, rows=2**20)


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_sentencepieces(kind, legacy, write):
    raw = model_of(kind)
    ours = opened(write(raw, tokenizer_config={"legacy": legacy}))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=raw)
    assert ours.notes == () and ours.vocab_size == theirs.vocab_size()
    for text in TEXTS:
        expected = theirs.encode(text)
        assert ours.encode(text, add_bos=False) == expected, text
        if theirs.unk_id() not in expected and "▁" not in text:
            assert ours.decode(expected) == theirs.decode(expected)


def test_a_text_begins_as_transformers_begins_it(write):
    directory = write(trained())
    bare = opened(directory).encode("a b", add_bos=False)
    assert opened(directory).encode("a b") == [1, *bare]
    write(trained(), tokenizer_config={"add_bos_token": False})
    assert opened(directory).encode("a b") == bare
    write(trained(), tokenizer_config={"bos_token": {"content": "</s>"}, "add_bos_token": None})
    assert opened(directory).encode("a b") == [2, *bare]
    (directory / "tokenizer_config.json").unlink()
    write(changed(lambda m: setattr(m.trainer_spec, "bos_id", -1)))
    assert not opened(directory).adds_bos


@pytest.mark.parametrize(
    ("settings", "behind", "first"),
    [({}, "▁", "▁"), ({"legacy": False}, "", "▁"), ({"add_prefix_space": False}, "", "")],
)
def test_spaces_before_a_text_and_behind_special_tokens(settings, behind, first, write):
    ours = opened(write(trained(), tokenizer_config=settings))
    spelled = lambda text: [ours.token(i) for i in ours.encode(text, add_bos=False)]  # noqa: E731
    assert spelled("q") == ([first, "q"] if first else ["q"])
    assert spelled("</s>q") == ["</s>", *([behind] if behind else []), "q"]
    assert spelled(" q")[-1:] == ["q"] and "".join(spelled(" q")) == f"{first}▁q"


def test_an_answer_keeps_its_first_space(write):
    ours = opened(write(trained()))
    prompt, whole = ours.encode("The statement is"), ours.encode("The statement is not é")
    assert whole[: len(prompt)] == prompt
    assert ours.decode(whole[len(prompt) :]) == "not é"
    assert ours.continuation(prompt, whole[len(prompt) :]) == " not é"


def test_tokens_that_were_added_later(write):
    n = sentencepiece.SentencePieceProcessor(model_proto=trained()).vocab_size()
    write(
        trained(),
        added_tokens={"<a>": n, "<b>": n + 1, "</s>": 2},
        tokenizer_config={
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True},
                str(n + 1): {"content": "<b>", "special": False, "lstrip": True, "rstrip": True},
                str(n + 2): {"content": "<c>", "special": True, "normalized": False},
            },
            "unk_token": "<unk>",
        },
    )
    directory = write(trained(), special_tokens_map={
        "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "[PAD]",
        "additional_special_tokens": ["<a>", {"content": "<d>"}],
    })  # fmt: skip
    ours = opened(directory)
    assert ours.encode("<a><c><d>[PAD]</s><unk>", add_bos=False) == [n, n + 2, n + 4, n + 3, 2, 0]
    plain = ours.encode("x", add_bos=False)
    assert ours.encode("x  <b> \nx", add_bos=False) == [*plain, n + 1, *plain]
    assert ours.encode("  <b>  <b>", add_bos=False) == [n + 1, n + 1]
    # Many spaces take no longer than many letters.
    assert len(ours.encode(" " * 200_000 + "<a>", add_bos=False)) > 1000
    # Special ones are hidden.
    assert ours.decode([*plain, n, n + 1, n + 2, n + 3, 2]) == "x<b>"
    assert ours.vocab_size == n + 5


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<a>": 9999}}, "added token '<a>' has id 9999, but by the vocabulary"),
        ({"added_tokens": {"<s>": 700}}, "added token '<s>' has id 700, but by the .* is 1"),
        ({"added_tokens": {"<a>": "3"}}, r"added_tokens\.json: <a>: expected an integer"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "y"}}}}, "ids of tokens"),
        ({"tokenizer_config": {"added_tokens_decoder": {"700": "y"}}}, "expected an object"),
        ({"tokenizer_config": {"legacy": "yes"}}, "legacy: expected null or true or false"),
        ({"special_tokens_map": {"pad_token": 3}}, r"special_tokens_map\.json: pad_token"),
    ],
)
def test_files_beside_it_that_contradict_it(files, message, write):
    with pytest.raises(CheckpointError, match=message):
        opened(write(trained(), **files))


def test_pieces_of_equal_scores(write):
    """As vocabularies have them that somebody extended: the leftmost pair is joined first."""

    def extend(proto):
        have = {piece.piece for piece in proto.pieces}
        words = sorted({word for text in topics.values() for word in text.split() if len(word) > 3})
        for word in RANDOM.sample(words, 300):
            if word[1:4] not in have:
                proto.pieces.add(piece=word[1:4], score=0.0, type=1)
                have.add(word[1:4])

    raw = changed(extend)
    ours, theirs = opened(write(raw)), sentencepiece.SentencePieceProcessor(model_proto=raw)
    assert ours.vocab_size > 800
    for text in topics.values():
        assert ours.encode(text[:2000], add_bos=False) == theirs.encode(text[:2000])


def test_what_is_not_implemented_is_refused(write):
    for raw in (
        trained(treat_whitespace_as_suffix=True),
        changed(lambda m: setattr(m.normalizer_spec, "escape_whitespaces", False)),
    ):
        with pytest.raises(CheckpointError, match=r"asks for spaces .*not implemented. Make "):
            opened(write(raw))


def test_damaged_files_are_refused(write):
    sound, rng = trained(), random.Random(0)
    assert opened(write(sound))
    for raw in (b"", b"\x00", sound[: len(sound) // 2], b"{}", b"\xff" * 50, sound[:-3]):
        with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
            opened(write(raw))
    for change in (
        lambda m: m.pieces.add(piece="</s>"), lambda m: m.pieces.add(piece=""),
        lambda m: m.ClearField("pieces"), lambda m: setattr(m.pieces[9], "type", 1),
        lambda m: m.pieces.add(piece="qqqq", score=float("nan")),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"tokenizer\.model: (SentencePiece|expected)"):
            opened(write(changed(change)))
    for _ in range(100):
        raw = bytearray(sound)
        for _ in range(rng.choice((1, 3, 30))):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        try:
            opened(write(bytes(raw))).encode("any text")
        except CheckpointError as error:
            assert len(str(error)) < 600 and "\n" not in str(error)


def small(proto):
    """Bytes and a few letters, so that they fit the tiny model."""
    pieces = [piece for piece in proto.pieces if piece.type != 1 or len(piece.piece) == 1]
    kept = [type(piece).FromString(piece.SerializeToString()) for piece in pieces[:VOCAB]]
    proto.ClearField("pieces")
    proto.pieces.extend(kept)


def test_a_model_answers(tmp_path):
    directory = write_model(tmp_path / "tiny")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    (directory / "tokenizer.model").write_bytes(changed(small))
    (directory / "added_tokens.json").write_text(json.dumps({"[PAD]": VOCAB}))
    model = load(directory)
    assert model.tokenizer.vocab_size == VOCAB + 1
    made = ttq.generate(model, ["a e"], recipe=None, max_new_tokens=3)
    assert made.prompt_tokens == [1 + len(model.tokenizer.encode("a e", add_bos=False))]
    with pytest.raises(PromptError, match=r"the token '\[PAD\]'"):
        model.tokenizer.encode("a [PAD]")

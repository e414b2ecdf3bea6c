"""Directories with SentencePiece's `tokenizer.model` alone: the ids are SentencePiece's own."""

import functools
import io
import json
import random
import subprocess
import sys
from pydoc_data.topics import topics

import pytest
import sentencepiece
from tiny_files import VOCAB, write_model
from transformers.convert_slow_tokenizer import import_protobuf

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
    proto = import_protobuf().ModelProto.FromString(trained())
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
    directory = write(raw, tokenizer_config={"legacy": legacy})
    if (kind, legacy) == ("spaces removed", False):
        with pytest.raises(CheckpointError, match="legacy = false"):
            opened(directory)
        return
    ours = opened(directory)
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


def test_tokens_that_were_added_later(write):
    n = sentencepiece.SentencePieceProcessor(model_proto=trained()).vocab_size()
    write(
        trained(),
        added_tokens={"<a>": n, "<b>": n + 1, "</s>": 2},
        tokenizer_config={
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True},
                str(n + 1): {"content": "<b>", "special": False, "lstrip": True},
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
    assert ours.encode("x  <b>x", add_bos=False) == [*plain, n + 1, *plain]
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


def test_other_kinds_of_models_are_refused(write):
    unigram = trained(model_type="unigram")
    for raw, what in {
        unigram: "a vocabulary of Unigram, not of BPE",
        trained(model_type="char", vocab_size=80, byte_fallback=False): "vocabulary of characters",
        trained(normalization_rule_name="nmt_nfkc"): "a character map",
        trained(treat_whitespace_as_suffix=True): "spaces at the ends of words",
    }.items():
        with pytest.raises(CheckpointError, match=f"{what}.*not implemented. Make "):
            opened(write(raw))


def test_pieces_of_equal_scores_are_told(write):
    def extend(proto):
        for text in ("zxq", "xqz"):
            proto.pieces.add(piece=text, score=0.0, type=1)

    # The first piece that was trained has 0 too.
    (note,) = opened(write(changed(extend))).notes
    assert note.startswith("tokenizer.model has 2 pieces of equal scores")


def test_damaged_files_are_refused(write):
    sound, rng = trained(), random.Random(0)
    assert opened(write(sound))
    for raw in (b"", b"\x00", sound[: len(sound) // 2], b"{}", b"\xff" * 50, sound[:-3]):
        with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
            opened(write(raw))
    for change in (
        lambda m: m.pieces.add(piece="</s>"), lambda m: m.pieces.add(piece=""),
        lambda m: m.pieces.add(piece="x" * 1025), lambda m: m.ClearField("pieces"),
        lambda m: m.pieces.add(piece="qqq", score=float("nan")),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="The file is damaged"):
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


def test_without_the_library_that_trains_such_files(write):
    directory = write(trained())
    script = (
        "import sys; sys.modules['sentencepiece'] = None\n"
        "from pathlib import Path\n"
        "from ttq_jax.checkpoint.hf_tokenizer import load_tokenizer\n"
        "print(load_tokenizer(Path(sys.argv[1]), rows=9999).encode('the  text é'))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, directory], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == opened(directory).encode("the  text é")

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ttq_jax.evaluation import corpora, hub_text
from ttq_jax.evaluation.corpora import (
    DOMAINS,
    CorpusError,
    calibration_windows,
    cut_windows,
    read_corpus,
    sha256,
)
from ttq_jax.evaluation.hub_text import HubText, parse_hub_spec


class Letters:
    """A token per character; begin-of-text is 0 where there is one."""

    def __init__(self, bos: bool):
        self.bos = bos
        self.read = 0

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        self.read += len(text)
        return [0] * (self.bos and add_bos) + [ord(c) for c in text]


def text_of(windows, begin: int) -> str:
    return "".join(chr(i) for row in windows for i in row[begin:])


@pytest.mark.parametrize("bos", [False, True])
def test_windows_are_consecutive_and_whole(bos):
    text = "abcdefghijklmnopqrstuvwxyz"
    windows = cut_windows(Letters(bos), text, 8)
    assert windows.dtype == np.int32
    assert windows.shape == (3, 8)
    assert text.startswith(text_of(windows, int(bos)))
    assert (windows[:, 0] == 0).all() == bos
    assert (windows[:, bos:] > 0).all()
    np.testing.assert_array_equal(cut_windows(Letters(bos), text, 8, max_windows=2), windows[:2])
    np.testing.assert_array_equal(cut_windows(Letters(bos), text, 8, max_windows=9), windows)


def test_a_text_that_begins_with_the_begin_gets_no_second_one():
    text = "abcdefghijkl"
    for bos in (True, False):
        twice = cut_windows(Letters(bos), "\0" + text, 4)
        expected = text if bos else "\0" + text
        np.testing.assert_array_equal(twice, cut_windows(Letters(bos), expected, 4))


def test_few_windows_of_a_long_text_do_not_read_all_of_it():
    tokenizer, text = Letters(True), "abcdefg" * 100_000
    windows = cut_windows(tokenizer, text, 8, max_windows=2)
    assert tokenizer.read < 1000
    assert text_of(windows, 1) == text[:14]


def test_a_text_of_long_tokens_is_read_whole():
    class Pages(Letters):
        def encode(self, text: str, add_bos: bool = True) -> list[int]:
            return [len(page) for page in text.split("\n") if page]

    text = ("x" * 100 + "\n") * 50
    assert cut_windows(Pages(False), text, 10, max_windows=5).shape == (5, 10)


def test_a_short_text_states_lengths():
    with pytest.raises(CorpusError, match=r"5 tokens, fewer than one window of 8.*begin-of-text"):
        cut_windows(Letters(True), "abcde", 8)
    with pytest.raises(CorpusError, match="at least 2 tokens per window"):
        cut_windows(Letters(True), "abcde", 1)
    with pytest.raises(CorpusError, match="at least 1 window"):
        cut_windows(Letters(False), "abcde", 2, max_windows=0)


def test_calibration_windows():
    assert calibration_windows(Letters(True), "a" * 100, tokens=40, window=16).shape == (2, 16)
    assert calibration_windows(Letters(True), "a" * 100, tokens=12, window=16).shape == (1, 12)
    with pytest.raises(CorpusError, match="fewer than the 1000"):
        calibration_windows(Letters(False), "a" * 100, tokens=1000, window=10)


def test_files(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("größer 三\n", "utf-8")
    assert read_corpus(str(path)) == "größer 三\n"
    assert sha256("größer") == sha256("größer")
    path.write_bytes("größer".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"UTF-8.*byte 2"):
        read_corpus(str(path))
    path.write_text("\n \n")
    with pytest.raises(CorpusError, match="found none"):
        read_corpus(str(path))
    with pytest.raises(CorpusError, match="no such file"):
        read_corpus(str(tmp_path / "other.txt"))
    with pytest.raises(CorpusError, match="cannot be read"):
        read_corpus(str(tmp_path))


def test_a_part_of_a_text_begins_and_ends_with_a_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {i}\n" for i in range(10)))
    first, second = read_corpus(f"{path}[:50%]"), read_corpus(f"{path}[50%:]")
    assert first + second == path.read_text()
    assert first.endswith("line 5\n")
    assert read_corpus(f"{path}[:]") == read_corpus(f"{path}[0%:100%]") == path.read_text()
    thirds = [read_corpus(f"{path}[{a}%:{b}%]") for a, b in ((0, 30), (30, 60), (60, 100))]
    assert "".join(thirds) == path.read_text()
    for bad in ("[50%:50%]", "[70%:60%]", "[0%:101%]"):
        with pytest.raises(CorpusError, match="A < B <= 100"):
            read_corpus(f"{path}{bad}")
    # A part of one long line would be the next line's beginning: there is none.
    path.write_text("one line")
    with pytest.raises(CorpusError, match="found none"):
        read_corpus(f"{path}[50%:]")


def test_one_field_of_json_lines_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "q\u2028r", "url": "x.example", "turns": ["a", "b"], "year": 1}, {"text": "x"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\r\n\r\n".join(lines) + "\n", "utf-8")
    assert read_corpus(str(path)) == "q\u2028r\n\nx"
    path.write_text(f"{lines[0]}\n", "utf-8")
    assert read_corpus(f"{path}:turns") == "a\nb"
    assert read_corpus(f"{path}:turns,url") == "a\nb\nx.example"
    assert read_corpus(f"{path}:url[:100%]") == "x.example"
    for field in ("body", "year"):
        with pytest.raises(CorpusError, match=rf"line 1: .*{field}.* text, url, turns, year\."):
            read_corpus(f"{path}:{field}")
    for bad, says in {
        "[1]": "a JSON object", "{": "valid JSON", '{"text": "a", "text": "b"}': "twice",
        '{"text": "a", "n": 1e999}': "no computer", '{"text": "\\ud800"}': "valid JSON",
    }.items():  # fmt: skip
        path.write_text('{"text": "b"}\n' + bad)
        with pytest.raises(CorpusError, match=f"line 2: expected .*{says}"):
            read_corpus(str(path))


def test_builtin_texts_have_names():
    assert read_corpus("builtin:python") == DOMAINS[1].read()
    with pytest.raises(CorpusError, match=r"builtin:\{prose,python,"):
        read_corpus("builtin:poetry")


def test_hub_specs():
    assert parse_hub_spec("a/b") == HubText(path="a/b")
    assert parse_hub_spec("a/b:train") == HubText(path="a/b", split="train")
    assert parse_hub_spec("a/b:en") == HubText(path="a/b", config="en")
    assert parse_hub_spec("a/b:en:train") == HubText(path="a/b", config="en", split="train")
    assert parse_hub_spec("a/b::train") == HubText(path="a/b", split="train")
    wikitext = parse_hub_spec("wikitext2:train")
    assert (wikitext.path, wikitext.split) == ("Salesforce/wikitext", "train")
    assert wikitext.config == "wikitext-2-raw-v1"
    assert parse_hub_spec("c4").max_rows
    assert parse_hub_spec("gsm8k:train").columns == ("question", "answer")
    for bad in ("", ":en", "a:b:c:d"):
        with pytest.raises(CorpusError, match="hf:NAME"):
            parse_hub_spec(bad)


@pytest.fixture(scope="module")
def local_datasets(tmp_path_factory):
    """Directories in the hub's layout."""
    root = tmp_path_factory.mktemp("hub")
    rows = {
        "texts/data/test.jsonl": ['{"text": "first"}', '{"text": "größer"}'],
        "texts/data/train.jsonl": ['{"text": "training"}'],
        "poems/test.jsonl": ['{"verse": "one", "year": 1}', '{"verse": "two", "year": 2}'],
        "pairs/test.jsonl": ['{"question": "q", "answer": "a"}'],
    }
    for name, lines in rows.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", "utf-8")
    return root


def in_a_process(tmp_path, *specs, **env) -> list[str]:
    """Reads corpora where `datasets` starts afresh: it fixes its cache and its mode on import."""
    program = (
        "import sys\nfrom ttq_jax.evaluation.corpora import CorpusError, read_corpus\n"
        "for spec in sys.argv[1:]:\n"
        "    try: print(repr(read_corpus(spec)))\n"
        "    except CorpusError as e: print('refused:', ' '.join(str(e).split()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *specs], capture_output=True, text=True, timeout=300,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_local_datasets_and_no_network(local_datasets, tmp_path):
    texts, train, poems, pairs, split, wikitext, c4, other = in_a_process(
        tmp_path,
        *(f"hf:{local_datasets}/{n}" for n in ("texts", "texts:train", "poems", "pairs")),
        f"hf:{local_datasets}/poems:validation",
        "hf:wikitext2", "hf:c4", "hf:nobody/nothing",
    )  # fmt: skip
    assert texts == repr("first\n\ngrößer")
    assert train == repr("training")
    assert poems == repr("one\n\ntwo")
    assert "question, answer" in pairs
    for line, name in [
        (split, "validation"), (wikitext, "Salesforce/wikitext"), (c4, "allenai/c4"),
        (other, "nobody/nothing"),
    ]:  # fmt: skip
        assert line.startswith("refused: cannot load dataset")
        assert name in line


def test_streamed_rows_are_capped(local_datasets, monkeypatch):
    source = HubText(path="x", columns=("text",), join=" ", max_rows=2)
    monkeypatch.setitem(hub_text.SHORT_NAMES, "many", source)

    class Rows:
        features = None

        def __iter__(self):
            return iter([{"text": "a"}, {"text": "b"}, {"text": "c"}])

    monkeypatch.setattr(hub_text, "_load_rows", lambda source: Rows())
    assert read_corpus("hf:many") == "a b"


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda d: d.name)
def test_demo_texts_are_on_this_machine(domain):
    text = domain.read()
    assert len(text) > 10_000
    assert text.isprintable() or "\n" in text


def test_a_missing_package_is_named():
    with pytest.raises(CorpusError, match="no_such_package"):
        corpora._package_file("no_such_package", "x.txt")
    assert Path(corpora.__file__).read_text() == corpora._package_file("ttq_jax.evaluation.corpora")

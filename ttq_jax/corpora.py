"""Text -> evaluation and calibration windows.

A corpus is named by one string: a UTF-8 text file, or `hf:NAME[:CONFIG][:SPLIT]` for a Hugging
Face dataset (NAME may be a local directory in the hub's layout). The evaluation sets that papers
quote have short names with the usual split and way of joining, so that a number can be set
against theirs.
"""

import dataclasses
import hashlib
import importlib.util
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# Characters per token that no natural text exceeds on average.
_LONG_TOKEN = 16


class CorpusError(ValueError):
    """A text that cannot be used; the message says what to change."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, add_bos: bool = True) -> Sequence[int]:
        """Token ids, after the begin-of-text token where the model uses one."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubText:
    """Where a dataset's text is and how its rows become one.

    Attributes:
      path: hub id or local directory.
      config: configuration name; None for the only one.
      split: which rows.
      column: which column; None finds it.
      join: what stands between two rows.
      max_rows: rows taken from the start, streamed; None takes all.
      data_files: {split: glob} inside the repository; None for its own layout.
      revision: branch of the repository.
    """

    path: str
    config: str | None = None
    split: str = "test"
    column: str | None = None
    join: str = "\n\n"
    max_rows: int | None = None
    data_files: tuple[tuple[str, str], ...] | None = None
    revision: str | None = None


# The joins and the cut of C4 are those of the GPTQ evaluation, which later papers kept.
SHORT_NAMES = {
    "wikitext2": HubText(path="Salesforce/wikitext", config="wikitext-2-raw-v1", column="text"),
    "ptb": HubText(
        path="ptb-text-only/ptb_text_only",
        column="sentence",
        join=" ",
        # The repository holds a script, which is never run: the hub's own conversion is read.
        revision="refs/convert/parquet",
        data_files=(
            ("train", "penn_treebank/train/*.parquet"),
            ("validation", "penn_treebank/validation/*.parquet"),
            ("test", "penn_treebank/test/*.parquet"),
        ),
    ),
    "c4": HubText(
        path="allenai/c4",
        split="validation",
        column="text",
        join=" ",
        max_rows=1100,
        data_files=(
            ("train", "en/c4-train.00000-of-01024.json.gz"),
            ("validation", "en/c4-validation.00000-of-00008.json.gz"),
        ),
    ),
}

_SPLITS = ("train", "validation", "test", "dev")


def parse_hub_spec(spec: str) -> HubText:
    """Reads `NAME[:CONFIG][:SPLIT]`.

    Args:
      spec: what follows "hf:". With one part after the name, it is the split if it is called
        like one (train, validation, test, dev), else the configuration.

    Returns:
      Where the text is; the split is "test" unless given or fixed by a short name.

    Raises:
      CorpusError: no name, or too many parts.
    """
    name, *rest = spec.split(":")
    if not name or len(rest) > 2:
        raise CorpusError(f"corpus: expected hf:NAME[:CONFIG][:SPLIT], got hf:{spec}")
    known = SHORT_NAMES.get(name, HubText(path=name))
    if len(rest) == 2:
        return dataclasses.replace(known, config=rest[0] or known.config, split=rest[1])
    if rest and rest[0] in _SPLITS:
        return dataclasses.replace(known, split=rest[0])
    return dataclasses.replace(known, config=rest[0]) if rest else known


def _load_rows(source: HubText) -> Any:
    """The dataset's rows, through the `datasets` library.

    Raises:
      CorpusError: it cannot be had.
    """
    import datasets

    local = Path(source.path).expanduser()
    try:
        return datasets.load_dataset(
            str(local) if local.is_dir() else source.path,
            source.config,
            split=source.split,
            revision=source.revision,
            data_files=dict(source.data_files) if source.data_files else None,
            streaming=source.max_rows is not None,
        )
    except (ConnectionError, OSError, ValueError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise CorpusError(
            f"cannot load dataset {source.path!r} (config {source.config}, split "
            f"{source.split!r}): {reason}; check the name and the network, or give a text file"
        ) from e


def _text_column(source: HubText, rows: Any) -> str:
    """The column that holds the text.

    Raises:
      CorpusError: it cannot be told.
    """
    features = rows.features or {}
    strings = [n for n, f in features.items() if getattr(f, "dtype", None) in _STRINGS]
    for name in (source.column, "text", "sentence"):
        if name in strings or (name and not features):
            return str(name)
    if len(strings) == 1:
        return strings[0]
    raise CorpusError(
        f"dataset {source.path!r}: expected a column 'text' or 'sentence', or a single column of "
        f"strings; it has {', '.join(features)}; write the text you want to a file instead"
    )


_STRINGS = ("string", "large_string")


def _read_hub(spec: str) -> str:
    """All rows of a dataset's text column, joined."""
    source = parse_hub_spec(spec)
    rows = _load_rows(source)
    column = _text_column(source, rows)
    if source.max_rows is None:
        return source.join.join(t for t in rows[column] if t is not None)
    return source.join.join(row[column] for row in itertools.islice(rows, source.max_rows))


def read_file(path: Path) -> str:
    """The text of a UTF-8 file.

    Args:
      path: of the file.

    Returns:
      Its text, with every line end a newline.

    Raises:
      CorpusError: it is not there, not a file or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise CorpusError(
            f"{path}: expected UTF-8 text, but byte {e.start} is not; convert the file"
        ) from e
    except FileNotFoundError as e:
        raise CorpusError(
            f"{path}: no such file; expected a text file (a corpus may also be hf:NAME)"
        ) from e
    except OSError as e:
        raise CorpusError(f"{path}: cannot be read ({e.strerror or e})") from e


def read_corpus(spec: str) -> str:
    """The text that a string names.

    Args:
      spec: path of a UTF-8 text file, or "hf:NAME[:CONFIG][:SPLIT]", NAME being a key of
        `SHORT_NAMES`, a hub id or a local directory.

    Returns:
      The text, not empty.

    Raises:
      CorpusError: it cannot be read, or there is no text in it.
    """
    text = _read_hub(spec[3:]) if spec.startswith("hf:") else read_file(Path(spec).expanduser())
    if not text.strip():
        raise CorpusError(f"{spec}: expected some text, found none")
    return text


def sha256(text: str) -> str:
    """Hexadecimal digest of a text's UTF-8 bytes: what was scored, beyond its name."""
    return hashlib.sha256(text.encode()).hexdigest()


def begin_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer puts before every text: (begin-of-text,) or ()."""
    return tuple(tokenizer.encode("", add_bos=True))


def cut_windows(
    tokenizer: Tokenizer, text: str, window: int, *, max_windows: int | None = None
) -> np.ndarray:
    """Consecutive windows of a text that do not overlap; the remainder is dropped.

    Args:
      tokenizer: the model's.
      text: the corpus.
      window: W >= 2, tokens per window. Each window begins as the model's texts do: with a
        begin-of-text token, and then W − 1 tokens of text, where its tokenizer uses one.
      max_windows: take only the first so many, >= 1; None takes all.

    Returns:
      int32[n, W], n >= 1.

    Raises:
      CorpusError: the text is shorter than one window, or a number is out of range.
    """
    begin = begin_tokens(tokenizer)
    body = window - len(begin)
    if body < 1 or (max_windows is not None and max_windows < 1):
        raise CorpusError(
            f"windows: expected at least {len(begin) + 1} tokens per window and at least 1 window, "
            f"got {window} and {max_windows}"
        )
    ids = _encode_enough(tokenizer, text, None if max_windows is None else body * max_windows)
    n = len(ids) // body
    if n == 0:
        raise CorpusError(
            f"the corpus has {len(ids)} tokens, shorter than one window of {window}"
            + (f" ({body} and begin-of-text)" if begin else "")
            + "; give more text or a smaller window (--window on the command line)"
        )
    n = n if max_windows is None else min(n, max_windows)
    rows = np.asarray(ids[: n * body], np.int32).reshape(n, body)
    return np.concatenate([np.tile(np.asarray(begin, np.int32), (n, 1)), rows], axis=1)


def _encode_enough(tokenizer: Tokenizer, text: str, needed: int | None) -> Sequence[int]:
    """At least the first `needed` tokens, if there are so many, without reading all of a long text.

    The text is cut far beyond the last token needed, so those are the tokens of the whole text.
    """
    if needed is not None and len(text) > needed * _LONG_TOKEN:
        ids = tokenizer.encode(text[: needed * _LONG_TOKEN], add_bos=False)
        if len(ids) >= 2 * needed:
            return ids
    return tokenizer.encode(text, add_bos=False)


def calibration_windows(
    tokenizer: Tokenizer, text: str, *, tokens: int, window: int = 512
) -> np.ndarray:
    """The first tokens of a calibration corpus, as windows.

    Args:
      tokenizer: the model's.
      text: the corpus; a shorter one is an error, never silently less calibration.
      tokens: how many to read in all, begin-of-text tokens included, >= 2; rounded down to
        whole windows.
      window: tokens per window; `tokens` if that is less.

    Returns:
      int32[n, W], n >= 1.

    Raises:
      CorpusError: the text is shorter than asked for, or a number is out of range.
    """
    window = min(window, tokens)
    if window < 2:
        raise CorpusError(f"calibration tokens: expected at least 2, got {tokens}")
    wanted = tokens // window
    windows = cut_windows(tokenizer, text, window, max_windows=wanted)
    if len(windows) < wanted:
        raise CorpusError(
            f"the calibration corpus gives {windows.size} tokens, fewer than the {tokens} asked "
            "for; give more text or ask for fewer (--calibration-tokens on the command line)"
        )
    return windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
    """A kind of text that is on every machine where this package runs.

    Attributes:
      name: one word.
      source: what it is, for a caption.
      read: gives the text.
    """

    name: str
    source: str
    read: Callable[[], str]


def _python_reference() -> str:
    from pydoc_data.topics import topics

    chapters = ("import", "execmodel", "objects", "customization", "attribute-access", "try")
    return "\n\n".join(topics[c] for c in chapters if c in topics)


def _package_file(package: str, *parts: str) -> str:
    """A text file inside an installed package, found without importing it.

    Raises:
      CorpusError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise CorpusError(f"package {package!r} is not installed; its files are the demo's text")
    origin = Path(spec.origin)
    return read_file(origin.parent.joinpath(*parts) if parts else origin)


_LOCALES = (
    "de_DE", "fr_FR", "es_ES", "it_IT", "pl_PL", "nl_NL", "pt_BR", "sv_SE", "tr_TR", "ru_RU",
    "da_DK", "fi_FI", "hu_HU", "uk_UA", "vi_VN",
)  # fmt: skip


def _translations() -> str:
    """Short phrases about time and numbers, one language after the other."""
    catalogues = [
        _package_file("humanize", "locale", name, "LC_MESSAGES", "humanize.po") for name in _LOCALES
    ]
    phrases = re.compile(r'^msgstr(?:\[\d\])? "(..+)"$', re.MULTILINE)
    return "\n\n".join("\n".join(phrases.findall(text)) for text in catalogues)


DOMAINS: tuple[Domain, ...] = (
    Domain(name="prose", source="the Python language reference", read=_python_reference),
    Domain(
        name="python",
        source="argparse.py of Python's standard library",
        read=lambda: _package_file("argparse"),
    ),
    Domain(
        name="javascript",
        source="treescope's arrayviz.js",
        read=lambda: _package_file("treescope", "_internal", "js", "arrayviz.js"),
    ),
    Domain(
        name="languages",
        source="humanize's phrases in German, French, Spanish and twelve more",
        read=_translations,
    ),
)

"""Text -> evaluation and calibration windows.

A corpus is named by one string, `SOURCE[A%:B%]`. SOURCE is a UTF-8 text file, a `.jsonl` file (the
field "text" of each line is read, or others: `FILE.jsonl:FIELD,FIELD`), `hf:NAME[:CONFIG][:SPLIT]`
for a Hugging Face dataset (NAME may be a local directory in the hub's layout), or `builtin:NAME`
for a text that comes with every installation. The optional percentages take a part of the text:
`[:50%]` to calibrate and `[50%:]` to score.
"""

import dataclasses
import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ttq_jax.errors import expect, shown
from ttq_jax.evaluation.hub_text import CorpusError, read_hub
from ttq_jax.foreign import named, parse_json
from ttq_jax.text import read_text

# Characters per token that no natural text exceeds on average.
_LONG_TOKEN = 16


class Tokenizer(Protocol):
    """The part of a tokenizer that is used here."""

    def encode(self, text: str, add_bos: bool = True) -> Sequence[int]:
        """Token ids, after the begin-of-text token where the model uses one."""
        ...


# A part of a text, as Hugging Face's datasets write it.
_PART = re.compile(r"(.+)\[(?:(\d{1,3})%)?:(?:(\d{1,3})%)?\]")


def read_corpus(spec: str) -> str:
    """Reads the corpus that a string names.

    Args:
      spec: "SOURCE" or "SOURCE[A%:B%]" with 0 <= A < B <= 100, see the module's docstring; a part
        begins at the start of a line.

    Returns:
      The text, not empty.

    Raises:
      CorpusError: it cannot be read, or there is no text in it.
    """
    expect("corpus", spec, str, "a string that names one, as in builtin:prose")
    part = _PART.fullmatch(spec)
    text = _read_source(part[1] if part else spec)
    if part:
        first, last = int(part[2] or 0), int(part[3] or 100)
        if not first < last <= 100:
            raise CorpusError(f"{spec}: expected a part [A%:B%] with 0 <= A < B <= 100")
        begin, end = (_line_at(text, share) for share in (first, last))
        text = text[begin:end]
    if not text.strip():
        raise CorpusError(f"{spec}: expected some text, found none")
    return text


def _line_at(text: str, percent: int) -> int:
    """The start of the first line after that percentage of a text."""
    at = len(text) * percent // 100
    return text.find("\n", at) + 1 or len(text) if 0 < at < len(text) else at


def _read_source(source: str) -> str:
    """A whole text.

    Raises:
      CorpusError: it cannot be read.
    """
    if source.startswith("hf:"):
        return read_hub(source[3:])
    if source.startswith("builtin:"):
        known = {domain.name: domain for domain in DOMAINS}
        if source[8:] not in known:
            raise CorpusError(
                f"corpus: expected builtin:{{{','.join(known)}}}, got {shown(source)}"
            )
        return known[source[8:]].read()
    kinds = "a corpus is a text file, hf:NAME or builtin:NAME"
    file, is_lines, field = source.rpartition(".jsonl")
    if is_lines and (not field or field[0] == ":"):
        return _fields_of(f"{file}.jsonl", read_text(f"{file}.jsonl", CorpusError), field[1:])
    return read_text(source, CorpusError, missing=kinds)


def _fields_of(source: str, text: str, fields: str) -> str:
    """Some fields of JSON lines, with an empty line between lines; blank lines are skipped.

    Raises:
      CorpusError: a line is no JSON object, or lacks a field, or that is no string.
    """
    rows, names = [], (fields or "text").split(",")
    # Not splitlines: JSON strings may hold U+2028, which is no line end there.
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{source}, line {i}", CorpusError)
        if not isinstance(row, dict):
            raise CorpusError(f"{source}, line {i}: expected a JSON object, got {shown(row)}")
        parts: list[str] = []
        for name in names:
            value = row.get(name)
            texts: list[Any] = value if isinstance(value, list) else [value]
            if not all(isinstance(one, str) for one in texts):
                raise CorpusError(
                    f"{source}, line {i}: expected a string, or a list of them, in the field "
                    f"{name!r}, got {shown(value)}; its fields are {named(row) or 'none'}. "
                    f"Name those to read after a colon, as in {source}:FIELD or :FIELD,FIELD"
                )
            parts += texts
        rows.append("\n".join(parts))
    return "\n\n".join(rows)


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
      window: W >= 2, tokens per window. Where the tokenizer uses a begin-of-text token, each window
        begins with it and has W − 1 tokens of text.
      max_windows: how many are taken, from the first on, >= 1; None takes all.

    Returns:
      int32[n, W], n >= 1.

    Raises:
      CorpusError: the text is shorter than one window, or a number is out of range.
    """
    expect("text", text, str, "a string")
    expect("window", window, (int, np.integer), "a whole number of tokens")
    begin = begin_tokens(tokenizer)
    body = window - len(begin)
    if body < 1 or (max_windows is not None and max_windows < 1):
        raise CorpusError(
            f"windows: expected at least {len(begin) + 1} tokens per window and at least 1 window, "
            f"got {window} and {max_windows}"
        )
    ids = _encode_enough(tokenizer, text, None if max_windows is None else body * max_windows)
    # A text that begins with the token, as a rendered template may, gets no second one.
    ids = ids[len(begin) :] if begin and tuple(ids[: len(begin)]) == begin else ids
    n = len(ids) // body
    if n == 0:
        raise CorpusError(
            f"the corpus has {len(ids)} tokens, fewer than one window of {window}"
            + (f" ({body} and begin-of-text)" if begin else "")
            + "; give more text or a smaller window (--window on the command line)"
        )
    n = n if max_windows is None else min(n, max_windows)
    rows = np.asarray(ids[: n * body], np.int32).reshape(n, body)
    return np.concatenate([np.tile(np.asarray(begin, np.int32), (n, 1)), rows], axis=1)


def _encode_enough(tokenizer: Tokenizer, text: str, needed: int | None) -> Sequence[int]:
    """At least the first `needed` tokens, or all; does not read the whole of a long text.

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
    """A text that comes with every installation of this package.

    Attributes:
      name: one word.
      source: what it is, for a caption.
      read: returns the text.
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
        raise CorpusError(
            f"package {package!r}, which has the text, is not installed; run: pip install {package}"
        )
    origin = Path(spec.origin)
    return read_text(origin.parent.joinpath(*parts) if parts else origin, CorpusError)


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

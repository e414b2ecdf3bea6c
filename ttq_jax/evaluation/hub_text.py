"""Text of Hugging Face datasets, from the hub or from a local directory in its layout.

The evaluation sets that papers quote have short names with the usual split and way of joining, so
that a number can be set against theirs.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from ttq_jax.errors import Error


class CorpusError(Error):
    """A text that cannot be used; the message says what to change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubText:
    """Where a dataset's text is and how its rows become one.

    Attributes:
      path: hub id or local directory.
      config: configuration name; None for the only one.
      split: which rows.
      columns: which columns, each row's joined by a newline; () finds the only one.
      join: what stands between two rows.
      max_rows: rows taken from the start, streamed; None takes all.
      data_files: {split: glob} inside the repository; None for its own layout.
      revision: branch of the repository.
    """

    path: str
    config: str | None = None
    split: str = "test"
    columns: tuple[str, ...] = ()
    join: str = "\n\n"
    max_rows: int | None = None
    data_files: tuple[tuple[str, str], ...] | None = None
    revision: str | None = None


# The joins and the cut of C4 are those of the GPTQ evaluation, which later papers kept.
SHORT_NAMES = {
    "wikitext2": HubText(path="Salesforce/wikitext", config="wikitext-2-raw-v1", columns=("text",)),
    "ptb": HubText(
        path="ptb-text-only/ptb_text_only",
        columns=("sentence",),
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
        columns=("text",),
        join=" ",
        max_rows=1100,
        data_files=(
            ("train", "en/c4-train.00000-of-01024.json.gz"),
            ("validation", "en/c4-validation.00000-of-00008.json.gz"),
        ),
    ),
    "dolly": HubText(
        path="databricks/databricks-dolly-15k", split="train", columns=("instruction", "response")
    ),
    "gsm8k": HubText(path="openai/gsm8k", config="main", columns=("question", "answer")),
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
      CorpusError: they cannot be loaded.
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


def _text_columns(source: HubText, rows: Any) -> tuple[str, ...]:
    """The columns that hold the text.

    Raises:
      CorpusError: it is not clear which they are.
    """
    features = rows.features or {}
    strings = [n for n, f in features.items() if getattr(f, "dtype", None) in _STRINGS]
    for names in (source.columns, ("text",), ("sentence",)):
        if names and (not features or set(names) <= set(strings)):
            return names
    if len(strings) == 1:
        return (strings[0],)
    raise CorpusError(
        f"dataset {source.path!r}: expected a column 'text' or 'sentence', or a single column of "
        f"strings; it has {', '.join(features)}; write the text you want to a file instead"
    )


_STRINGS = ("string", "large_string")


def read_hub(spec: str) -> str:
    """The text of a dataset's rows, joined.

    Args:
      spec: see `parse_hub_spec`.

    Returns:
      The text of every row, or of the first `max_rows`.

    Raises:
      CorpusError: it cannot be loaded, or it is not clear which column is the text.
    """
    source = parse_hub_spec(spec)
    rows = _load_rows(source)
    columns = _text_columns(source, rows)
    if source.max_rows is None and len(columns) == 1:
        return source.join.join(t for t in rows[columns[0]] if t is not None)
    texts = ("\n".join(row[c] for c in columns if row[c] is not None) for row in rows)
    return source.join.join(itertools.islice(texts, source.max_rows))

"""Titles of sections and pictures: the model, the bits, the protocol and the windows."""

from collections.abc import Iterable, Sequence
from typing import Any

from ttq_jax.sweeps import words
from ttq_jax.sweeps.tables import Summary, shared_bits


def windows_said(found: Iterable[Summary]) -> str:
    """How many windows of each corpus were scored."""
    counts = [row["windows"] for one in found for row in one.rows.values()]
    return words.count(counts, "window") + " per corpus"


def _bits_said(found: Iterable[Summary]) -> list[str]:
    bits = shared_bits(found)
    return [] if bits is None else [words.value("bits", bits)]


def setting_said(setting: dict[str, Any], group: Sequence[Summary]) -> str:
    """A setting in words: the model, what is read and scored, and how often.

    Args:
      setting: what the group shares.
      group: its summaries.

    Returns:
      One line.
    """
    axes = [a for a in ("protocol", "window", "prompt_tokens", "dtype", "seed") if a in setting]
    said = [words.value(axis, setting[axis]) for axis in axes]
    return ", ".join([words.model(group[0].row), *_bits_said(group), *said, windows_said(group)])


def place_said(axis: str, shown: Sequence[Summary]) -> str:
    """What a table along an axis is of: the model, and what all its cells share.

    Args:
      axis: what changes.
      shown: its cells, quantized ones.

    Returns:
      One line.
    """
    said = [words.model(shown[0].row) if axis != "model" else "all models", *_bits_said(shown)]
    for key in ("protocol", "window", "prompt_tokens"):
        values = {one.values.get(key) for one in shown}
        if key != axis and len(values) == 1 and None not in values:
            said.append(words.value(key, values.pop()))
    return ", ".join([*said, windows_said(shown)])

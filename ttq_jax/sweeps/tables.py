"""Rows -> numbers: the results of each recipe, compared with the unquantized model.

The gap is the perplexity divided by the unquantized one's on the same windows, minus 1. Its mean
over corpora has an interval: the 2.5th and 97.5th percentile over draws of each corpus's windows,
the same draw for a recipe and its baseline.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ttq_jax.sweeps.rows import Row

# What two perplexities must share to be compared.
SETTING = ("model", "dtype", "protocol", "window", "prompt_tokens", "max_windows", "seed")

_DRAWS = 1000


def gap_draws(
    nll: Sequence[Sequence[float]], base: Sequence[Sequence[float]], scored: int,
    draws: int = _DRAWS,
) -> np.ndarray:  # fmt: skip
    """The mean gap over corpora, and draws of it.

    Args:
      nll: per corpus, per window, the summed negative log-likelihood, nats.
      base: the same of the unquantized model.
      scored: tokens scored per window.
      draws: bootstrap draws.

    Returns:
      float64[1 + draws]; the first is the gap itself.
    """
    rng = np.random.default_rng(0)
    total = np.zeros(1 + draws)
    for ours, plain in zip(nll, base, strict=True):
        excess = (np.asarray(ours) - np.asarray(plain)) / scored
        n = len(excess)
        picks = np.vstack([np.arange(n), rng.integers(0, n, (draws, n))])
        total += np.exp(excess[picks].mean(1)) - 1
    return total / len(nll)


@dataclasses.dataclass(frozen=True)
class Summary:
    """One recipe in one setting, over the corpora.

    Attributes:
      values: the cells' values, without the corpus.
      rows: by corpus.
      mean: arithmetic mean of the perplexities.
      gap: (gap, low, high), the mean over corpora; None without the unquantized model's rows.
    """

    values: dict[str, Any]
    rows: dict[str, Row]
    mean: float
    gap: tuple[float, float, float] | None

    @property
    def bits(self) -> float:
        """Stored bits per weight, everything counted."""
        return next(iter(self.rows.values()))["effective_bits"]

    @property
    def setting(self) -> dict[str, Any]:
        """The part of `values` that must be equal in a comparison."""
        return {k: v for k, v in self.values.items() if k in SETTING}

    @property
    def is_plain(self) -> bool:
        """Whether nothing is quantized."""
        return self.values["recipe"] == "none"

    def label(self, axes: Iterable[str]) -> str:
        """The recipe and its values on these axes, as in "ttq, bits 3"."""
        parts = [f"{a} {self.values[a]}" for a in axes if a in self.values]
        return ", ".join([str(self.values["recipe"]), *parts])

    def corpus_gap(self, corpus: str, plain: "Summary | None") -> float | None:
        """The gap on one corpus; None without the unquantized model's row."""
        row = self.rows.get(corpus)
        base = None if plain is None else plain.rows.get(corpus)
        if row is None or base is None or len(row["nll"]) != len(base["nll"]):
            return None
        return float(gap_draws([row["nll"]], [base["nll"]], row["scored"], 0)[0])


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """Finished rows, gathered over the corpora.

    Args:
      rows: failed ones are left out.

    Returns:
      One per recipe and setting, in the order of the rows, the unquantized model first.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "error" not in row:
            values = {k: v for k, v in row["cell"].items() if k != "corpus"}
            groups.setdefault(repr(sorted(values.items())), []).append(row)
    plain = {}
    for group in groups.values():
        for row in group:
            if row["cell"]["recipe"] == "none":
                plain[_place(row)] = row
    made = [_summary(group, plain) for group in groups.values()]
    return sorted(made, key=lambda s: not s.is_plain)


def _place(row: Row) -> str:
    """Setting and corpus."""
    return repr([row["cell"].get(axis) for axis in (*SETTING, "corpus")])


def _summary(rows: list[Row], plain: dict[str, Row]) -> Summary:
    values = {k: v for k, v in rows[0]["cell"].items() if k != "corpus"}
    bases = [plain.get(_place(row)) for row in rows]
    gap = None
    if values["recipe"] != "none" and all(
        base is not None and len(base["nll"]) == len(row["nll"])
        for row, base in zip(rows, bases, strict=True)
    ):
        found = gap_draws(
            [row["nll"] for row in rows], [b["nll"] for b in bases if b], rows[0]["scored"]
        )
        low, high = np.percentile(found[1:], [2.5, 97.5])
        gap = (float(found[0]), float(low), float(high))
    return Summary(
        values, {row["cell"]["corpus"]: row for row in rows},
        float(np.mean([row["perplexity"] for row in rows])), gap,
    )  # fmt: skip


def varying(found: Iterable[Summary]) -> dict[str, list[Any]]:
    """The axes along which the summaries differ, apart from the recipe, each with its values.

    Args:
      found: from `summaries`.

    Returns:
      Axis -> its values in ascending order (numbers) or in that of the rows; an axis that some
      cells do not read is there if those that do differ, or if it tells one recipe's cells apart.
    """
    values: dict[str, list[Any]] = {}
    for summary in found:
        for axis, value in summary.values.items():
            if value not in values.setdefault(axis, []):
                values[axis].append(value)
    many = {axis: each for axis, each in values.items() if len(each) > 1 and axis != "recipe"}
    return {
        axis: sorted(each) if all(map(is_number, each)) else each for axis, each in many.items()
    }


def is_number(value: Any) -> bool:
    """Whether a line can be drawn along a value: it is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def corpora(found: Iterable[Summary]) -> list[str]:
    """All corpora, in the order of the rows."""
    return list(dict.fromkeys(corpus for summary in found for corpus in summary.rows))


def settings(found: Sequence[Summary]) -> list[tuple[dict[str, Any], list[Summary]]]:
    """The summaries by setting, in the order of the rows."""
    groups: dict[str, tuple[dict[str, Any], list[Summary]]] = {}
    for summary in found:
        key = repr([summary.values.get(axis) for axis in SETTING])
        groups.setdefault(key, (summary.setting, []))[1].append(summary)
    return list(groups.values())


def plain_of(group: Iterable[Summary]) -> Summary | None:
    """The unquantized model among the summaries of a setting."""
    return next((summary for summary in group if summary.is_plain), None)


def along(found: Sequence[Summary], axis: str) -> dict[str, dict[Any, Summary]]:
    """The quantized summaries as lines along an axis.

    Args:
      found: from `summaries`.
      axis: what changes along a line.

    Returns:
      Label of everything else that differs -> value of the axis -> summary. Recipes that do not
      read the axis, which therefore have one value, are not among them.
    """
    others = [a for a in varying(found) if a != axis]
    lines: dict[str, dict[Any, Summary]] = {}
    for summary in found:
        if axis in summary.values and not summary.is_plain:
            lines.setdefault(summary.label(others), {})[summary.values[axis]] = summary
    return {
        label: dict(sorted(line.items(), key=lambda kv: (str(type(kv[0])), kv[0])))
        for label, line in lines.items()
    }


def domain_grids(found: Sequence[Summary]) -> dict[str, dict[str, Summary]]:
    """Calibration corpus -> summary, for every recipe that was calibrated on two or more.

    Args:
      found: of one setting.

    Returns:
      By label.
    """
    lines = along(found, "calibration")
    return {label: line for label, line in lines.items() if len(line) > 1}


def perplexity_text(value: float) -> str:
    """Two decimals, or three digits from 1000 on."""
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"

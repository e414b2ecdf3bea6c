"""Rows -> numbers: the results of each recipe, compared with the unquantized model.

The gap is the perplexity divided by the unquantized one's on the same windows, minus 1; its mean is
over corpora. Two recipes have a better one only if they cost the same, and their intervals do not
hold each other's gap.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ttq_jax.evaluation.intervals import interval95
from ttq_jax.sweeps import words
from ttq_jax.sweeps.rows import Row

# What two perplexities must share to be compared.
SETTING = ("model", "dtype", "protocol", "window", "prompt_tokens", "max_windows", "seed")
# Stored bits by which recipes of one cost may differ.
SAME_BITS = 0.05
# An arithmetic mean of ratios that exceeds the geometric one by this factor is of one corpus.
_DOMINATED = 1.2


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """One recipe in one setting, over the corpora.

    Attributes:
      values: the cells' values, without the corpus.
      rows: by corpus.
      mean: geometric mean of the perplexities, which no single corpus dominates.
      gap: mean over the corpora; None without the unquantized model's rows.
      geometric: the same with a geometric mean of the ratios.
      interval: the gap's 95 % interval; None with too few windows.
    """

    values: dict[str, Any]
    rows: dict[str, Row]
    mean: float
    gap: float | None
    geometric: float | None
    interval: tuple[float, float] | None

    @property
    def row(self) -> Row:
        """One of its rows, for what they share."""
        return next(iter(self.rows.values()))

    @property
    def bits(self) -> float:
        """Stored bits per weight of the linear layers."""
        return self.row["effective_bits"]

    @property
    def model_bits(self) -> float | None:
        """Stored bits per parameter of the whole model; None if the rows do not say."""
        return self.row.get("model_bits")

    @property
    def bytes_per_token(self) -> int | None:
        """Bytes of weights read per decoded token; None if the rows do not say."""
        return self.row.get("bytes_per_token")

    def agreement(self, measure: str) -> float | None:
        """A measure of `acceptance`, its mean over windows and then corpora; None if rows lack it.

        Args:
          measure: one of `acceptance.MEASURES`.
        """
        found = [row.get("acceptance") for row in self.rows.values()]
        means = [float(np.mean(one[measure])) for one in found if one is not None]
        return float(np.mean(means)) if len(means) == len(found) else None

    @property
    def setting(self) -> dict[str, Any]:
        """The part of `values` that must be equal in a comparison."""
        return {k: v for k, v in self.values.items() if k in SETTING}

    @property
    def is_plain(self) -> bool:
        """Whether nothing is quantized."""
        return self.values["recipe"] == "none"

    @property
    def reader(self) -> str:
        """The weights that the answer's prompt was read by; "" where that is no question.

        "unquantized", also where a second stream was read by quantized ones, or "quantized".
        """
        prefill = (self.row["recipe"] or {}).get("prefill")
        return "quantized" if prefill == "quantized" else "unquantized" if prefill else ""

    @property
    def is_dominated(self) -> bool:
        """Whether one corpus rules the mean gap: the geometric mean is a good deal lower."""
        if self.gap is None or self.geometric is None:
            return False
        return 1 + self.gap > _DOMINATED * (1 + self.geometric)

    @property
    def on_file_grid(self) -> bool:
        """Whether it rounds to the grid on which the model's file has its weights already."""
        recipe, grid = self.row["recipe"], words.file_grid(words.model_of(self.row)[1])
        if recipe is None or grid is None:
            return False
        bits, group = recipe["grid"]["bits"], recipe["grid"]["group_size"]
        return bits == grid[0] and group > 0 and grid[1] % group == 0

    def label(self, axes: Iterable[str]) -> str:
        """The recipe and its values on these axes, in words."""
        return words.label(self.values, axes)

    def corpus_gap(self, corpus: str, plain: "Summary | None") -> float | None:
        """The gap on one corpus; None without the unquantized model's row."""
        row = self.rows.get(corpus)
        base = None if plain is None else plain.rows.get(corpus)
        if row is None or base is None or len(row["nll"]) != len(base["nll"]):
            return None
        return mean_gap([excess(row, base)])


def shared_bits(found: Iterable[Summary]) -> int | None:
    """The bits of a code that all quantized recipes have; None if they differ."""
    bits = {one.row["recipe"]["grid"]["bits"] for one in found if not one.is_plain}
    return bits.pop() if len(bits) == 1 else None


def excess(row: Row, base: Row) -> np.ndarray:
    """Per window, nats per token more than the unquantized model."""
    return (np.asarray(row["nll"]) - np.asarray(base["nll"])) / row["scored"]


def mean_gap(samples: Sequence[np.ndarray]) -> float:
    """The mean gap over corpora.

    Args:
      samples: per corpus, from `excess`.
    """
    return float(np.mean(np.exp([each.mean() for each in samples]))) - 1


def _comparable(one: Summary, other: Summary) -> bool:
    """Whether it means something that one recipe is better than another that costs no more."""
    return (
        other.bits <= one.bits + SAME_BITS
        and not other.is_plain
        and one.reader == other.reader
        and one.setting == other.setting
        and set(one.rows) == set(other.rows)
        and not (one.on_file_grid or other.on_file_grid)
    )


def _beats(one: Summary, other: Summary) -> bool:
    """Whether `one` is better, each gap being outside the other's interval."""
    if one.gap is None or other.gap is None or one.interval is None or other.interval is None:
        return False
    return one.gap < other.interval[0] and other.gap > one.interval[1]


def best_of(found: Sequence[Summary]) -> list[Summary]:
    """Those that beat everything of their cost, and that nothing cheaper beats.

    Args:
      found: from `summaries`.

    Returns:
      Some of them; where nothing else has a recipe's cost, it is not the best of anything.
    """
    best = []
    for one in found:
        rivals = [other for other in found if other is not one and _comparable(one, other)]
        alike = [other for other in rivals if one.bits - other.bits <= SAME_BITS]
        beaten = any(_beats(other, one) for other in rivals)
        if alike and not beaten and all(_beats(one, other) for other in alike):
            best.append(one)
    return best


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
    gap = geometric = interval = None
    if values["recipe"] != "none" and all(
        base is not None and len(base["nll"]) == len(row["nll"])
        for row, base in zip(rows, bases, strict=True)
    ):
        samples = [excess(row, base) for row, base in zip(rows, bases, strict=True) if base]
        gap, found = mean_gap(samples), interval95(samples)
        geometric = float(np.exp(np.mean([each.mean() for each in samples]))) - 1
        interval = found and (found[0] - 1, found[1] - 1)
    mean = float(np.exp(np.mean(np.log([row["perplexity"] for row in rows]))))
    return Summary(
        values, {row["cell"]["corpus"]: row for row in rows}, mean, gap, geometric, interval
    )


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

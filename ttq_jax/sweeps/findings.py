"""Rows -> the parts of a report, in the order in which they are read."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ttq_jax.sweeps.beside_paper import beside_paper
from ttq_jax.sweeps.page import Heading, Part, Picture, Table, Text
from ttq_jax.sweeps.pictures import draw_domains, draw_lines, drawable
from ttq_jax.sweeps.rows import Row
from ttq_jax.sweeps.tables import (
    SETTING,
    Summary,
    along,
    corpora,
    domain_grids,
    perplexity_text,
    plain_of,
    settings,
    summaries,
    varying,
)

_GAP = "gap"

_READING = (
    "Perplexity is exp of the mean negative log-likelihood per scored token; lower is better. "
    "The gap is the perplexity divided by that of the unquantized model on the same windows, minus "
    "1, averaged over corpora. In brackets is its 95 % interval, from a bootstrap over windows; it "
    "holds for these texts only. Bits are effective bits: stored bits per weight of the linear "
    "layers, counting scales, zero points, channel scales and low-rank factors. In each column the "
    "best quantized result is marked. Protocol causal: the first P tokens of a window make the "
    "weights, and the tokens after them are scored; this is what a user gets. Protocol window: the "
    "whole window makes the weights and is scored, as in the paper; this favours methods that fit "
    "the prompt closely. Do not compare numbers of different protocols, windows or P."
)


def parts_of(rows: Sequence[Row]) -> list[Part]:
    """A whole report.

    Args:
      rows: of one or several sweeps, failed ones among them.

    Returns:
      What `page.write` takes.
    """
    found = summaries(rows)
    failed = [row for row in rows if "error" in row]
    parts: list[Part] = [Text(_counts(rows, failed)), *_domains(found)]
    for setting, group in settings(found):
        parts += [Heading(f"Results: {_said(setting)}"), _results(group, found), *_readers(group)]
    for axis in varying(found):
        if axis not in {"model", "calibration"}:
            parts += _axis(axis, found)
    parts += [Heading("How to read it"), Text(_READING), *beside_paper(found)]
    if failed:
        parts += [Heading("Failed cells"), Table(
            ["cell", "error"], [[_named(r["cell"]), " ".join(r["error"].split())] for r in failed],
            left=2,
        )]  # fmt: skip
    return [*parts, *_made_by([row for row in rows if "error" not in row])]


def _counts(rows: Sequence[Row], failed: Sequence[Row]) -> str:
    ended = max((row["finished"] for row in rows), default="")
    also = f", of which {len(failed)} failed (listed below)" if failed else ""
    return f"{len(rows)} cells{also}. The last one finished at {ended}."


def _named(values: dict[str, Any]) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in values.items())


def _said(setting: dict[str, Any]) -> str:
    """A setting in words."""
    parts = [f"{setting['model']}, {setting['protocol']}, windows of {setting['window']}"]
    if "prompt_tokens" in setting:
        parts.append(f"P {setting['prompt_tokens']}")
    if "max_windows" in setting:
        parts.append(f"up to {setting['max_windows']} windows per corpus")
    parts += [f"{axis} {setting[axis]}" for axis in ("dtype", "seed") if axis in setting]
    return ", ".join(parts)


def _interval(gap: tuple[float, float, float] | None) -> str:
    if gap is None:
        return ""
    middle, low, high = map(_gap_text, gap)
    return f"{middle} [{low}, {high}]"


def _gap_text(gap: float) -> str:
    return f"{gap:.3f}" if gap < 10 else f"{gap:.3g}"


def _best(columns: Sequence[Sequence[float | None]], skip: set[int]) -> frozenset[tuple[int, int]]:
    """Where each column's smallest value is, without the rows `skip`.

    A column with fewer than two values has no best.
    """
    marks = set()
    for j, column in enumerate(columns):
        known = {i: v for i, v in enumerate(column) if v is not None and i not in skip}
        if len(known) > 1:
            marks |= {(i, j) for i, v in known.items() if v == min(known.values())}
    return frozenset(marks)


def _results(group: Sequence[Summary], found: Sequence[Summary]) -> Table:
    """Every recipe of a setting on every corpus."""
    names, axes = corpora(group), [a for a in varying(found) if a not in SETTING]
    several = len(names) > 1
    header = ["recipe", "bits", *names, *(["mean"] if several else []), _GAP]
    rows, values = [], []
    for one in group:
        perplexities = [one.rows[n]["perplexity"] if n in one.rows else None for n in names]
        # A mean over other corpora than the rest of its column would mislead.
        means = [one.mean if None not in perplexities else None] if several else []
        numbers = [*perplexities, *means, one.gap[0] if one.gap else None]
        values.append([None, None, *numbers])
        shown = ["" if v is None else perplexity_text(v) for v in numbers[:-1]]
        rows.append([one.label(axes), f"{one.bits:.2f}", *shown, _interval(one.gap)])
    plain = {i for i, one in enumerate(group) if one.is_plain}
    columns = list(zip(*values, strict=True))
    return Table(header, rows, _best(columns, plain))


def _readers(group: Sequence[Summary]) -> list[Part]:
    """States which weights read the prompt, where recipes differ in it."""
    readers: dict[str, dict[str, None]] = {}
    for one in group:
        recipe = next(iter(one.rows.values()))["recipe"]
        if recipe is not None and one.values["protocol"] == "causal":
            readers.setdefault(recipe["prefill"], {})[str(one.values["recipe"])] = None
    if len(readers) < 2:
        return []
    return [Text(
        "This table has two kinds of prefill; do not compare one with the other. Unquantized "
        f"weights read the prompt (prefill full): {', '.join(readers['full'])}. Quantized weights "
        f"read it (prefill quantized): {', '.join(readers['quantized'])}."
    )]  # fmt: skip


def _axis(axis: str, found: Sequence[Summary]) -> list[Part]:
    """A table along an axis and, for numbers, a picture; per model and protocol."""
    parts: list[Part] = []
    apart = [key for key in ("model", "protocol") if key != axis]
    for place in dict.fromkeys(tuple(str(one.values[key]) for key in apart) for one in found):
        here = [one for one in found if tuple(str(one.values[key]) for key in apart) == place]
        lines = along(here, axis)
        lines = {label: line for label, line in lines.items() if len(line) > 1}
        if not lines:
            continue
        have_gap = all(one.gap for line in lines.values() for one in line.values())
        steps = [v for v in varying(found)[axis] if any(v in line for line in lines.values())]
        values = [
            [None if v not in line else _quality(line[v], have_gap) for v in steps]
            for line in lines.values()
        ]
        shown = [
            [label, *("" if v not in line else _cell(line[v], have_gap) for v in steps)]
            for label, line in lines.items()
        ]
        columns = [[None] * len(lines), *zip(*values, strict=True)]
        what = "mean gap" if have_gap else "mean perplexity"
        name = axis.replace("_", " ")
        parts += [
            Heading(f"{what.capitalize()} by {name}: {', '.join(place)}", 3),
            Table([name, *map(str, steps)], shown, _best(columns, set())),
        ]
        if drawable(lines):
            tested = corpora(one for line in lines.values() for one in line.values())
            windows = _windows(one for line in lines.values() for one in line.values())
            title = f"{place[0]}: {', '.join(tested)}; {windows}"
            parts.append(Picture(
                f"{_file_name(' '.join((axis, *place)))}.png",
                draw_lines(axis.rpartition(".")[2], lines, title, _flat(axis, here, have_gap)),
                f"{what.capitalize()} by {'stored ' * (axis == 'bits')}{name}, {place[0]}, over "
                f"{', '.join(tested)}; {windows}"
                + ("; bars are 95 % intervals over windows." if have_gap else "."),
            ))  # fmt: skip
    return [Heading(f"By {axis.replace('_', ' ')}"), *parts] if parts else []


# More horizontal lines than these hide the others.
_FLAT = 4


def _flat(axis: str, here: Sequence[Summary], have_gap: bool) -> dict[str, Summary]:
    """Recipes that do not read an axis, by label, if they are few."""
    others = [a for a in varying(here) if a != axis]
    flat = {
        one.label(others): one
        for one in here
        if axis not in one.values and not one.is_plain and (one.gap is not None or not have_gap)
    }
    return flat if len(flat) <= _FLAT else {}


def _windows(found: Iterable[Summary]) -> str:
    """How many windows per corpus, and of which protocol."""
    rows = [(one, row) for one in found for row in one.rows.values()]
    counts = sorted({row["windows"] for _, row in rows})
    protocols = sorted({one.values["protocol"] for one, _ in rows})
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{span} windows per corpus, {' and '.join(protocols)}"


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()


def _quality(one: Summary, have_gap: bool) -> float:
    return one.gap[0] if have_gap and one.gap else one.mean


def _cell(one: Summary, have_gap: bool) -> str:
    return _gap_text(_quality(one, True)) if have_gap else perplexity_text(one.mean)


def _domains(found: Sequence[Summary]) -> list[Part]:
    """Calibration domain against test domain, the per-prompt recipes below."""
    parts: list[Part] = []
    for i, (setting, group) in enumerate(settings(found)):
        grids, plain, tested = domain_grids(group), plain_of(group), corpora(group)
        if not grids or len(tested) < 2:
            continue

        def values(one: Summary, tested: list[str] = tested, plain: Summary | None = plain) -> Any:
            if plain is None:
                return [one.rows[c]["perplexity"] if c in one.rows else None for c in tested]
            return [one.corpus_gap(c, plain) for c in tested]

        what = "perplexity" if plain is None else "perplexity over unquantized, minus 1"
        free = [one for one in group if "calibration" not in one.values and not one.is_plain]
        panels, compared = {}, []
        for label, line in grids.items():
            beside = [one for one in free if _comparable(one, next(iter(line.values())))]
            # In the order of the columns, so that a domain on itself stands on the diagonal.
            ordered = sorted(line, key=lambda name: [*tested, name].index(name))
            panels[label] = {str(name): values(line[name]) for name in ordered}
            panels[label] |= {f"({one.values['recipe']})": values(one) for one in beside}
            compared += [_contest(label, line, one) for one in beside]
        parts += [
            Heading(f"Domain shift: {_said(setting)}"),
            Picture(
                f"domains_{i}.png", draw_domains(panels, tested, what),
                "Each recipe is calibrated on one domain (rows) and scored on another (columns). "
                "Recipes in parentheses read no calibration corpus. "
                f"{what.capitalize()}; the best of each column is in bold.",
            ),
            Text(
                "A pair is a test domain and another domain to calibrate on. The table counts in "
                "how many pairs the calibrated recipe is better than the one without calibration, "
                "and on how many test domains it is better in at least one pair."
            ),
            Table(
                ["calibrated", "against", "better in", "of pairs", "better on test domains"],
                compared, left=2,
            ),
        ]  # fmt: skip
    return parts


def _comparable(one: Summary, other: Summary) -> bool:
    """Whether the two agree on every axis that both read, apart from the recipe."""
    both = set(one.values) & set(other.values) - {"recipe"}
    return all(one.values[axis] == other.values[axis] for axis in both)


def _contest(label: str, line: dict[Any, Summary], one: Summary) -> list[str]:
    """How often a calibrated recipe beats `one`, on domains other than its own calibration's."""
    pairs = [
        (corpus, row["perplexity"] < one.rows[corpus]["perplexity"])
        for name, calibrated in line.items()
        for corpus, row in calibrated.rows.items()
        if corpus != name and corpus in one.rows
    ]
    domains = {corpus for corpus, _ in pairs}
    won = {corpus for corpus, better in pairs if better}
    return [
        label, str(one.values["recipe"]), str(sum(better for _, better in pairs)), str(len(pairs)),
        f"{len(won)} of {len(domains)}",
    ]  # fmt: skip


def _made_by(rows: Sequence[Row]) -> list[Part]:
    """What the numbers depend on besides their cells."""
    if not rows:
        return []
    facts: dict[str, dict[str, None]] = {}
    for row in rows:
        packages = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
        facts.setdefault("versions", {})[packages] = None
        facts.setdefault("device", {})[row["device"]] = None
        facts.setdefault("commit", {})[str(row["git_commit"])] = None
        text = f"{row['cell']['corpus']} {row['corpus_sha256'][:16]}"
        facts.setdefault("texts scored (sha256)", {})[text] = None
        if row["calibration_sha256"]:
            text = f"{row['cell']['calibration']} {row['calibration_sha256'][:16]}"
            facts.setdefault("texts calibrated on (sha256)", {})[text] = None
    seconds = sum(sum(row["seconds"].values()) for row in rows)
    peak = max(row["peak_memory_bytes"] for row in rows)
    table = [[name, "; ".join(values)] for name, values in facts.items()]
    table += [
        ["time", f"{seconds / 60:.1f} minutes in all"],
        ["peak memory", f"{peak / 1e9:.2f} GB"],
    ]
    return [Heading("How these numbers were made"), Table(["", ""], table, left=2)]

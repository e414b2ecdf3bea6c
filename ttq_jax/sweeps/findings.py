"""Rows -> the parts of a report, in the order in which they are read."""

from collections.abc import Sequence
from typing import Any

from ttq_jax.sweeps import words
from ttq_jax.sweeps.beside_paper import beside_paper
from ttq_jax.sweeps.domains import domains
from ttq_jax.sweeps.parts import Heading, Part, Picture, Table, Text, slug
from ttq_jax.sweeps.pictures import averaged, draw_lines, drawable
from ttq_jax.sweeps.provenance import provenance
from ttq_jax.sweeps.rows import Row
from ttq_jax.sweeps.tables import (
    SAME_BITS,
    SETTING,
    Summary,
    along,
    best_of,
    corpora,
    settings,
    summaries,
    varying,
)
from ttq_jax.sweeps.titles import place_said, setting_said, windows_said

_AGREEMENT = {
    "greedy": "same token", "sampled": "acceptance", "divergence": "KL divergence, nats",
}  # fmt: skip
_AGREEING = (
    "Same token: the share of tokens whose likeliest successor is that of the unquantized weights. "
    "Acceptance: how often a token drawn from the quantized weights is accepted by the unquantized "
    "ones at temperature 1. KL divergence: of the next token's distribution from the unquantized "
    "one. Each is a mean over the tokens after the prompt and its first, then over corpora."
)
_READING = (
    "Perplexity is exp of the mean negative log-likelihood per scored token; lower is better. Over "
    "several corpora its mean is geometric, so that none dominates. The gap is the perplexity "
    "divided by that of the unquantized model on the same windows, minus 1; its mean over corpora "
    "is arithmetic, and a geometric one stands beside it where one corpus dominates. The 95 % "
    "interval of the mean gap takes windows as independent draws (Student's t, Welch and "
    "Satterthwaite's degrees of freedom); it holds for these texts only.",
    "Bits are stored bits per weight of the linear layers, which are what is quantized: codes, "
    "scales, zero points, channel scales and low-rank factors. The embedding, a head of its own "
    "and the norms are not among them, so a whole model has more.",
    "Bold is best: better than every recipe of the same cost, that is, within "
    f"{SAME_BITS} stored bits, with the same kind of prefill, and each gap outside the other's "
    "interval; and nothing cheaper is better. Nothing is bold where there is no interval, or where "
    "weights come from a quantized file and are rounded to that file's grid, which is marked †.",
    "Protocol causal: the first tokens of a window are the prompt and make the weights, and the "
    "tokens after them are scored; this is what a user gets. Protocol window: the whole window "
    "makes the weights and is scored, as in the paper; this favours methods that fit the prompt "
    "closely. Do not compare numbers of different protocols, windows or prompt lengths. fast and "
    "best are recipes of this package; TTQ reads the prompt with unquantized weights, TTQ as "
    "published with quantized ones.",
)


def parts_of(rows: Sequence[Row]) -> list[Part]:
    """A whole report.

    Args:
      rows: of one or several sweeps, checked, failed ones among them.

    Returns:
      What `page.write` takes.
    """
    found = summaries(rows)
    failed = [row for row in rows if "error" in row]
    parts: list[Part] = [Text(_counts(rows, failed)), *_quantized_files(found), *domains(found)]
    for setting, group in settings(found):
        parts += [Heading(f"Results: {setting_said(setting, group)}"), _results(group, found),
                  *_no_interval(group), *_readers(group)]  # fmt: skip
    for axis in varying(found):
        if axis not in {"model", "calibration"}:
            parts += _axis(axis, found)
    agree = [Text(_AGREEING)] if any("acceptance" in row for row in rows) else []
    parts += [Heading("How to read it"), *map(Text, _READING), *agree, *beside_paper(found)]
    if failed:
        parts += [Heading("Failed cells"), Table(
            ["cell", "error"], [[_named(r["cell"]), " ".join(r["error"].split())] for r in failed],
            left=2,
        )]  # fmt: skip
    return [*parts, *provenance([row for row in rows if "error" not in row])]


def _counts(rows: Sequence[Row], failed: Sequence[Row]) -> str:
    ended = max((row["finished"] for row in rows), default="")
    also = f", of which {len(failed)} failed (listed below)" if failed else ""
    return f"{len(rows)} cells{also}. The last one finished at {ended}."


def _named(values: dict[str, Any]) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in values.items())


def _quantized_files(found: Sequence[Summary]) -> list[Part]:
    """What it spoils that a model's file is itself quantized."""
    models = {words.model_of(one.row): None for one in found}
    return [
        Text(f"{words.titled(name, quantized)}. {words.spoils(quantized)}")
        for name, quantized in models
        if quantized
    ]


def _no_interval(group: Sequence[Summary]) -> list[Part]:
    """Why intervals are missing."""
    if all(one.interval for one in group if one.gap is not None):
        return []
    return [Text(
        f"No 95 % interval, and no best: {windows_said(group)} are too few. It takes 5 windows of "
        "one corpus, or of several corpora 4 windows more than there are corpora."
    )]  # fmt: skip


def _interval(one: Summary) -> str:
    return f"[{', '.join(words.fixed(end, 3) for end in one.interval)}]" if one.interval else ""


def _results(group: Sequence[Summary], found: Sequence[Summary]) -> Table:
    """Every recipe of a setting on every corpus."""
    names, axes = corpora(group), [a for a in varying(found) if a not in SETTING]
    columns = {"bits": words.column([one.bits for one in group], 2)}
    if any(one.model_bits for one in group):
        columns["bits, whole model"] = words.column([one.model_bits for one in group], 2)
    if any(one.bytes_per_token for one in group):
        read = [one.bytes_per_token for one in group]
        millions = [None if n is None else n / 1e6 for n in read]
        columns["MB read per token"] = words.column(millions, 1)
    for name in names:
        perplexities = [one.rows[name]["perplexity"] if name in one.rows else None for one in group]
        columns[words.corpus(name)] = words.column(perplexities, 2)
    if len(names) > 1:
        # A mean over other corpora than the rest of its column would mislead.
        whole = [one.mean if len(one.rows) == len(names) else None for one in group]
        columns["geometric mean"] = words.column(whole, 2)
    columns["gap"] = words.gaps([one.gap for one in group])
    best = best_of(group)
    marks = frozenset((i, len(columns)) for i, one in enumerate(group) if one in best)
    if any(one.interval for one in group):
        columns["95 % interval"] = [_interval(one) for one in group]
    if any(one.is_dominated for one in group):
        columns["geometric gap"] = words.gaps([one.geometric for one in group])
    for measure, said in _AGREEMENT.items():
        values = [one.agreement(measure) for one in group]
        if any(value is not None for value in values):
            columns[said] = words.column(values, 3)
    labels = [one.label(axes) + " †" * one.on_file_grid for one in group]
    return Table(
        ["recipe", *columns], [list(row) for row in zip(labels, *columns.values(), strict=True)],
        marks,
    )  # fmt: skip


def _readers(group: Sequence[Summary]) -> list[Part]:
    """States which weights read the prompt, where recipes differ in it."""
    readers: dict[str, list[Summary]] = {}
    for one in group:
        if one.reader and one.values["protocol"] == "causal":
            readers.setdefault(one.reader, []).append(one)
    if len(readers) < 2:
        return []

    def said(found: list[Summary]) -> str:
        prefills = dict.fromkeys(one.row["recipe"]["prefill"] for one in found)
        names = dict.fromkeys(words.method(str(one.values["recipe"])) for one in found)
        return f"(prefill {' or '.join(prefills)}): {', '.join(names)}"

    return [Text(
        "This table has two kinds of prefill; do not compare one with the other. Unquantized "
        f"weights read the prompt {said(readers['unquantized'])}. Quantized weights read it "
        f"{said(readers['quantized'])}."
    )]  # fmt: skip


def _axis(axis: str, found: Sequence[Summary]) -> list[Part]:
    """A table along an axis and, for numbers, a picture; per model and protocol."""
    parts: list[Part] = []
    apart = [key for key in ("model", "protocol") if key != axis]
    for place in dict.fromkeys(tuple(str(one.values[key]) for key in apart) for one in found):
        here = [one for one in found if tuple(str(one.values[key]) for key in apart) == place]
        lines = {label: line for label, line in along(here, axis).items() if len(line) > 1}
        if not lines:
            continue
        shown = [one for line in lines.values() for one in line.values()]
        have_gap = all(one.gap is not None for one in shown)
        said = place_said(axis, shown)
        what = "Mean gap" if have_gap else "Perplexity"
        parts += [Heading(f"{what} by {words.axis(axis)}: {said}", 3),
                  _along(axis, lines, varying(found)[axis], best_of(here))]  # fmt: skip
        if drawable(lines):
            over = ", ".join(map(words.corpus, corpora(shown)))
            bars = (
                "; bars are 95 % intervals over windows" if have_gap and shown[0].interval else ""
            )
            grids = {one.row["recipe"]["grid"]["bits"] for one in shown if one.on_file_grid}
            if grids:
                bars += f"; {grids.pop()}-bit points are on the grid of the model's own file"
            high = averaged(have_gap, len(corpora(shown)))
            parts.append(Picture(
                slug(" ".join((axis, *place))),
                draw_lines(axis, lines, said, _flat(axis, here, have_gap)),
                f"{high[0].upper()}{high[1:]} ({over}), by {'stored ' * (axis == 'bits')}"
                f"{words.axis(axis)}; {said}{bars}.",
            ))  # fmt: skip
    return [Heading(f"By {words.axis(axis)}"), *parts] if parts else []


def _along(
    axis: str, lines: dict[str, dict[Any, Summary]], values: Sequence[Any], best: Sequence[Summary]
) -> Table:
    """A row per line, a column per value of the axis; marked are the `best`."""
    have_gap = all(one.gap is not None for line in lines.values() for one in line.values())
    steps = [v for v in values if any(v in line for line in lines.values())]
    columns, marks = [], set()
    for j, step in enumerate(steps, 1):
        there = [line.get(step) for line in lines.values()]
        cells = (
            words.gaps([None if one is None else one.gap for one in there])
            if have_gap
            else words.column([None if one is None else one.mean for one in there], 2)
        )
        dagger = [" †" if one and one.on_file_grid else "" for one in there]
        columns.append([cell + mark for cell, mark in zip(cells, dagger, strict=True)])
        marks |= {(i, j) for i, one in enumerate(there) if one in best}
    return Table(
        [words.axis(axis), *(f"{v:g}" if isinstance(v, float) else str(v) for v in steps)],
        [list(row) for row in zip(lines, *columns, strict=True)], frozenset(marks),
    )  # fmt: skip


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

"""The section of a report on domain shift: calibrated on one text, scored on another."""

from collections.abc import Sequence
from typing import Any

from ttq_jax.sweeps import words
from ttq_jax.sweeps.parts import Heading, Part, Picture, Table, Text
from ttq_jax.sweeps.pictures import draw_domains
from ttq_jax.sweeps.tables import Summary, corpora, domain_grids, plain_of, settings
from ttq_jax.sweeps.titles import setting_said

_PAIRS = (
    "A pair is a test domain and another domain to calibrate on. The table counts in how many "
    "pairs the calibrated recipe is better than the one without calibration, and on how many test "
    "domains it is better in at least one pair."
)


def domains(found: Sequence[Summary]) -> list[Part]:
    """Calibration domain against test domain, the per-prompt recipes below.

    Args:
      found: from `tables.summaries`.

    Returns:
      A section for each setting with recipes that were calibrated on several domains.
    """
    parts: list[Part] = []
    for i, (setting, group) in enumerate(settings(found)):
        grids, plain, tested = domain_grids(group), plain_of(group), corpora(group)
        if not grids or len(tested) < 2:
            continue
        free = [one for one in group if "calibration" not in one.values and not one.is_plain]
        panels, compared = {}, []
        for label, line in grids.items():
            beside = [one for one in free if _comparable(one, next(iter(line.values())))]
            # In the order of the columns, so that a domain on itself stands on the diagonal.
            ordered = sorted(line, key=lambda name: [*tested, name].index(name))
            panels[label] = {
                words.corpus(str(name)): _values(line[name], tested, plain) for name in ordered
            }
            panels[label] |= {
                f"({words.method(str(one.values['recipe']))})": _values(one, tested, plain)
                for one in beside
            }
            compared += [_contest(label, line, one) for one in beside]
        what = "perplexity" if plain is None else "gap: perplexity over the unquantized, minus 1"
        said = setting_said(setting, group)
        parts += [
            Heading(f"Domain shift: {said}"),
            Picture(
                f"domains_{i}", draw_domains(panels, [*map(words.corpus, tested)], what, said),
                "Each recipe is calibrated on one domain (rows) and scored on another (columns). "
                "Recipes in parentheses read no calibration corpus. The numbers are each domain's "
                f"{what}; {said}.",
            ),
            Text(_PAIRS),
            Table(
                ["calibrated", "against", "better in", "of pairs", "better on test domains"],
                compared, left=2,
            ),
        ]  # fmt: skip
    return parts


def _values(one: Summary, tested: Sequence[str], plain: Summary | None) -> list[float | None]:
    """A value per tested domain: the gap, or without the unquantized model the perplexity."""
    if plain is None:
        return [one.rows[c]["perplexity"] if c in one.rows else None for c in tested]
    return [one.corpus_gap(c, plain) for c in tested]


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
    tested = {corpus for corpus, _ in pairs}
    won = {corpus for corpus, better in pairs if better}
    return [
        label, words.method(str(one.values["recipe"])), str(sum(better for _, better in pairs)),
        str(len(pairs)), f"{len(won)} of {len(tested)}",
    ]  # fmt: skip

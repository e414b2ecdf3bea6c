"""How many windows each measure needs to tell two recipes apart.

Claim     agreement with the unquantized model ranks recipes in fewer windows than perplexity.
Command   ttq sweep experiments/ranking.toml --out DIR
          python experiments/ranking.py DIR
Cost      none: it reads the rows of the sweep.
Expect    a row per pair of recipes: by each measure the windows after which a paired comparison
          finds the difference, at 95 % confidence and with a chance of 80 %.

Windows are taken as independent, and the recipes read the same ones. With d a window's difference
of the two recipes, mean m and spread s, that takes (1.96 + 0.84)² s² / m² windows, at least 2. s
and m are estimates from the windows measured, so the numbers are rough; a measure by which the
95 % interval of m has 0 in it ranks nothing yet, and is marked with a question mark.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttq_jax.evaluation.acceptance import MEASURES
from ttq_jax.evaluation.describe import table
from ttq_jax.evaluation.intervals import mean95
from ttq_jax.sweeps.rows import read_rows

WORDS = {
    "perplexity": "perplexity", "greedy": "same token", "sampled": "acceptance",
    "divergence": "KL divergence",
}  # fmt: skip
"""The measures: nats per token of the text, and those of `acceptance.MEASURES`."""


def measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Per recipe and measure the values of all windows, in one order.

    Args:
      rows: of a sweep with the axis acceptance, every recipe on the same windows.

    Returns:
      Recipe in words -> measure -> float64[windows].

    Raises:
      ValueError: recipes were not measured on the same windows.
    """
    found: dict[str, dict[str, list[float]]] = {}
    corpora: dict[str, list[tuple[str, int]]] = {}
    for row in sorted(rows, key=lambda row: row["cell"]["corpus"]):
        if row["recipe"] is None:
            continue
        cell = row["cell"]
        name = f"{cell['recipe']}, {cell['bits']} bits, groups of {cell['group_size']}"
        values = found.setdefault(name, {measure: [] for measure in WORDS})
        corpora.setdefault(name, []).append((row["corpus_sha256"], len(row["nll"])))
        values["perplexity"] += [nll / row["scored"] for nll in row["nll"]]
        for measure in MEASURES:
            values[measure] += row["acceptance"][measure]
    if len({str(each) for each in corpora.values()}) > 1:
        raise ValueError("expected every recipe on the same windows; finish the sweep")
    return {
        name: {measure: np.array(each) for measure, each in values.items()}
        for name, values in found.items()
    }


def needed(a: np.ndarray, b: np.ndarray) -> tuple[float, bool]:
    """Windows that tell a from b, and whether those measured do.

    Args:
      a: float64[windows], a measure of one recipe.
      b: of another, on the same windows.

    Returns:
      The number, at least 2; and whether the 95 % interval of the difference is without 0.
    """
    difference = a - b
    mean, spread = float(difference.mean()), float(difference.std(ddof=1))
    interval = mean95(difference.tolist())
    told = interval is not None and not interval[0] <= 0 <= interval[1]
    return max(2.0, (1.96 + 0.84) ** 2 * spread**2 / mean**2 if mean else np.inf), told


def cells(found: Mapping[str, Mapping[str, np.ndarray]]) -> list[list[str]]:
    """The table: a row per pair of recipes."""
    lines = [["recipes", *WORDS.values()]]
    for one, other in itertools.combinations(found, 2):
        row = []
        for measure in WORDS:
            windows, told = needed(found[one][measure], found[other][measure])
            row.append(f"{np.ceil(windows):.0f}{'' if told else ' ?'}")
        lines.append([f"{one} / {other}", *row])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="of ttq sweep experiments/ranking.toml")
    args = parser.parse_args()
    found = measured([*read_rows(args.directory).values()])
    windows = len(next(iter(found.values()))["perplexity"])
    print(f"{windows} windows measured\n\n{table(cells(found), left=1)}")


if __name__ == "__main__":
    main()

"""The kept sweeps: their reports are what their rows say, and can be made anew."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pictures import same_picture
from report_tables import table_under

from ttq_jax.commands.main import main
from ttq_jax.sweeps import words
from ttq_jax.sweeps.axes import LABELLED, make_cell
from ttq_jax.sweeps.tables import SETTING

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
KEPT = sorted(path.parent for path in RESULTS.glob("*/report.md"))


def test_sweeps_are_kept():
    assert len(KEPT) >= 5


@pytest.fixture(scope="module", params=KEPT, ids=lambda path: path.name)
def kept(request, tmp_path_factory):
    """A kept sweep's directory, and one of the same name with its report made anew."""
    new = tmp_path_factory.mktemp("again") / request.param.name
    new.mkdir()
    shutil.copy(request.param / "rows.jsonl", new)
    assert main(["report", str(new), "--no-compilation-cache", "--quiet"]) == 0
    return request.param, new


def test_the_report_is_the_one_its_rows_make(kept):
    old, new = kept
    for name in ("report.md", "report.tex", "report.csv"):
        assert (new / name).read_bytes() == (old / name).read_bytes()
    shown = set(re.findall(r"\]\(report/(.*?)\)", (old / "report.md").read_text()))
    for directory in (old, new):
        assert {path.name for path in (directory / "report").glob("*.svg")} == shown
        assert {path.with_suffix(".svg").name for path in directory.glob("report/*.pdf")} == shown
    for name in shown:
        assert same_picture(*((directory / "report" / name).read_text() for directory in kept))


def test_its_numbers_are_those_of_the_rows(kept):
    old, _ = kept
    rows = [json.loads(line) for line in (old / "rows.jsonl").read_text().splitlines()]
    assert all("error" not in row for row in rows)
    varied = {axis: {str(r["cell"][axis]) for r in rows if axis in r["cell"]}
              for row in rows for axis in row["cell"]}  # fmt: skip
    axes = [
        a
        for a, values in varied.items()
        if len(values) > 1 and a not in (*SETTING, "recipe", "corpus")
    ]
    text, checked = (old / "report.md").read_text(), 0
    for heading in re.findall(r"^## (Results: .*)$", text, re.M):
        header, *body = table_under(text, heading)
        protocol = re.search(r", (causal|window) protocol,", heading)[1]
        here = [r for r in rows if r["cell"]["protocol"] == protocol]
        corpora = {words.corpus(r["cell"]["corpus"]): r["cell"]["corpus"] for r in here}
        for cells in body:
            shown = dict(zip(header, (cell.strip("*") for cell in cells), strict=True))
            label = shown["recipe"].removesuffix(" †")
            ours = {c: _matching(label, here, c, axes) for c in corpora.values()}
            plain = {c: _matching("unquantized", here, c, axes) for c in corpora.values()}
            for name, corpus in corpora.items():
                row = ours[corpus]
                perplexity = np.exp(sum(row["nll"]) / row["scored"] / row["windows"])
                assert float(shown[name]) == pytest.approx(perplexity, rel=1e-4, abs=0.051)
                checked += 1
            if shown["gap"]:
                gap = np.mean([_mean(ours[c]) / _mean(plain[c]) - 1 for c in ours])
                assert float(shown["gap"]) == pytest.approx(gap, rel=1e-6, abs=6e-4)
    assert checked == len(rows)


def _mean(row):
    return np.exp(np.mean(row["nll"]) / row["scored"])


def _matching(label, rows, corpus, axes):
    """The one row of a label such as "AWQ calibrated on C4, 3-bit"."""
    (found,) = [
        row for row in rows
        if row["cell"]["corpus"] == corpus and words.label(row["cell"], axes) == label
    ]  # fmt: skip
    return found


def test_a_kept_sweep_goes_on_where_it_stopped():
    """A row's key is what its cell has: nothing that was measured is measured again.

    But for presets that have changed since: what they were is not taken for what they are.
    """
    changed = set()
    for directory in KEPT:
        for line in (directory / "rows.jsonl").read_text().splitlines():
            row = json.loads(line)
            labelled = {axis: f"{row['cell'][axis]}=" for axis in LABELLED if axis in row["cell"]}
            cell = make_cell(row["cell"] | labelled)
            same = row["recipe"] == (cell.recipe and cell.recipe.describe())
            assert (cell.key == row["key"]) == same
            changed |= set() if same else {row["cell"]["recipe"]}
    assert changed == {"fast", "best"}

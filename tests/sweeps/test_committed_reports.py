"""The kept sweeps: their reports are what their rows say, and can be made anew."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from report_tables import table_under

from ttq_jax.commands.main import main
from ttq_jax.sweeps.axes import LABELLED, make_cell

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
    assert (new / "report.md").read_text() == (old / "report.md").read_text()
    shown = set(re.findall(r"\]\(report/(.*?)\)", (old / "report.md").read_text()))
    for directory in (old, new):
        assert {path.name for path in (directory / "report").glob("*")} == shown


def test_its_numbers_are_those_of_the_rows(kept):
    old, _ = kept
    rows = [json.loads(line) for line in (old / "rows.jsonl").read_text().splitlines()]
    assert all("error" not in row for row in rows)
    text, checked = (old / "report.md").read_text(), 0
    for heading in re.findall(r"^## (Results: .*)$", text, re.M):
        header, *body = table_under(text, heading)
        protocol = re.search(r", (causal|window),", heading)[1]
        model = heading.removeprefix("Results: ").split(",")[0]
        here = [r for r in rows if (r["cell"]["model"], r["cell"]["protocol"]) == (model, protocol)]
        corpora = [name for name in header if name in {r["cell"]["corpus"] for r in here}]
        for cells in body:
            shown = dict(zip(header, (cell.strip("*") for cell in cells), strict=True))
            ours = {c: _matching(shown["recipe"], here, c) for c in corpora}
            plain = {c: _matching("none", here, c) for c in corpora}
            for corpus in corpora:
                row = ours[corpus]
                perplexity = np.exp(sum(row["nll"]) / row["scored"] / row["windows"])
                assert float(shown[corpus]) == pytest.approx(perplexity, rel=6e-3, abs=6e-3)
                checked += 1
            if shown["gap"]:
                gap = np.mean([_mean(ours[c]) / _mean(plain[c]) - 1 for c in corpora])
                assert float(shown["gap"].split()[0]) == pytest.approx(gap, rel=6e-3, abs=6e-4)
    assert checked == len(rows)


def _mean(row):
    return np.exp(np.mean(row["nll"]) / row["scored"])


def _matching(label, rows, corpus):
    """The one row of a label such as "awq, bits 3, calibration c4"."""
    recipe, *settings = label.split(", ")
    told = dict(setting.rsplit(" ", 1) for setting in settings)
    (found,) = [
        row for row in rows
        if (row["cell"]["recipe"], row["cell"]["corpus"]) == (recipe, corpus)
        and all(str(row["cell"].get(axis)) == value for axis, value in told.items())
    ]  # fmt: skip
    return found


def test_a_kept_sweep_goes_on_where_it_stopped():
    """A row's key is still what its cell has: nothing that was measured is measured again."""
    for directory in KEPT:
        for line in (directory / "rows.jsonl").read_text().splitlines():
            row = json.loads(line)
            labelled = {axis: f"{row['cell'][axis]}=" for axis in LABELLED if axis in row["cell"]}
            assert make_cell(row["cell"] | labelled).key == row["key"]

"""Rope scalings and experts of GGUF files give the logits that llama.cpp gave and a file keeps."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import compare_llama_cpp
from compare_llama_cpp import CASES, KEPT, ours, text, write

RESULTS = Path(compare_llama_cpp.__file__).parent / "results"
ROWS = json.loads((RESULTS / "llama_cpp.json").read_text())["rows"]


def test_every_case_was_compared():
    assert [row["case"] for row in ROWS] == list(CASES)
    for row in ROWS:
        assert row["difference"] < 1e-4
        # A scaling that moves nothing would prove nothing.
        same = row["case"] in {"none", "none, with a factor", "yarn, factor 1"}
        assert (row["moved_by_the_scaling"] > 0.1) != same, row["case"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case"])
def test_the_logits_are_llama_cpps(row, tmp_path):
    case = CASES[row["case"]]
    write(tmp_path / "m.gguf", case)
    got = ours(tmp_path / "m.gguf", text(case))[-1, :KEPT]
    np.testing.assert_allclose(got, row["last_logits"], rtol=0, atol=2e-4 * np.abs(got).max())

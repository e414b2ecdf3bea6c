"""The committed cycle estimates: each names its libtpu, and the comparison is what they say."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import compare_libtpu
from compare_libtpu import RESULTS, by_libtpu, markdown


def test_every_case_was_asked_of_every_libtpu():
    files = sorted(RESULTS.glob("kernels_*.jsonl"))
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    cycles = by_libtpu(rows)
    assert {chip for *_, chip in cycles} == {"v5e", "v5p", "v6e", "tpu7x"}
    for case, made in cycles.items():
        assert set(made) == {"0.0.42.1", "0.0.50.1", "0.0.52"}, case


def test_the_committed_table_is_the_one_its_rows_make(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_libtpu.py"])
    compare_libtpu.main()
    assert capsys.readouterr().out == (RESULTS / "kernels_by_libtpu.md").read_text()


def row(m, libtpu, cycles):
    case = {"kernel": "packed_matmul", "m": m, "bits": 4, "group_size": 128, "chip": "v5e"}
    return case | {"cycles": cycles, "versions": {"libtpu": libtpu}}


def test_what_differs_by_more_than_five_percent_is_in_the_table():
    rows = [row(1, "0.0.52", 1000), row(1, "0.0.9", 1050), row(1, "0.0.10", None),
            row(2, "0.0.52", 1060), row(2, "0.0.9", 1000), row(2, "0.0.10", None)]  # fmt: skip
    said, _, head, rule, *body = markdown(rows).splitlines()
    assert "Of 2 cases" in said and "these 1 differ" in said
    assert head.endswith("| chip | libtpu 0.0.9 | libtpu 0.0.10 | libtpu 0.0.52 |")
    assert rule.count("---") == head.count("|") - 1
    assert body == [
        "| `packed_matmul` | 2 | 4 | 128 | v5e | 1,000 | - | 1,060 |", "",
        "- libtpu 0.0.10 estimates 2 cases of `packed_matmul` for v5e not at all.",
    ]  # fmt: skip


def test_two_rows_of_one_case_and_libtpu_are_refused():
    with pytest.raises(ValueError, match=r"two of .*v5e"):
        markdown([row(1, "0.0.52", 1000), row(1, "0.0.52", 1000)])

"""Rows that a report reads: those of every version, and nothing that contradicts itself."""

import json
import math
from pathlib import Path

import pytest
from report_rows import report_of, row, sweep_rows, write_rows

from ttq_jax.commands.main import main
from ttq_jax.config import ConfigError
from ttq_jax.sweeps.checked import checked
from ttq_jax.sweeps.rows import read_rows

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
GOOD = row({"corpus": "c4", "recipe": "ttq", "bits": 3}, 0.1)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/rows.jsonl")), ids=lambda p: p.parent.name)
def test_committed_rows_are_read(path):
    rows = read_rows(path.parent)
    assert checked(rows.values(), "kept") == list(rows.values())


def test_what_an_older_version_did_not_write_is_left_out(tmp_path):
    """None of these is in the first rows that were kept, or need be in anybody's."""
    later = ("model", "model_bits", "git_commit", "seconds", "peak_memory_bytes", "corpus_sha256",
             "calibration_sha256")  # fmt: skip
    old = [{k: v for k, v in r.items() if k not in later} for r in sweep_rows()]
    for r in old:
        if r["recipe"]:
            r["recipe"] = {k: v for k, v in r["recipe"].items() if k != "prefill"}
    text = report_of(tmp_path / "s", old)
    assert "peak memory" not in text
    assert "| commits | not known |" in text


def without(name):
    return {k: v for k, v in GOOD.items() if k != name}


BAD = {
    "no cell": without("cell"), "no nll": without("nll"), "no device": without("device"),
    "a cell without a corpus": GOOD | {"cell": {"model": "m", "recipe": "ttq"}},
    "a list as a cell": GOOD | {"cell": [1]},
    "a list inside a cell": GOOD | {"cell": GOOD["cell"] | {"bits": [3]}},
    "a text as nll": GOOD | {"nll": "30"}, "no window": GOOD | {"nll": []},
    "nan": GOOD | {"nll": [math.nan] * 6}, "true": GOOD | {"windows": True},
    "an infinite perplexity": GOOD | {"perplexity": math.inf},
    "another perplexity": GOOD | {"perplexity": GOOD["perplexity"] * 1.01},
    "another count": GOOD | {"windows": 5}, "no bits": GOOD | {"effective_bits": 0},
    "a recipe of nothing": GOOD | {"recipe": None},
    "a recipe without a grid": GOOD | {"recipe": {"low_rank": {}, "scale": {}}},
    "bits in words": GOOD | {"recipe": GOOD["recipe"] | {"grid": {"bits": "three"}}},
    "versions in a list": GOOD | {"versions": ["jax"]},
    "a model in a list": GOOD | {"model": ["m"]},
    "a format in a number": GOOD | {"model": {"format": 4}},
    "a number as an error": {k: GOOD[k] for k in list(GOOD)[:8]} | {"error": 3},
    "a digest of nothing": GOOD | {"calibration_sha256": "ab"},
    "a causal cell without a prompt": GOOD | {"cell": GOOD["cell"] | {"protocol": "causal"}},
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_contradicts_itself_is_named(bad):
    with pytest.raises(ConfigError, match=r"here: the row with key \w+.*remove that line") as found:
        checked([GOOD, bad], "here")
    assert len(str(found.value)) < 400


def test_the_command_refuses_it_before_anything_is_written(tmp_path, capsys):
    write_rows(tmp_path / "s", [GOOD, BAD["another perplexity"]])
    assert main(["report", str(tmp_path / "s"), "--no-compilation-cache", "--quiet"]) == 2
    assert "expected the perplexity of its nll" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("name", sorted(GOOD))
@pytest.mark.parametrize("value", [None, [], {}, "x" * 999, -1, 1e999, True, [[]]])
def test_any_value_in_any_place_is_read_or_refused(name, value, tmp_path):
    write_rows(tmp_path / "s", [json.loads(json.dumps(GOOD | {name: value}))])
    try:
        rows = checked(read_rows(tmp_path / "s").values(), "here")
    except ConfigError:
        return
    report_of(tmp_path / "t", rows)

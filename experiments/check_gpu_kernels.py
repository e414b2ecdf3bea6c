"""GPU kernels and attention, checked against plain JAX on the device and then measured.

Claim     on an H100 every kernel agrees with `pallas_kernels.reference`; 4-bit `packed_matmul`,
          group 128, up to 16 rows, takes at most a third of the bfloat16 product's time on shapes
          larger than the cache, and at no row count more than 1/0.95 of the faster of that product
          and XLA's dequantize-then-dot on the same packed array.
Command   python experiments/check_gpu_kernels.py --out experiments/results/kernels_h100.json
Cost      at most 10 minutes on one H100, most of it compilation; other GPUs work too.
Expect    exit status 0, and the claim's figures under "summary" in the results. Status 1 is a
          kernel that disagrees (a table says which, nothing is measured), 2 a machine without GPU.

Nothing else may run on the device. Measurements come in order of importance: what the time limit
cuts off is listed under "not_measured".
"""

import argparse
import contextlib
import dataclasses
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import attention_checks
import jax
from kernel_checks import Check, checks, failure_table, log, problem_of, run_checks

import pallas_kernels
from pallas_kernels import PLANES, tiles
from pallas_kernels.choice import current_target, refusal
from ttq_jax.chips.comparison import Case, sweep
from ttq_jax.chips.device_times import measure
from ttq_jax.files import check_destination, write_file

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy")


ALL_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGE = ((8192, 8192), (4096, 14336))


def cases() -> list[Case]:
    """What to measure, the most important first."""
    one = LARGE[:1]
    matmul = partial(sweep, kernels=["packed_matmul"])
    prefill = partial(sweep, kernels=["prefill_quantize"], rows=[512, 2048])
    return [
        *matmul(bits=[4], group_sizes=[128], rows=ALL_ROWS, shapes=LARGE),
        *sweep(kernels=["quantize_pack"], bits=sorted(PLANES), group_sizes=[128], shapes=one),
        *prefill(bits=[4], group_sizes=[128], shapes=[(4096, 4096), *one]),
        *matmul(bits=[2, 3, 5, 8], group_sizes=[128], rows=[1, 16, 128, 2048], shapes=one),
        *matmul(bits=sorted(PLANES), group_sizes=[32], rows=[1, 16], shapes=one),
        *matmul(bits=[4], group_sizes=[128], rows=[1, 16], shapes=one, symmetric=True),
        *sweep(kernels=["quantize_pack"], bits=[3, 4], group_sizes=[32], shapes=one),
        *prefill(bits=[4], group_sizes=[32], shapes=one),
        *prefill(bits=[3], group_sizes=[128], shapes=one),
    ]


@contextlib.contextmanager
def mosaic_serves(chip: str | None) -> Iterator[None]:
    """While it lasts, Mosaic GPU is chosen where it can serve."""
    if chip is None:
        yield
        return
    before = dict(tiles.MOSAIC_ROWS)
    tiles.MOSAIC_ROWS[chip] = 1
    try:
        yield
    finally:
        tiles.MOSAIC_ROWS.clear()
        tiles.MOSAIC_ROWS.update(before)


def run_measurements(
    todo: list[Case],
    platform_name: str,
    left: Callable[[], float],
    *,
    turns: int = 5,
    save: Callable[[list[Any]], None] = lambda records: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measures until the time is used up.

    Args:
      todo: in order.
      platform_name: for `device_times.measure`.
      left: seconds that are left.
      turns: measurements of each contender.
      save: called with the records so far.

    Returns:
      ``(records, facts of the cases that there was no time for)``.
    """
    records: list[dict[str, Any]] = []
    for i, case in enumerate(todo):
        if left() < 0:
            return records, [c.facts() for c in todo[i:]]
        [record] = measure([case], platform_name, turns=turns)
        records.append(record)
        save(records)
        log(
            f"  {i + 1} of {len(todo)}: {case.kernel} {case.bits} bits, group {case.group_size}, "
            f"m {case.m}, {case.k}x{case.n}, {record['block']}: {record['microseconds']} us, "
            f"{record['speedup_vs_dense']} x dense, {left():.0f} s left"
        )
    return records, []


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the claim; None where nothing of it was measured."""

    def of(most: int) -> list[dict[str, Any]]:
        return [
            r for r in records
            if r["kernel"] == "packed_matmul" and r["bits"] == 4 and r["group_size"] == 128
            and r["m"] <= most and r["k"] * r["n"] >= 4096 * 14336
        ]  # fmt: skip

    def to_best(r: dict[str, Any]) -> float:
        t = r["microseconds"]
        return min(t["dense"], t["xla"]) / t["kernel"]

    few, every = of(16), of(4096)
    worst = min(every, key=to_best, default=None)
    return {
        "speedup_vs_bf16_up_to_16_rows": min((r["speedup_vs_dense"] for r in few), default=None),
        "wanted_speedup": 3.0,
        "least_ratio_to_the_best": None if worst is None else round(to_best(worst), 3),
        "at": None if worst is None else {name: worst[name] for name in ("m", "k", "n")},
        "wanted_ratio": 0.95,
    }  # fmt: skip


def public_call(kernel: str, implementation: str) -> Callable[..., Any]:
    return partial(getattr(pallas_kernels, kernel), implementation=implementation)


def device_checks() -> list[Check]:
    """The checks of this device: Triton's, and Mosaic GPU's where it can serve."""
    target = current_target()
    every = checks((1, 2, 3, 16, 33, 128, 512, 4096), (128, 32, 96), 1536, 1000)
    forced = [
        dataclasses.replace(c, implementation="mosaic_gpu", n=1024, dtype="bfloat16")
        for c in every
        if c.kernel == "packed_matmul"
    ]
    return every + [c for c in forced if refusal(problem_of(c), "mosaic_gpu", target) is None]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit() -> str | None:
    """The commit that is checked out, "+" if there are changes; None outside a repository."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--exclude=*",
               "--dirty=+"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--limit", type=float, default=570.0,
                        help="seconds in all (default: %(default)s)")  # fmt: skip
    parser.add_argument("--checks-only", action="store_true", help="measure nothing")
    args = parser.parse_args(arguments)
    if args.out:
        check_destination(args.out)
    start = time.monotonic()
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError as e:
        log(f"check_gpu_kernels: jax finds no GPU here: {' '.join(str(e).split())[:200]}")
        return 2
    results: dict[str, Any] = {
        "command": "python experiments/check_gpu_kernels.py", "device": device.device_kind,
        "versions": versions(), "commit": git_commit(),
    }  # fmt: skip

    def save() -> None:
        if args.out:
            write_file(args.out, json.dumps(results, indent=1) + "\n")

    with jax.default_device(device):
        todo = device_checks()
        log(f"{device.device_kind}: {len(todo)} checks")
        checked = attention_checks.run_checks() + run_checks(todo, public_call)
    results["checks"] = {"run": len(checked), "failed": [r for r in checked if not r["ok"]]}
    results["check_seconds"] = round(time.monotonic() - start, 1)
    save()
    if results["checks"]["failed"]:
        log(failure_table(checked))
        return 1
    log(f"all {len(checked)} checks agree, {results['check_seconds']} s")
    if not args.checks_only:
        measure_all(results, save, lambda: args.limit - (time.monotonic() - start))
        print(json.dumps(results["summary"], indent=1))
    return 0


def measure_all(
    results: dict[str, Any], save: Callable[[], None], left: Callable[[], float]
) -> None:
    """Fills the results with measurements, saved one by one."""

    def keep(records: list[Any], name: str = "measurements") -> None:
        results[name] = records
        save()

    # A last case takes some seconds: stop early enough.
    records, results["not_measured"] = run_measurements(
        cases(), "gpu", lambda: left() - 45, save=keep
    )
    results["summary"] = summary(records)
    save()
    attention: list[Any] = []
    for case in attention_checks.TIMED:
        if left() > 45:
            attention.append(attention_checks.measure(*case))
            keep(attention, "attention")
    chip = current_target().chip
    some = [c for c in cases() if c.bits in {4, 8} and c.m >= 16 and c.kernel == "packed_matmul"]
    some = [c for c in some if refusal(c.problem, "mosaic_gpu", current_target()) is None]
    if some:
        log(f"Mosaic GPU, {len(some)} cases")
        with mosaic_serves(chip):
            _, rest = run_measurements(
                some, "gpu", lambda: left() - 15, save=partial(keep, name="mosaic_gpu")
            )
        results["not_measured"] += [facts | {"implementation": "mosaic_gpu"} for facts in rest]
        save()


if __name__ == "__main__":
    sys.exit(main())

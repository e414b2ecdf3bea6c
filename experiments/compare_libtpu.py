"""Cycle estimates of the TPU kernels by three versions of the TPU compiler.

Claim     most estimates of libtpu 0.0.42.1, 0.0.50.1 and 0.0.52 lie within 5 % of each other; where
          they do not, the table has each of them.
Command   for lib in 0.0.42.1 0.0.50.1; do
            pip install --no-deps --target build/libtpu-$lib libtpu==$lib
            for chip in v5e v5p v6e tpu7x; do
              TPU_LIBRARY_PATH=build/libtpu-$lib/libtpu/libtpu.so \\
                ttq bench kernels --chip $chip --json
            done > experiments/results/kernels_libtpu_$lib.jsonl
          done
          for chip in v5e v5p v6e tpu7x; do
            ttq bench kernels --chip $chip --json > experiments/results/kernels_$chip.jsonl
          done
          python experiments/compare_libtpu.py --out experiments/results/kernels_by_libtpu.md
Cost      20 minutes on 2 cores, no accelerator.
Expect    experiments/results/kernels_by_libtpu.md. Nothing was checked on a chip.

The rows of 0.0.50.1 were made with jax 0.12 on Python 3.13, whose `jax[tpu]` takes it; the others
with jax 0.10.2 on Python 3.11. Each row names its versions.
"""

import argparse
import collections
import json
from pathlib import Path

from ttq_jax.files import write_file

RESULTS = Path(__file__).parent / "results"
CASE = ("kernel", "m", "bits", "group_size", "chip")
APART = 1.05


def by_libtpu(rows: list[dict]) -> dict[tuple, dict[str, int | None]]:
    """Cycles by case and libtpu.

    Raises:
      ValueError: two rows are of one case and one libtpu.
    """
    cycles: dict[tuple, dict[str, int | None]] = {}
    for row in rows:
        case, libtpu = tuple(row[name] for name in CASE), row["versions"]["libtpu"]
        if libtpu in cycles.setdefault(case, {}):
            raise ValueError(f"expected one row per case and libtpu, got two of {case}, {libtpu}")
        cycles[case][libtpu] = row["cycles"]
    return cycles


def markdown(rows: list[dict]) -> str:
    """The cases whose estimates differ, and what was not estimated."""
    cycles = by_libtpu(rows)
    names = sorted(
        {name for made in cycles.values() for name in made},
        key=lambda name: [int(part) for part in name.split(".")],
    )
    lines = [
        "| kernel | M | bits | group | chip | " + " | ".join(f"libtpu {n}" for n in names) + " |",
        "| --- " * (len(CASE) + len(names)) + "|",
    ]
    compared, missing = 0, collections.Counter()
    for (kernel, *facts), made in cycles.items():
        found = [made.get(name) for name in names]
        missing.update((n, kernel, facts[-1]) for n in names if made.get(n) is None)
        known = [n for n in found if n is not None]
        compared += len(known) > 1
        if known and max(known) > APART * min(known):
            cells = ["-" if n is None else f"{n:,}" for n in found]
            lines += ["| " + " | ".join([f"`{kernel}`", *map(str, facts), *cells]) + " |"]
    head = (
        f"Static cycles of the TPU compiler. Of {compared} cases that two versions or more "
        f"estimate, these {len(lines) - 2} differ by more than {APART - 1:.0%}."
    )
    absent = [
        f"- libtpu {name} estimates {count} cases of `{kernel}` for {chip} not at all."
        for (name, kernel, chip), count in missing.items()
    ]
    return "\n".join([head, "", *lines, *([""] if absent else []), *absent]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table here")
    args = parser.parse_args()
    files = sorted(RESULTS.glob("kernels_*.jsonl"))
    text = markdown([json.loads(line) for p in files for line in p.read_text().splitlines()])
    print(text, end="")
    if args.out:
        write_file(args.out, text)


if __name__ == "__main__":
    main()

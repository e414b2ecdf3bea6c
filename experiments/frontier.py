"""The frontier: perplexity gap against stored bits, every method on the same windows.

Claim     none of its own yet: of its lines only llama.cpp's are measured, see `compare_gguf.py`.
Command   pip install llama-cpp-python
          python experiments/frontier.py measure --model smollm2 --corpus wikitext2=FILE
              --corpus ptb=FILE … --calibration c4=FILE --windows 16
              --out experiments/results/frontier_smollm2.jsonl
          python experiments/frontier.py report experiments/results/frontier_smollm2.jsonl
              --picture FILE.svg
Cost      estimated, SmolLM2 on 2 cores, 16 windows of five texts: 4 hours; Gemma 3 270M 8. A run
          that was cut goes on where it stopped. `--line NAME` measures one line.
Expect    a row per point and corpus, in the form of `quality.py`. `report` prints the gaps of every
          line, and who is ahead at equal bits; it draws a panel per model.

A line is a method on several grids. Those of this package leave the head unquantized here (`-h0`),
as llama.cpp's formats do: what is compared is the linear layers. All read the prompt with
unquantized weights, but for the paper's own, which reads it with the quantized ones.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from quality import Results, gaps, interval
from quality import measure as measure_recipes

from ttq_jax.checkpoint.packaged import CONTENTS
from ttq_jax.evaluation.describe import table
from ttq_jax.files import check_destination
from ttq_jax.sweeps.looks import look, pyplot, save
from ttq_jax.sweeps.pictures import averaged, percent
from ttq_jax.sweeps.words import titled

GRIDS = tuple(f"{bits}-g{group}-asym-coded" for bits in (2, 3, 4) for group in (64, 32))
"""2.3, 2.55, 3.3, 3.55, 4.3 and 4.55 stored bits."""

LINES: dict[str, tuple[str, ...]] = {
    "RTN": tuple(f"rtn-{grid}" for grid in GRIDS),
    "HQQ": tuple(f"hqq-{grid}" for grid in GRIDS),
    "AWQ from C4": tuple(f"awq-{grid}@c4" for grid in GRIDS),
    "GPTQ from C4": tuple(f"gptq-{grid}@c4" for grid in GRIDS),
    "TTQ as published": ("paper-2-g64", "paper-2", "paper-3-g64", "paper-3", "paper-4-g64",
                         "paper-4"),
    "TTQ as published, rank 16": ("paper-2-g64-r16", "paper-2-r16", "paper-3-g64-r16",
                                  "paper-3-r16", "paper-4-g64-r16"),
    "fast": tuple(f"fast-{grid}-h0" for grid in GRIDS),
    "best": tuple(f"best-{grid}-h0" for grid in GRIDS),
    "llama.cpp": ("Q2_K", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_0", "Q4_K"),
    "llama.cpp from C4": ("IQ2_S@c4", "Q2_K@c4", "Q3_K@c4", "IQ3_S@c4", "IQ4_XS@c4", "Q4_K@c4"),
    "llama.cpp from the prompt": ("Q2_K@prompt", "Q3_K@prompt", "IQ4_XS@prompt", "Q4_K@prompt"),
}  # fmt: skip
"""Recipes as `quality.py` names them, and formats as `compare_gguf.py` does."""

_PRESETS = {
    "RTN": "rtn", "HQQ": "hqq", "AWQ from C4": "awq", "GPTQ from C4": "gptq",
    "TTQ as published": "paper", "TTQ as published, rank 16": "paper",
}  # fmt: skip


def measure(args: argparse.Namespace) -> None:
    """Scores every point of the lines; rows that are there are kept."""
    check_destination(args.out, parents=True)
    for line in args.line or LINES:
        if line.startswith("llama.cpp"):
            # Only they need llama-cpp-python.
            from compare_gguf import measure as measure_formats

            measure_formats(argparse.Namespace(**vars(args), format=LINES[line]))
        else:
            measure_recipes(argparse.Namespace(**vars(args), recipe=LINES[line]))


def lines_of(found: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """The measured points of every line that has some, by name, in the order of their bits."""
    lines = {
        line: {name: found[name] for name in names if name in found}
        for line, names in LINES.items()
    }
    return {
        line: dict(sorted(points.items(), key=lambda point: point[1]["bits"]))
        for line, points in lines.items()
        if points
    }


def at_bits(points: dict[str, dict], bits: float) -> float | None:
    """A line's gap at some bits, between its points in the logarithm; None beyond its ends."""
    x = [one["bits"] for one in points.values()]
    if not x[0] <= bits <= x[-1]:
        return None
    return float(np.exp(np.interp(bits, x, np.log([one["gap"][0] for one in points.values()]))))


def ahead_of(lines: dict[str, dict[str, dict]]) -> list[list[str]]:
    """For every point of llama.cpp's lines, `fast` and `best` at the same bits."""
    rows = []
    for line, points in lines.items():
        for name, one in points.items() if line.startswith("llama.cpp") else ():
            ours = {of: at_bits(lines[of], one["bits"]) for of in ("fast", "best") if of in lines}
            said = ["" if gap is None else f"{gap:.3f}" for gap in ours.values()]
            rows.append([name, f"{one['bits']:.2f}", interval(one), *said])
    return rows


def report(args: argparse.Namespace) -> None:
    """Prints the lines of each file's model and draws them."""
    drawn = {}
    for path in args.results:
        rows = Results(path).read()
        if not rows:
            raise SystemExit(f"{path}: expected rows of `measure`, found none")
        found = gaps(rows, args.windows)
        lines = lines_of(found)
        if not lines:
            raise SystemExit(f"{path}: no point of a line has all corpora and windows yet")
        model = next(iter(rows.values()))["model"]
        first = next(iter(next(iter(lines.values())).values()))
        cells = [["line", "point", "bits", "gap", *first["by_corpus"]]]
        for line, points in lines.items():
            for name, one in points.items():
                parts = [f"{gap:.3f}" for gap in one["by_corpus"].values()]
                cells.append([line, name, f"{one['bits']:.2f}", interval(one), *parts])
        print(f"{model}, {first['windows']} windows per corpus\n\n{table(cells, left=2)}\n")
        if beside := ahead_of(lines):
            ours = [of for of in ("fast", "best") if of in lines]
            heads = ["llama.cpp's", "bits", "gap", *(f"{of} at these bits" for of in ours)]
            print(f"{table([heads, *beside])}\n")
        drawn[model] = lines
    if args.picture:
        draw(drawn, args.picture)


def draw(models: dict[str, dict[str, dict[str, dict]]], path: Path) -> None:
    """A panel per model, a line per method, with 95 % intervals."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, axes = pyplot().subplots(
        1, len(models), figsize=(4.4 * len(models), 4.2), squeeze=False, sharey=True
    )
    for axis, (model, lines) in zip(axes.flat, models.items(), strict=True):
        before: dict[str, int] = {}
        for line, points in lines.items():
            family = _PRESETS.get(line, line.split()[0])
            style = look(family, before.get(family, 0))
            before[family] = before.get(family, 0) + 1
            value = np.array([one["gap"][0] for one in points.values()])
            reach = [np.abs(np.subtract(one["interval"] or 1 + one["gap"][[0, 0]],
                                        1 + one["gap"][0])) for one in points.values()]  # fmt: skip
            bits = [one["bits"] for one in points.values()]
            # A gap of an interval that reaches below zero has no lower end on a log axis.
            low = np.minimum(np.array(reach)[:, 0], 0.9 * value)
            axis.errorbar(
                bits, value, yerr=np.stack([low, np.array(reach)[:, 1]]), label=line, capsize=2,
                **style,
            )  # fmt: skip
        some = next(iter(next(iter(lines.values())).values()))
        axis.set_title(
            f"{titled(*CONTENTS.get(model, (model, '')))}, {some['windows']} windows per corpus"
        )
        axis.set(yscale="log", xlabel="stored bits per weight of the linear layers")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(percent))
        axis.minorticks_off()
        axis.grid(visible=True)
    axes.flat[0].set_ylabel(averaged(has_gap=True, corpora=len(some["by_corpus"])))
    axes.flat[-1].legend(loc="upper right")
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure", help="score every point of the lines")
    one.add_argument("--model", required=True)
    one.add_argument("--corpus", action="append", required=True, metavar="NAME=FILE")
    one.add_argument("--calibration", action="append", default=[], metavar="NAME=FILE",
                     help="c4=FILE, for the lines from C4")  # fmt: skip
    one.add_argument("--line", action="append", choices=LINES, metavar="NAME",
                     help=f"only this one, of: {', '.join(LINES)}")  # fmt: skip
    one.add_argument("--windows", type=int, default=16, help="per corpus, default: %(default)s")
    one.add_argument("--window", type=int, default=512)
    one.add_argument("--prompt-tokens", type=int, default=256)
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(run=measure)
    two = commands.add_parser("report", help="the tables and the picture of measured rows")
    two.add_argument("results", nargs="+", type=Path, help="a file per model")
    two.add_argument("--windows", type=int, help="only the first of each corpus")
    two.add_argument("--picture", type=Path)
    two.set_defaults(run=report)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main(sys.argv[1:])

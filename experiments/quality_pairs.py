"""Whether a recipe is better than another, window by window.

Claim     fitting scales and zero points to their codes lowers perplexity at the same stored bits.
Command   python experiments/quality_pairs.py experiments/results/better_codes_smollm2.jsonl
              --over fast-asym-coded-h0-p5-f0 --windows 8
Cost      none: it reads what `quality.py measure` wrote.
Expect    a row per recipe: its perplexity over the other's on the same windows, minus 1, mean over
          the corpora, with a 95 % interval (Student's t). One without 0 is a difference.
"""

import argparse
from pathlib import Path

from quality import Results, gaps, interval

from ttq_jax.evaluation.describe import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="from quality.py measure, of one model")
    parser.add_argument("--over", required=True, metavar="NAME", help="the recipe to compare with")
    parser.add_argument("--windows", type=int, help="only the first of each corpus")
    args = parser.parse_args()
    rows = Results(args.results).read()
    if not any(name == args.over for name, _ in rows):
        names = ", ".join(dict.fromkeys(name for name, _ in rows))
        raise SystemExit(f"--over: expected one of {names}, got {args.over}")
    found = gaps(rows, args.windows, args.over)
    corpora = found[args.over]["by_corpus"]
    cells = [["recipe", "bits", f"perplexity over {args.over}, minus 1", *corpora]]
    for name, one in found.items():
        if name != args.over:
            parts = [f"{part:+.3f}" for part in one["by_corpus"].values()]
            cells.append([name, f"{one['bits']:.2f}", interval(one), *parts])
    print(f"{found[args.over]['windows']} windows per corpus\n\n{table(cells, left=1)}")


if __name__ == "__main__":
    main()

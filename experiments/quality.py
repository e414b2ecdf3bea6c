"""How much of the unquantized model each recipe keeps, at how many bits, in how much time.

Claim     `fast`, the default, leaves less than a quarter of the gap of TTQ at 3 bits with 16
          ranks, at 4.30 stored bits of the linear layers against 4.76 (SmolLM2) and 4.62 (Gemma3).
          `best` with bfloat16 scales (on SmolLM2 without its prior) leaves three tenths or less at
          4.27. All read the prompt unquantized.
Command   python experiments/quality.py measure --model smollm2 --corpus wikitext2=FILE
              --corpus python --recipe paper-3 --recipe best-3 … --windows 40
              --out experiments/results/quality_smollm2.jsonl
          … --windows 6 --prompt-tokens 16 --window 272
              --out experiments/results/quality_smollm2_p16.jsonl
          python experiments/quality.py report
              experiments/results/{quality,default}_{smollm2,gemma3}.jsonl --windows 40
              --only ttq-3 ttq-3-r16 awq-4-g64-sym@c4 gptq-4-g64-sym@c4 best-n0 best
              fast-p1-f4-h0 experiments/recipes/gemma3_5.01.toml
              --picture experiments/results/frontier.svg
          python experiments/quality.py time --model smollm2 --recipe fast …
              --out experiments/results/prefill_times_smollm2.json
          ttq allocate --model smollm2 --corpus C4_TRAIN --recipe best --group-size 192
              --set grid.symmetric=false --max-windows 6 --widths 2 3 4 --budget 2.8
              --out experiments/recipes/smollm2_2.8.toml
          ttq allocate --model smollm2 --corpus C4_TRAIN --recipe best --group-size 96
              --set moments.prior=none --set moments.prior_tokens=0 --max-windows 6
              --budget 4.02 --out experiments/recipes/smollm2_4.02.toml
          ttq allocate --model gemma3-270m --corpus C4_TRAIN --recipe best --symmetric
              --group-size 128 --set moments.prior=none --set moments.prior_tokens=0
              --widths 3 4 5 8 --budget 5.01 --out experiments/recipes/gemma3_5.01.toml
Cost      SmolLM2-135M on 2 cores: 1 s per window unquantized, 2 s with `ttq`, 6 s with second
          order; a corpus of 40 windows and ten recipes is about 20 minutes. A run that was cut goes
          on where it stopped: finished (recipe, corpus) pairs are skipped, more windows are added.
Expect    a row per recipe and corpus; `report` prints gaps with intervals from them.

The protocol is the causal one: weights from the first P tokens, the rest of the window scored.
The gap is perplexity over the unquantized one, minus 1; its mean is over corpora, and its 95 %
interval takes windows as independent (Student's t). The interval of a ratio of gaps is a bootstrap
over windows, drawn alike for all recipes. Corpora are given by path, NAME=FILE: UTF-8 text, or
JSON lines, as in gsm8k=FILE.jsonl:question,answer; `python` is the standard library's source.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from quality_picture import draw
from recipe_names import NAMES, recipe_named

import ttq_jax as ttq
from ttq_jax.evaluation.corpora import calibration_windows, sha256
from ttq_jax.evaluation.describe import device, table, versions
from ttq_jax.evaluation.intervals import interval95
from ttq_jax.evaluation.perplexity import Protocol, window_nll
from ttq_jax.files import check_destination, write_file
from ttq_jax.models.cache import empty_cache
from ttq_jax.offline.calibrate import prepare
from ttq_jax.prefill import decoded_shapes, prefill
from ttq_jax.quant.head import joined
from ttq_jax.quant.recipe import Recipe
from ttq_jax.sweeps.words import fixed
from ttq_jax.types import Offline, Prompts, effective_bits

CALIBRATION_TOKENS = 8192
DRAWS = 1000
# A bootstrap of fewer windows of a corpus draws the same ones again and again.
FEWEST = 5


def corpus_text(spec: str) -> tuple[str, str]:
    """(name, text) of NAME=FILE or `python`."""
    if spec == "python":
        files = sorted(Path(os.__file__).parent.glob("*.py"))[:80]
        return spec, "\n".join(f.read_text("utf-8") for f in files)
    name, _, path = spec.partition("=")
    if not path:
        raise SystemExit(f"corpus {spec!r}: expected NAME=FILE, or python")
    return name, ttq.read_corpus(path)


@dataclasses.dataclass
class Results:
    """The rows of a file, one per (recipe, corpus); later rows of a pair replace earlier ones."""

    path: Path

    def read(self) -> dict[tuple[str, str], dict]:
        """All whole rows; a last line cut short is ignored."""
        rows = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                print("ignoring a line that was cut short", file=sys.stderr)
                continue
            rows[row["recipe_name"], row["corpus"]] = row
        return rows

    def write(self, rows: dict[tuple[str, str], dict]) -> None:
        """Replaces the file in one step."""
        text = "".join(json.dumps(row) + "\n" for row in rows.values())
        write_file(self.path, text, parents=True)


def spread(total: int, count: int) -> list[int]:
    """`count` of `total` windows spread over a text; a larger count only adds to a smaller one."""
    golden, picked, i = (5**0.5 - 1) / 2, dict[int, None](), 0
    while len(picked) < min(count, total):
        picked[int(i * golden % 1.0 * total)] = None
        i += 1
    return list(picked)


def measure(args: argparse.Namespace, model_of: Callable[[str], ttq.Model] | None = None) -> None:
    """Scores every recipe on every corpus and writes the rows as they come.

    `model_of` says which model a recipe's name is measured on; None: on --model.
    """
    check_destination(args.out, parents=True)
    if model_of is None:
        loaded = ttq.load(args.model)
        model_of = lambda name: loaded  # noqa: E731
    model = model_of("none")
    protocol = Protocol(window=args.window, prompt_tokens=args.prompt_tokens)
    texts = dict(map(corpus_text, args.corpus))
    calibration = dict(map(corpus_text, args.calibration))
    windows = {n: ttq.cut_windows(model.tokenizer, t, protocol.window) for n, t in texts.items()}
    picked = {n: spread(len(cut), args.windows) for n, cut in windows.items()}
    store, prepared = Results(args.out), {}
    for name in ["none", *args.recipe]:
        recipe, model = recipe_named(name), model_of(name)
        for corpus, at in picked.items():
            rows = store.read()
            row = rows.get((name, corpus), {"nll": []})
            described = None if recipe is None else recipe.describe()
            same = row.get("recipe", described) == described
            if not same or row.get("protocol", protocol_data(protocol)) != protocol_data(protocol):
                raise SystemExit(
                    f"{args.out} has {name} on {corpus} by another recipe or protocol; choose "
                    "another --out"
                )
            missing = windows[corpus][at[len(row["nll"]) :]]
            if not len(missing):
                continue
            if name not in prepared:
                prepared = {name: offline_of(model, name, recipe, calibration)}
            offline = prepared[name]
            for tokens in missing:
                row["nll"].append(
                    window_nll(model, tokens, recipe=recipe, offline=offline, protocol=protocol)
                )
            shapes = decoded_shapes(model.params, model.config, recipe, offline)
            rows = store.read()
            rows[name, corpus] = {
                "model": args.model, "recipe_name": name, "corpus": corpus,
                "corpus_sha256": sha256(texts[corpus]), "protocol": protocol_data(protocol),
                "scored": protocol.scored, "effective_bits": round(effective_bits(shapes), 4),
                "recipe": described, "windows": at[: len(row["nll"])],
                "nll": row["nll"], "device": device(), "versions": versions(),
            }  # fmt: skip
            store.write(rows)
            mean = np.exp(np.sum(row["nll"]) / len(row["nll"]) / protocol.scored)
            print(
                f"{args.model} {name} {corpus}: {mean:.3f}, {len(row['nll'])} windows", flush=True
            )
        jax.clear_caches()


def measure_times(args: argparse.Namespace) -> None:
    """Times the prefill of every recipe, quantization included, in turns on the same prompts."""
    check_destination(args.out)
    model = ttq.load(args.model)
    tokens = ttq.cut_windows(model.tokenizer, corpus_text("python")[1], args.prompt_tokens)
    runs, seconds = {}, {}
    for name in ["none", *args.recipe]:
        recipe = recipe_named(name)
        run = jax.jit(partial(prefill, config=model.config, recipe=recipe))
        params, offline = joined(model.params, recipe, prepare(model, recipe))
        runs[name] = partial(run, params, offline=offline)
    for turn in range(args.repeats + 1):
        prompts = Prompts(jnp.asarray(tokens[turn][None]), jnp.ones((1, args.prompt_tokens), bool))
        cache = empty_cache(model.config, 1, args.prompt_tokens, jnp.float32)
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(prompts=prompts, cache=cache))
            if turn:  # the first compiles
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    median = {name: float(np.median(each)) for name, each in seconds.items()}
    found = {
        "model": args.model, "prompt_tokens": args.prompt_tokens, "repeats": args.repeats,
        "seconds": {name: round(value, 4) for name, value in median.items()},
        "over_plain_prefill": {n: round(v / median["none"], 3) for n, v in median.items()},
        "device": device(), "versions": versions(),
    }  # fmt: skip
    write_file(args.out, json.dumps(found, indent=1) + "\n")
    print(table([["recipe", "prefill over plain"], *(
        [name, f"{ratio:.2f}"] for name, ratio in found["over_plain_prefill"].items()
    )]))  # fmt: skip


def protocol_data(protocol: Protocol) -> dict:
    return dataclasses.asdict(protocol)


def offline_of(
    model: ttq.Model, name: str, recipe: Recipe | None, calibration: dict[str, str]
) -> Offline:
    """What a recipe needs; `awq-3@c4` is calibrated on the --calibration text named c4."""
    cut = None
    if recipe is not None and recipe.source.reads_corpus:
        corpus = name.partition("@")[2]
        if corpus not in calibration:
            raise SystemExit(f"{name}: expected PRESET…@NAME of a --calibration NAME=FILE")
        cut = calibration_windows(
            model.tokenizer, calibration[corpus], tokens=CALIBRATION_TOKENS, window=512
        )
    return prepare(model, recipe, cut)


def gap_draws(
    nll: Sequence[Sequence[float]], base: Sequence[Sequence[float]], scored: int, draws: int = DRAWS
) -> np.ndarray:
    """The mean gap over corpora, and bootstrap draws of it; [1 + draws], the first is the gap."""
    rng = np.random.default_rng(0)
    total = np.zeros(1 + draws)
    for ours, plain in zip(nll, base, strict=True):
        excess = (np.asarray(ours) - np.asarray(plain)) / scored
        n = len(excess)
        picks = np.vstack([np.arange(n), rng.integers(0, n, (draws, n))])
        total += np.exp(excess[picks].mean(1)) - 1
    return total / len(nll)


def gaps(rows: dict, windows: int | None = None, over: str = "none") -> dict[str, dict]:
    """Per recipe: the mean gap over corpora, its interval, draws of it, its parts and bits.

    Only recipes that have as many windows as `over`, or as `windows` says, on every corpus.
    """
    corpora = sorted({corpus for name, corpus in rows if name == over})
    n = min([len(rows[over, c]["nll"]) for c in corpora] + ([windows] if windows else []))
    out = {}
    for name in dict.fromkeys(name for name, _ in rows):
        have = [rows[name, c] for c in corpora if (name, c) in rows]
        if len(have) < len(corpora) or min(len(row["nll"]) for row in have) < n:
            print(f"leaving out {name}: not measured on all corpora and windows", file=sys.stderr)
            continue
        nll = {c: rows[name, c]["nll"][:n] for c in corpora}
        base, scored = {c: rows[over, c]["nll"][:n] for c in corpora}, have[0]["scored"]
        excess = [np.subtract(nll[c], base[c]) / scored for c in corpora]
        out[name] = {
            "interval": interval95(excess),
            "gap": gap_draws(list(nll.values()), list(base.values()), scored),
            "by_corpus": {c: gap_draws([nll[c]], [base[c]], scored, 0)[0] for c in corpora},
            "bits": have[0]["effective_bits"], "windows": n,
            "recipe": have[0].get("recipe"),
            "prefill": (have[0].get("recipe") or {}).get("prefill", ""),
        }  # fmt: skip
    return out


def interval(one: dict) -> str:
    """The mean gap and its 95 % interval, from `gaps`; without one where windows are too few."""
    value = fixed(one["gap"][0], 3)
    if one["interval"] is None:
        return value
    low, high = (fixed(end - 1, 3) for end in one["interval"])
    return f"{value} [{low}, {high}]"


def ratio(one: dict, other: dict) -> str:
    """One mean gap over another, and its 95 % bootstrap interval."""
    draws = one["gap"] / other["gap"]
    if one["windows"] < FEWEST:
        return fixed(draws[0], 3)
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    return f"{fixed(draws[0], 3)} [{fixed(low, 3)}, {fixed(high, 3)}]"


def report(args: argparse.Namespace) -> None:
    """Prints a table per model and draws the frontier."""
    found, times = {}, {}
    for path in args.times:
        one = json.loads(path.read_text())
        times[one["model"]] = one["over_plain_prefill"]
    files: dict[str, dict] = {}
    for path in args.results:
        rows = Results(path).read()
        first = next(iter(rows.values()))
        of_model = files.setdefault(first["model"], {})
        before = next(iter(of_model.values()), first)
        if before["protocol"] != first["protocol"]:
            raise SystemExit(f"{path} was measured by another protocol: report it by itself")
        of_model |= rows
    if len(args.windows) not in (0, 1, len(files)):
        raise SystemExit(
            f"--windows: expected one number or one for each of {', '.join(files)}, "
            f"got {len(args.windows)}"
        )
    counts = args.windows if len(args.windows) > 1 else len(files) * (args.windows or [None])
    for (model, rows), windows in zip(files.items(), counts, strict=True):
        wanted = {"none", *args.only} if args.only else {name for name, _ in rows}
        found[model] = gaps({key: row for key, row in rows.items() if key[0] in wanted}, windows)
        reference = found[model].get(args.reference)
        corpora = next(iter(found[model].values()))["by_corpus"]
        cells = [
            ["recipe", "prompt read", "bits", "gap", f"over {args.reference}", "prefill", *corpora]
        ]
        for name, one in sorted(found[model].items(), key=lambda kv: kv[1]["bits"]):
            over = ratio(one, reference) if reference and one["gap"][0] else ""
            cells.append([
                name, one["prefill"], f"{one['bits']:.2f}", interval(one), over,
                f"{times[model][name]:.2f}" if name in times.get(model, {}) else "",
                *(fixed(v, 3) for v in one["by_corpus"].values()),
            ])  # fmt: skip
        windows = next(iter(found[model].values()))["windows"]
        print(f"{model}, {windows} windows per corpus\n\n{table(cells, left=2)}\n")
    if args.picture:
        draw(found, args.picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure", help="score recipes, window by window")
    one.add_argument("--model", required=True)
    one.add_argument("--corpus", action="append", required=True, metavar="NAME=FILE")
    one.add_argument("--calibration", action="append", default=[], metavar="NAME=FILE")
    one.add_argument("--recipe", action="append", default=[], metavar="NAME",
                     help=NAMES)  # fmt: skip
    one.add_argument("--windows", type=int, default=40, help="per corpus, default: %(default)s")
    one.add_argument("--window", type=int, default=512)
    one.add_argument("--prompt-tokens", type=int, default=256)
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(run=measure)
    two = commands.add_parser("report", help="the table and the picture of measured rows")
    two.add_argument("results", nargs="+", type=Path)
    two.add_argument("--reference", default="ttq-3", help="default: %(default)s")
    two.add_argument(
        "--windows",
        type=int,
        nargs="+",
        default=[],
        help="only the first of each corpus; one number, or one for each model in the files' order",
    )
    two.add_argument("--only", nargs="*", default=[], metavar="NAME", help="only these recipes")
    two.add_argument("--times", nargs="*", type=Path, default=[], help="from time, per model")
    two.add_argument("--picture", type=Path)
    two.set_defaults(run=report)
    three = commands.add_parser("time", help="prefill and quantization over the plain prefill")
    three.add_argument("--model", required=True)
    three.add_argument("--recipe", action="append", default=[], metavar="NAME", help=NAMES)
    three.add_argument("--prompt-tokens", type=int, default=256)
    three.add_argument("--repeats", type=int, default=7)
    three.add_argument("--out", type=Path, required=True)
    three.set_defaults(run=measure_times)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

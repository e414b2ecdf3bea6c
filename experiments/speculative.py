"""Speculative decoding with a real model: is it lossless, what is accepted, does it pay.

Claim     the answers are those of the unquantized model, token for token.
Command   python experiments/speculative.py check --model smollm2 --corpus wikitext2=FILE
              --corpus ptb=FILE … --prompts 40 --out experiments/results/speculative_smollm2.json
          python experiments/speculative.py time --model smollm2
              --out experiments/results/speculative_times_smollm2.json
Cost      SmolLM2 on 2 cores: `check` of 200 prompts ten minutes for each number of drafts beside
          other work, 40 for 16 drafts on one core; started again with the same command, it goes on
          after the last row of the file. `time` of 3 prompts and 3 numbers of drafts 2 minutes;
          "auto" adds the compilation of one more program per length of prompt.
Expect    `check` prints a row per number of drafts and batch: answers that differ from the
          unquantized model's, and how close the two likeliest tokens were where they part; `time`
          a row per number of drafts, and for "auto", whose cycles choose it by costs that are
          measured before the clock starts: tokens per second beside both kinds of plain decoding.

Prompts are the beginnings of windows spread over each text, of 130 to 240 tokens, so that batches
are padded. Everything is greedy and in float32. Where two tokens are nearly as likely, sums of
another order may turn the choice: one pass over several tokens rounds otherwise than one over each.
So the first difference of an answer is measured by the distance of the two largest logits, over the
size of the larger one.
"""

import argparse
import functools
import json
import operator
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from quality import corpus_text, spread
from recipe_names import recipe_named

import ttq_jax as ttq
from ttq_jax.chat.ask import ask
from ttq_jax.draft_costs import AUTO, chooses
from ttq_jax.evaluation.corpora import sha256
from ttq_jax.evaluation.describe import device, table, versions
from ttq_jax.files import check_destination, write_file
from ttq_jax.generate import program
from ttq_jax.generation import Drafts
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.offline.calibrate import prepare

WINDOW = 240
CASES = ((1, 5), (2, 5), (4, 5), (8, 5), (4, 1), (4, 2), (16, 5))
"""(drafts per cycle, batch)."""
NEAR = 1e-5


def prompts_of(model: ttq.Model, specs: Sequence[str], count: int) -> tuple[list[str], dict]:
    """Prompts of every corpus, and the texts' hashes."""
    texts = dict(map(corpus_text, specs))
    rng, prompts = np.random.default_rng(0), []
    for text in texts.values():
        windows = ttq.cut_windows(model.tokenizer, text, WINDOW)
        for i in spread(len(windows), count):
            ids = windows[i][: rng.integers(130, WINDOW)].tolist()
            # A prompt is a text; ids that begin inside a character make another one.
            prompts.append(model.tokenizer.continuation([], ids))
    return prompts, {name: sha256(text) for name, text in texts.items()}


def closeness(model: ttq.Model, prompt: str, answer: list[int]) -> float:
    """Of the unquantized model's next token: (largest logit − second) / |largest|."""
    row = [*ask(model, [prompt], chat=False).rows[0], *answer]
    tokens = jnp.asarray([row], jnp.int32)
    cache = empty_cache(model.config, 1, len(row), jnp.float32)
    hidden, _, _ = forward(model.config, model.params, tokens, jnp.ones(tokens.shape, bool), cache)
    first, second = np.asarray(
        jax.lax.top_k(logits(model.config, model.params, hidden[0, -1]), 2)[0]
    )
    return float((first - second) / abs(first))


def rows_of(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file, if they were made of the same things; no rows otherwise."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    rows = found.pop("rows")
    return rows if found == json.loads(json.dumps(about)) else []


def check(args: argparse.Namespace) -> None:
    """Compares answers with those of the unquantized model."""
    check_destination(args.out, parents=True)
    model = ttq.load(args.model)
    recipe = recipe_named(args.recipe)
    prompts, hashes = prompts_of(model, args.corpus, args.prompts)
    offline = prepare(model, recipe)
    about = {
        "model": args.model, "recipe_name": args.recipe, "recipe": recipe.describe(),
        "tokens_each": args.tokens, "corpora_sha256": hashes, "device": device(),
        "versions": versions(),
    }  # fmt: skip
    rows = rows_of(args.out, about)
    plain = functools.cache(
        lambda batch: (
            ttq.generate(
                model, prompts, recipe=None, max_new_tokens=args.tokens, batch_size=batch
            ).tokens
        )
    )
    for drafts, batch in CASES:
        if (drafts, batch, len(prompts)) in {(r["drafts"], r["batch"], r["answers"]) for r in rows}:
            continue
        made = ttq.generate(
            model, prompts, recipe=recipe, offline=offline, max_new_tokens=args.tokens,
            batch_size=batch, speculate=drafts,
        )  # fmt: skip
        apart = []
        for prompt, ours, theirs in zip(prompts, made.tokens, plain(batch), strict=True):
            if ours != theirs:
                same = next(
                    (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                    min(len(ours), len(theirs)),
                )
                apart.append(closeness(model, prompt, theirs[:same]))
        total = sum(made.drafts, Drafts(0, 0, 0, 0))
        rows.append({
            "drafts": drafts, "batch": batch, "answers": len(prompts), "different": len(apart),
            "near_ties": sum(gap < NEAR for gap in apart), "closeness": apart, **total.describe(),
        })  # fmt: skip
        print(f"{drafts} drafts, batches of {batch}: {rows[-1]}", flush=True)
        write_file(args.out, json.dumps({**about, "rows": rows}, indent=1) + "\n", parents=True)


def measure_times(args: argparse.Namespace) -> None:
    """Times decoding in turns, on the same prompts."""
    check_destination(args.out, parents=True)
    model = ttq.load(args.model)
    recipe = recipe_named(args.recipe)
    windows = ttq.cut_windows(model.tokenizer, corpus_text("python")[1], 256)
    texts = [model.tokenizer.continuation([], w.tolist()) for w in windows[: args.prompts]]
    offline = prepare(model, recipe)
    contenders: dict[str, dict[str, Any]] = {
        "none": {"recipe": None}, args.recipe: {"recipe": recipe, "offline": offline},
    }  # fmt: skip
    for drafts in args.drafts:
        contenders[str(drafts)] = {"recipe": recipe, "offline": offline, "speculate": drafts}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    totals: dict[str, list[Drafts]] = {name: [] for name in contenders}
    costs: dict[str, dict[str, Any]] = {}
    for text in texts:
        runs = {
            name: program(model, [text], max_new_tokens=args.tokens, **how)[0]
            for name, how in contenders.items()
        }
        for name, run in runs.items():
            stats = run(args.tokens)[-1]  # and compiles, and measures costs, at the first prompt
            if stats is not None:
                totals[name].append(Drafts.of(stats[0]))
            if chooses(contenders[name].get("speculate", 0)):
                costs[name] = {"costs": run.costs.describe()}
        for name, run in runs.items():
            start = time.perf_counter()
            run(1)
            first = time.perf_counter()
            new = int(run(args.tokens)[1][0])
            rates[name].append((new - 1) / (time.perf_counter() - first - (first - start)))
    base = statistics.median(rates["none"])
    found = {
        "model": args.model, "recipe_name": args.recipe, "recipe": recipe.describe(),
        "prompts": len(texts), "prompt_tokens": 256, "new_tokens": args.tokens,
        "rows": [
            {
                "decoding": name, "tokens_per_second": round(statistics.median(each), 2),
                "over_none": round(statistics.median(each) / base, 3),
                **(functools.reduce(operator.add, totals[name]).describe() if totals[name] else {}),
                **costs.get(name, {}),
            }
            for name, each in rates.items()
        ],
        "device": device(), "versions": versions(),
    }  # fmt: skip
    write_file(args.out, json.dumps(found, indent=1) + "\n", parents=True)
    cells = [["drafts", "tokens/s", "over none", "accepted", "tokens per pass"]]
    for row in found["rows"]:
        told = (row.get(k) for k in ("acceptance", "tokens_per_pass"))
        more = ["" if one is None else f"{one:.2f}" for one in told]
        cells.append([row["decoding"], f"{row['tokens_per_second']:.1f}",
                      f"{row['over_none']:.2f}", *more])  # fmt: skip
    print(table(cells))


def number(text: str) -> int | str:
    """A number of drafts, or auto."""
    return text if text == AUTO else int(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("check", help="compare answers with the unquantized model's")
    one.add_argument("--corpus", action="append", required=True, metavar="NAME=FILE")
    one.add_argument("--prompts", type=int, default=40, help="per corpus, default: %(default)s")
    one.add_argument("--tokens", type=int, default=32, help="new tokens, default: %(default)s")
    one.set_defaults(run=check)
    two = commands.add_parser("time", help="tokens per second, in turns")
    two.add_argument("--prompts", type=int, default=8, help="default: %(default)s")
    two.add_argument("--tokens", type=int, default=128, help="new tokens, default: %(default)s")
    two.add_argument(
        "--drafts", type=number, nargs="+", default=[1, 2, 4, 8, AUTO],
        help="of a cycle, each to be timed; auto chooses them, default: 1 2 4 8 auto",
    )  # fmt: skip
    two.set_defaults(run=measure_times)
    for each in (one, two):
        each.add_argument("--model", default="smollm2")
        each.add_argument("--recipe", default="fast", help="default: %(default)s")
        each.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()

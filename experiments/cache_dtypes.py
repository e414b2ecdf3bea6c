"""Keys and values in eight bits: what it does to perplexity, and what a token of text then takes.

Claim     with `--cache-dtype int8` the perplexity of SmolLM2 changes by less than the quantized
          weights change it by far, and a token's keys and values take a quarter of their float32
          bytes and a bit.
Command   python experiments/cache_dtypes.py --model smollm2 --corpus wikitext2=FILE
              --corpus ptb=FILE --out experiments/results/cache_dtypes_smollm2.json
Cost      SmolLM2, 8 windows of each of two texts: about 5 minutes on 2 cores.
Expect    a row per recipe and dtype: perplexity, its ratio over the same recipe's with a float32
          cache on the same windows with its 95 % interval, and bytes per token of text.

Protocol causal: the weights come from the first 256 tokens of a window, the 256 after them are
scored. All attention reads keys and values as they are stored, the prompt's own too.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from quality import corpus_text, spread

import ttq_jax as ttq
from ttq_jax.config import ModelConfig
from ttq_jax.evaluation.corpora import sha256
from ttq_jax.evaluation.describe import device, table, versions
from ttq_jax.evaluation.intervals import interval95
from ttq_jax.evaluation.perplexity import Protocol, window_nll
from ttq_jax.files import check_destination, write_file
from ttq_jax.models.cache import DTYPES, empty_cache
from ttq_jax.offline.calibrate import prepare
from ttq_jax.types import stored_bytes

PROTOCOL = Protocol(window=512, prompt_tokens=256)
RECIPES = ("none", "fast")


def bytes_per_slot(config: ModelConfig, dtype: str) -> int:
    """Bytes of one token's keys and values over all layers."""
    cache = jax.eval_shape(partial(empty_cache, config, 1, 1, dtype))
    return stored_bytes((cache.k, cache.v))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--corpus", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--windows", type=int, default=8, help="per corpus, default: %(default)s")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    check_destination(args.out)
    model = ttq.load(args.model)
    texts, windows = dict(map(corpus_text, args.corpus)), []
    for text in texts.values():
        cut = ttq.cut_windows(model.tokenizer, text, PROTOCOL.window)
        windows.append(cut[spread(len(cut), args.windows)])
    rows, begun = [], time.perf_counter()
    for name in RECIPES:
        recipe = None if name == "none" else ttq.preset(name)
        offline = prepare(model, recipe)
        nll = {
            dtype: np.array([
                [
                    window_nll(model, window, recipe=recipe, offline=offline, protocol=PROTOCOL,
                               cache_dtype=dtype)
                    for window in of_text
                ]
                for of_text in windows
            ]) / PROTOCOL.scored
            for dtype in DTYPES
        }  # fmt: skip
        for dtype, each in nll.items():
            apart = each - nll["float32"]
            ends = None if dtype == "float32" else interval95(list(apart))
            rows.append({
                "recipe": name, "cache_dtype": dtype,
                "perplexity": {
                    text: round(float(np.exp(one.mean())), 4)
                    for text, one in zip(texts, each, strict=True)
                },
                "over_float32": round(float(np.exp(apart.mean(axis=1)).mean()), 6),
                "interval_95": None if ends is None else [round(end, 6) for end in ends],
                "bytes_per_token_of_text": bytes_per_slot(model.config, dtype),
            })  # fmt: skip
    found = {
        "command": "python experiments/cache_dtypes.py", "model": dict(model.origin),
        "protocol": {"kind": PROTOCOL.kind, "window": PROTOCOL.window,
                     "prompt_tokens": PROTOCOL.prompt_tokens},
        "windows": args.windows, "corpora": {name: sha256(text) for name, text in texts.items()},
        "rows": rows, "seconds": round(time.perf_counter() - begun, 1),
        "device": device(), "versions": versions(),
    }  # fmt: skip
    write_file(args.out, json.dumps(found, indent=1) + "\n", parents=True)
    cells = [["recipe", "cache", *texts, "over float32", "bytes"]]
    cells += [
        [row["recipe"], row["cache_dtype"], *(f"{one:.3f}" for one in row["perplexity"].values()),
         f"{row['over_float32']:.5f}", str(row["bytes_per_token_of_text"])]
        for row in rows
    ]  # fmt: skip
    print(table(cells))


if __name__ == "__main__":
    main()

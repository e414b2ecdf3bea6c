"""Prompts of thousands of tokens, read whole and in parts: what a chip needs besides the weights.

Claim     read in parts of 2048 tokens (`--prefill-chunk 2048`), a prompt of 32 768 needs a fraction
          of the temporary memory that it needs whole; what still grows with it is one hidden state
          per token, and the cache.
Command   python experiments/compile_prompts.py --out experiments/results/compiled_prompts.json
Cost      about 5 minutes on 2 cores, 5 GB of memory; no weights, no accelerator. Needs the TPU
          compiler of the test extra.
Expect    see experiments/results/compiled_prompts.json. Figures are the compiler's own
          (`memory_analysis()`), none was checked on a chip. Where it refuses a program, the total
          is what its message says that would be needed.

Memory is in bytes of one device, by kind, as `ttq plan` counts it: temporaries are what the
compiler adds to the dense blocks, the packed ones, the tables and the cache, which is bfloat16
unless it says int8 (`--cache-dtype`).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax

import ttq_jax as ttq
from ttq_jax.chips.plan import plan
from ttq_jax.chips.released import released_config
from ttq_jax.evaluation.describe import versions
from ttq_jax.files import check_destination, write_file

MODEL, CHIP, NEW = "llama-3-8b", "v6e", 128
PROGRAMS = (
    (8192, 0, None), (8192, 2048, None),
    (32768, 0, None), (32768, 2048, None), (32768, 2048, "int8"),
)  # fmt: skip
"""(tokens of the prompt, of a part, dtype of the cache)."""


def figures(tokens: int, chunk: int, cache_dtype: str | None) -> dict:
    """One program's record."""
    recipe, start = ttq.preset("ttq", bits=4, group_size=128), time.perf_counter()
    made = plan(
        released_config(MODEL), CHIP, recipe, prompt_tokens=tokens, new_tokens=NEW,
        prefill_chunk=chunk, cache_dtype=cache_dtype,
    )  # fmt: skip
    if made.by != "compiler":
        raise SystemExit(made.why)
    return {
        "model": MODEL, "chip": CHIP, "dtype": "bfloat16", "batch": 1, "prompt_tokens": tokens,
        "new_tokens": NEW, "prefill_chunk": chunk, "cache_dtype": cache_dtype or "bfloat16",
        "recipe": recipe.describe(),
        "device": made.device, "total": made.total, "memory": made.memory, "fits": made.fits,
        "compile_seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    if args.out:
        check_destination(args.out)
    # Nothing runs on a device; the compiler is asked for by name.
    jax.config.update("jax_platforms", "cpu")
    records = []
    for tokens, chunk, cache_dtype in PROGRAMS:
        print(f"{tokens} tokens, in parts of {chunk}", file=sys.stderr, flush=True)
        records.append(figures(tokens, chunk, cache_dtype))
    results = {
        "command": "python experiments/compile_prompts.py", "versions": versions("libtpu"),
        "programs": records,
    }  # fmt: skip
    text = json.dumps(results, indent=1)
    print(text)
    if args.out:
        write_file(args.out, text + "\n")


if __name__ == "__main__":
    main()

"""Whole programs of released models, compiled at full size for chips that are not here.

Claim     reading a prompt, quantizing every weight for it and decoding are one executable that fits
          the chip: the dense bfloat16 weights, the packed copy (4 bits and a scale and a zero point
          per group), the cache, and little else. Speculation adds the vocabulary's unquantized
          tables, which the verifier reads, and less than half a GiB.
Command   python experiments/compile_programs.py --out experiments/results/compiled_programs.json
          python experiments/compile_programs.py --recipe fast --group-size 64 --drafts 0 4 16
              --out experiments/results/compiled_speculation.json
Cost      about 3 minutes on 2 cores for each, 4 GB of memory; no weights, no accelerator. Needs the
          compilers of the test extra.
Expect    see experiments/results/compiled_programs.json; peak memory of Llama-3-8B about 19 GiB, of
          Qwen3-1.7B about 4 GiB. Figures are the compilers' own, none was checked on a chip.

Memory is in GiB (2^30 bytes): arguments are the dense weights, temporaries the packed copy, cache
and activations. Seconds are those of tracing and compiling here.
"""

import argparse
import itertools
import json
import shlex
import sys
import time
from pathlib import Path

import jax

import ttq_jax as ttq
from ttq_jax.chips.absent import CHIPS
from ttq_jax.chips.programs import compile_generate, memory_of
from ttq_jax.chips.released import RELEASED, params_shapes, released_config
from ttq_jax.evaluation.describe import versions
from ttq_jax.files import check_destination, write_file
from ttq_jax.prefill import decoded_shapes
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import Offline, effective_bits, kernels, stored_bytes

PROGRAMS = (
    ("qwen3-1.7b", "v5e"), ("llama-3-8b", "v6e"), ("llama-3-8b", "h100"),
)  # fmt: skip
PROMPT, NEW = 512, 128


def figures(model: str, chip: str, recipe: Recipe, drafts: int) -> dict:
    """One program's record."""
    config = released_config(model)
    packed = decoded_shapes(params_shapes(config), config, recipe, Offline())
    start = time.perf_counter()
    compiled = compile_generate(
        model, chip, recipe, prompt_tokens=PROMPT, new_tokens=NEW, drafts=drafts
    )
    seconds = time.perf_counter() - start
    return {
        "model": model, "chip": chip, "dtype": "bfloat16", "batch": 1, "prompt_tokens": PROMPT,
        "new_tokens": NEW, "drafts": drafts, "recipe": recipe.describe(),
        "effective_bits": round(effective_bits(packed), 4),
        "packed_gib": round(stored_bytes(kernels(packed["layers"])) / 2**30, 3),
        "memory_gib": memory_of(compiled, chip), "compile_seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--model", choices=RELEASED, help="only this model, on --chip")
    parser.add_argument("--chip", choices=tuple(CHIPS))
    parser.add_argument("--bits", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--group-size", type=int, nargs="+", default=[128, 32], metavar="N",
                        help="default: 128 32")  # fmt: skip
    parser.add_argument("--recipe", default="ttq", help="a preset, default: %(default)s")
    parser.add_argument("--drafts", type=int, nargs="+", default=[0], metavar="K",
                        help="of each pass of the dense weights, default: 0")  # fmt: skip
    args = parser.parse_args()
    if args.out:
        check_destination(args.out)
    if (args.model is None) != (args.chip is None):
        parser.error("--model and --chip go together")
    # Nothing runs on a device; the compilers are asked for by name.
    jax.config.update("jax_platforms", "cpu")
    programs = PROGRAMS if args.model is None else ((args.model, args.chip),)
    records = []
    for model, chip in programs:
        for group_size, drafts in itertools.product(args.group_size, args.drafts):
            said = f"{model} for {chip}, group {group_size}, {drafts} drafts"
            print(said, file=sys.stderr, flush=True)
            recipe = ttq.preset(args.recipe, bits=args.bits, group_size=group_size)
            records.append(figures(model, chip, recipe, drafts))
    results = {
        "command": shlex.join(["python", "experiments/compile_programs.py", *sys.argv[1:]]),
        "versions": versions("libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc"),
        "programs": records,
    }
    text = json.dumps(results, indent=1)
    print(text)
    if args.out:
        write_file(args.out, text + "\n")


if __name__ == "__main__":
    main()

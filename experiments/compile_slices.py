"""Whole programs of released models, compiled at full size for slices of TPUs that are not here.

Claim     a model that is shared among the devices of a slice takes its share of each one's memory,
          and the devices sum twice in every layer of a decoded token and gather no weight.
Command   python experiments/compile_slices.py --out experiments/results/compiled_slices.json
Cost      about 15 minutes on 2 busy cores, 3 GB of memory; no weights, no accelerator. Needs the
          TPU compiler of the test extra.
Expect    see experiments/results/compiled_slices.json; Llama-3-8B takes about 2.3 GiB of each of
          eight v5e, Llama-3-70B about 10 GiB of each of four that fetch the unquantized blocks from
          their host. Figures are the compiler's own, none was checked on a chip.

Memory is in GiB (2^30 bytes) of one device: arguments are its part of the dense weights,
temporaries its part of the packed copy, cache and activations. What it has in its host's memory is
counted apart.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax

import ttq_jax as ttq
from ttq_jax.checkpoint.placing import Memory
from ttq_jax.chips.programs import memory_of
from ttq_jax.chips.slices import collectives, compile_on_slice
from ttq_jax.evaluation.describe import versions
from ttq_jax.files import check_destination, write_file
from ttq_jax.mesh import parse

# Model, slice, mesh, where the unquantized blocks lie.
PROGRAMS = (
    ("llama-3-8b", "v5e:2x4", "data=1,model=8", "device"),
    ("llama-3-8b", "v5e:2x2", "data=1,model=4", "device"),
    ("llama-3-70b", "v5e:4x4", "data=1,model=16", "device"),
    ("llama-3-70b", "v5e:2x2", "data=1,model=4", "host"),
)
NAMES = ("model", "slice", "mesh", "dense_memory")
PROMPT, NEW = 512, 128


def figures(model: str, slice_: str, mesh: str, memory: Memory) -> dict:
    """One program's record."""
    recipe = ttq.preset("ttq", bits=4, group_size=128)
    start = time.perf_counter()
    compiled = compile_on_slice(
        model, slice_, parse(mesh), recipe, prompt_tokens=PROMPT, new_tokens=NEW,
        dense_memory=memory,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    return {
        "model": model, "slice": slice_, "mesh": mesh, "dense_memory": memory,
        "dtype": "bfloat16", "batch": 1,
        "prompt_tokens": PROMPT, "new_tokens": NEW, "recipe": recipe.describe(),
        "memory_gib": memory_of(compiled, slice_.partition(":")[0]),
        "host_gib": round(compiled.memory_analysis().host_argument_size_in_bytes / 2**30, 3),
        "collectives": collectives(compiled.as_text()), "compile_seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--model", help="compile this one alone; --out keeps the others' rows")
    args = parser.parse_args()
    if args.out:
        check_destination(args.out)
    made_with, kept = versions("libtpu"), {}
    if args.model and args.out and args.out.exists():
        before = json.loads(args.out.read_text())
        if before["versions"] != made_with:
            raise SystemExit(f"{args.out} was made with {before['versions']}; make all of it anew")
        kept = {tuple(one[name] for name in NAMES): one for one in before["programs"]}
    # Nothing runs on a device; the compiler is asked for by name.
    jax.config.update("jax_platforms", "cpu")
    for program in PROGRAMS:
        if args.model in (None, program[0]):
            print("{} for {}, {}, {}".format(*program), file=sys.stderr, flush=True)
            kept[program] = figures(*program)
    results = {
        "command": "python experiments/compile_slices.py", "versions": made_with,
        "programs": [kept[program] for program in PROGRAMS if program in kept],
    }  # fmt: skip
    text = json.dumps(results, indent=1)
    print(text)
    if args.out:
        write_file(args.out, text + "\n")


if __name__ == "__main__":
    main()

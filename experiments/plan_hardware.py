"""What fits a chip, or eight: released models, with and without unquantized weights on the host.

Claim     a model whose unquantized and packed blocks do not fit a chip side by side is quantized
          there all the same, if the unquantized ones lie in the host's memory and are streamed:
          Llama-3-8B on a v5e, Gemma-3-27B on a v6e. Eight v5e that share a model hold larger ones
          without that, and with it Llama-3-70B.
Command   python experiments/plan_hardware.py --out experiments/results/plans.json
Cost      about 11 minutes on 2 busy cores, 6 GB of memory; no weights, no chip. Needs libtpu.
Expect    see experiments/results/plans.json; 5.9 GiB of a v5e for Llama-3-8B, 13.5 GiB of a v6e for
          Gemma-3-27B. "compiled" are the compiler's figures, "summed" are sums of sizes, as
          `ttq plan --arithmetic` makes them. Nothing ran on a chip.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax

import ttq_jax as ttq
from ttq_jax.chips.plan import Plan, plan
from ttq_jax.chips.released import released_config
from ttq_jax.evaluation.describe import versions
from ttq_jax.files import check_destination, write_file

# Model, chip, bits, where the unquantized blocks lie.
COMPILED = (
    ("llama-3-8b", "v5e", 4, "device"), ("llama-3-8b", "v5e", 4, "host"),
    ("gemma-3-27b", "v6e", 3, "host"),
)  # fmt: skip
MODELS = (
    "qwen3-1.7b", "phi-4-mini", "llama-3-8b", "qwen3-8b", "mistral-nemo-12b", "gemma-3-27b",
    "qwen3-30b-a3b", "llama-3-70b",
)  # fmt: skip
CHIPS = ("v5e", "v6e", "v5e-8", "h100", "a100-40", "l4", "t4")
SLICES = {"v5e-8": ("v5e", {"data": 1, "model": 8})}
"""What is several chips, and the mesh of them."""


def planned(model: str, chip: str, bits: int, memory: str) -> dict:
    """One plan by sums, as a record."""
    made = ask(model, chip, bits, memory, compiled=False)
    record = {"model": model, "chip": chip, "bits": bits, "dense_memory": memory}
    return record | made.describe()


def compiled(model: str, chip: str, bits: int, memory: str) -> dict:
    """One plan by the compiler, as a record; beside its total the sum of sizes."""
    print(f"{model} for {chip}, {memory}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    made = ask(model, chip, bits, memory, compiled=True)
    seconds = time.perf_counter() - start
    if made.by != "compiler":
        raise SystemExit(made.why)
    record = planned(model, chip, bits, memory)
    summed = {"summed_total": record["total"], "compile_seconds": round(seconds, 1)}
    return record | made.describe() | summed


def ask(model: str, chip: str, bits: int, memory: str, *, compiled: bool) -> Plan:
    """The plan."""
    recipe = ttq.preset("ttq", bits=bits, group_size=128)
    chip, mesh = SLICES.get(chip, (chip, None))
    return plan(
        released_config(model), chip, recipe, dense_memory=memory, compiled=compiled, mesh=mesh
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument(
        "--sums", action="store_true", help="the sums alone; --out keeps what the compiler said"
    )
    args = parser.parse_args()
    if args.out:
        check_destination(args.out)
    made_with = versions("libtpu")
    if args.sums:
        before = json.loads(args.out.read_text())
        if before["versions"] != made_with:
            raise SystemExit(f"{args.out} was made with {before['versions']}; make all of it anew")
    # Nothing runs on a device; the compilers are asked for by name.
    jax.config.update("jax_platforms", "cpu")
    results = {
        "command": "python experiments/plan_hardware.py",
        "versions": made_with,
        "recipe": "ttq", "group_size": 128, "dtype": "bfloat16", "batch": 1,
        "prompt_tokens": 512, "new_tokens": 128,
        "compiled": before["compiled"] if args.sums else [compiled(*which) for which in COMPILED],
        "summed": [
            planned(model, chip, 4, memory)
            for model in MODELS for chip in CHIPS for memory in ("device", "host")
        ],
    }  # fmt: skip
    text = json.dumps(results, indent=1)
    print(text)
    if args.out:
        write_file(args.out, text + "\n")


if __name__ == "__main__":
    main()

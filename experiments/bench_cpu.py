"""Speed and memory on a CPU, as ratios measured side by side in one run.

Claim     packed decoding is at least as fast as dense decoding, dense decoding at least twice
          transformers' float32 `generate`, prefill plus quantization at most 1.5 times the plain
          prefill; a cold start takes at most 20 s, with a warm compilation cache at most 8 s.
Command   python experiments/bench_cpu.py --out experiments/results/bench_cpu.json
Cost      about 5 minutes on 2 cores; needs the test extra (PyTorch) and both packaged models.
Expect    see experiments/results/bench_cpu.json. Nothing else may run beside it.

The contenders of a comparison take turns, so that a slow moment of the machine hits all of them;
a figure is the median over the turns.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import ttq_jax as ttq
from ttq_jax.files import check_destination, write_file
from ttq_jax.generate import generate_tokens
from ttq_jax.models.cache import activation_dtype, empty_cache
from ttq_jax.prefill import prefill
from ttq_jax.prompts import pad_prompts
from ttq_jax.sampling import Sampling
from ttq_jax.types import Offline, Prompts

PROMPT = "The history of the Roman Empire begins with"
NEW_TOKENS = 64


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def seconds_of(run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def take_turns(runs: dict, turns: int) -> dict[str, float]:
    """Median seconds of each contender, after one warm-up each."""
    for name, run in runs.items():
        log(f"  warm-up: {name}")
        run()
    times = {name: [] for name in runs}
    for turn in range(turns):
        for name, run in runs.items():
            times[name].append(seconds_of(run))
        log(f"  turn {turn + 1} of {turns}")
    return {name: statistics.median(t) for name, t in times.items()}


def jax_generate(model, recipe, rows, limit):
    """A run of the whole program for `limit` tokens, without an end token."""
    prompts = pad_prompts(rows, max_positions=model.config.max_positions)
    return partial(
        generate_tokens, model.params, prompts, Offline(), jax.random.key(0),
        jnp.asarray(limit, jnp.int32), config=model.config, recipe=recipe, sampling=Sampling(),
        capacity=NEW_TOKENS, eos_ids=(),
    )  # fmt: skip


def torch_model(path: Path):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def torch_generate(model, rows, limit):
    import torch

    tokens = torch.tensor(rows)

    def run():
        with torch.inference_mode():
            model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
                max_new_tokens=limit, min_new_tokens=limit, pad_token_id=0,
            )  # fmt: skip

    return run


def decode_speed(model, gguf: Path, turns: int) -> dict:
    """Tokens per second at batch 1: (NEW_TOKENS - 1) tokens over the time beyond the first."""
    rows = [model.tokenizer.encode(PROMPT)]
    recipes = {"unquantized": None} | {
        f"ttq {bits}-bit": ttq.preset("ttq", bits=bits) for bits in (2, 3, 4, 5, 8)
    }
    reference = torch_model(gguf)
    runs = {}
    for limit in (1, NEW_TOKENS):
        runs |= {(n, limit): jax_generate(model, r, rows, limit) for n, r in recipes.items()}
        runs["transformers float32", limit] = torch_generate(reference, rows, limit)
    t = take_turns(runs, turns)
    names = {name for name, _ in runs}
    speed = {n: (NEW_TOKENS - 1) / (t[n, NEW_TOKENS] - t[n, 1]) for n in names}
    ours = speed["unquantized"]
    return {
        "prompt_tokens": len(rows[0]), "new_tokens": NEW_TOKENS, "batch": 1, "group_size": 32,
        "tokens_per_second": {n: round(s, 2) for n, s in sorted(speed.items())},
        "unquantized_over_transformers": round(ours / speed["transformers float32"], 3),
        "packed_over_unquantized": {
            n: round(s / ours, 3) for n, s in sorted(speed.items()) if n.startswith("ttq")
        },
    }  # fmt: skip


@partial(jax.jit, static_argnames=("config", "recipe"))
def read_prompt(params, tokens, *, config, recipe):
    """Prefill as `generate` runs it; the packed tree is returned, so it must be made."""
    prompts = Prompts(tokens, jnp.ones(tokens.shape, bool))
    cache = empty_cache(config, *tokens.shape, activation_dtype(params))
    hidden, cache, packed, *_ = prefill(
        params, prompts, cache, config=config, recipe=recipe, offline=Offline()
    )
    return hidden[:, -1], cache, packed["layers"] if recipe else None


def prefill_cost(model, turns: int) -> dict:
    """Prefill with quantization over the plain one, by prompt length."""
    out = {}
    for length in (128, 512, 2048):
        rng = np.random.default_rng(0)
        tokens = jnp.asarray(rng.integers(0, model.config.vocab_size, (1, length)), jnp.int32)
        recipes = {"unquantized": None, "ttq 4-bit": ttq.preset("ttq", bits=4)}
        t = take_turns(
            {n: partial(read_prompt, model.params, tokens, config=model.config, recipe=r)
             for n, r in recipes.items()},
            turns,
        )  # fmt: skip
        out[str(length)] = {
            "seconds": {n: round(s, 4) for n, s in t.items()},
            "ratio": round(t["ttq 4-bit"] / t["unquantized"], 3),
        }
    return out


def run_cli(model: str, *options: str) -> dict:
    """Wall clock, peak resident memory and output of one `ttq generate` in a fresh process."""
    command = [sys.executable, "-m", "ttq_jax", "generate", "--model", model, "--prompt", PROMPT,
               "--json", "--quiet", *options]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed with status {status}")
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "peak_resident_mb": round(usage.ru_maxrss / 1024),
        "stages": {k: round(v, 2) for k, v in json.loads(output)["seconds"].items()},
    }


def start_up(models: list[str]) -> dict:
    """First token from a cold start, with an empty and then a warm compilation cache; memory."""
    out = {}
    for name in models:
        with tempfile.TemporaryDirectory() as cache:
            log(f"  {name}: cold start")
            cold = run_cli(name, "--max-new-tokens", "1", "--cache-dir", cache)
            log(f"  {name}: warm compilation cache")
            warm = run_cli(name, "--max-new-tokens", "1", "--cache-dir", cache)
            log(f"  {name}: memory of 64 new tokens")
            full = run_cli(name, "--no-compilation-cache")
        out[name] = {"first_token_cold": cold, "first_token_warm": warm, "64_tokens": full}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--turns", type=int, default=5, help="repetitions (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma3-270m"],
                        help="for start-up and memory (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    if args.out:
        check_destination(args.out)
    from ttq_jax.checkpoint.packaged import ALIASES

    results = {
        "command": "python experiments/bench_cpu.py",
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in ("jax", "jaxlib", "flax", "torch", "transformers")}
        | {"ttq_jax": ttq.__version__, "python": platform.python_version()},
        "model": "SmolLM2-135M-Instruct (GGUF Q4_1), float32",
    }
    log("start-up and memory")
    results["start_up"] = start_up(args.models)
    model = ttq.load("smollm2")
    log("prefill")
    results["prefill"] = prefill_cost(model, args.turns)
    log("decode")
    results["decode"] = decode_speed(model, ALIASES["smollm2"](), args.turns)
    text = json.dumps(results, indent=1)
    print(text)
    if args.out:
        write_file(args.out, text + "\n")


if __name__ == "__main__":
    main()

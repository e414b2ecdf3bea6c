"""Speed and memory on a CPU, as ratios measured side by side in one run.

Claim     the commands decode by `fast` 1.6 to 1.8 times as fast as before its scales were coded
          and its table packed. With vectors of 512 bits that is faster than llama.cpp's 4-bit
          formats on SmolLM2, and slower on Gemma 3. Dense decoding is at least twice
          transformers' float32 `generate`. A cold start takes at most 20 s, with a warm
          compilation cache at most 8 s.
Command   pip install llama-cpp-python
          git worktree add --detach build/before 4956e5a
          python experiments/bench_cpu.py --before build/before
              --out experiments/results/bench_cpu.json
Cost      about 10 minutes on 2 cores; needs the test extra (PyTorch) and both packaged models.
          llama-cpp-python is compiled when it is installed, which takes 10 minutes more.
Expect    see experiments/results/bench_cpu.json. Nothing else may run beside it: llama.cpp's
          threads spin while they wait.

The contenders of a comparison take turns, so that a slow moment of the machine hits all of them;
a figure is the median over the turns. `--before` names a checkout of an older version of this
package; its command line then takes turns with this one's.
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
from llama_cpp_side import gguf_files, greedy, open_gguf, weight_bytes

import ttq_jax as ttq
from ttq_jax.checkpoint.packaged import ALIASES
from ttq_jax.files import check_destination, write_file
from ttq_jax.generate import generate_tokens
from ttq_jax.models.cache import activation_dtype, empty_cache
from ttq_jax.models.traffic import bytes_per_token
from ttq_jax.offline.calibrate import prepare
from ttq_jax.prefill import decoded_shapes, prefill
from ttq_jax.prompts import pad_prompts
from ttq_jax.quant.head import joined
from ttq_jax.sampling import Sampling
from ttq_jax.types import Offline, Prompts

PROMPT = "The history of the Roman Empire begins with"
NEW_TOKENS = 64
WIDE = {"xla_cpu_prefer_vector_width": 512}
HERE = Path(__file__).resolve().parent.parent


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def told(found: dict) -> dict:
    """A section's figures, said as soon as they are there."""
    log(json.dumps(found))
    return found


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


def jax_generate(model, recipe, rows, options=None):
    """From a limit to a run of the whole program without an end token; and its bytes per token.

    `options` are XLA's, for this program alone.
    """
    offline = prepare(model, recipe)
    shapes = decoded_shapes(model.params, model.config, recipe, offline)
    params, besides = joined(model.params, recipe, offline)
    prompts = pad_prompts(rows, max_positions=model.config.max_positions)

    def arrays(limit):
        return params, prompts, besides, jax.random.key(0), jnp.asarray(limit, jnp.int32)

    program = generate_tokens.lower(
        *arrays(1), config=model.config, recipe=recipe, sampling=Sampling(), capacity=NEW_TOKENS,
        eos_ids=(),
    ).compile(options)  # fmt: skip
    return lambda limit: partial(program, *arrays(limit)), bytes_per_token(shapes, model.config)


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


def decode_speed(model, gguf: Path, files: dict, widths: tuple[int, ...], turns: int) -> dict:
    """Tokens per second at batch 1: (NEW_TOKENS - 1) tokens over the time beyond the first."""
    rows = [model.tokenizer.encode(PROMPT)]
    recipes = {
        "unquantized": None,
        **{f"ttq {bits}-bit": ttq.preset("ttq", bits=bits) for bits in widths},
        "fast": ttq.preset("fast"),
        "fast, dense table": ttq.preset("fast", head=None),
    }
    ours = {n: jax_generate(model, recipe, rows) for n, recipe in recipes.items()}
    for n in ("unquantized", "fast"):
        ours[f"{n}, 512-bit vectors"] = jax_generate(model, recipes[n], rows, WIDE)
    theirs = {"transformers float32": partial(torch_generate, torch_model(gguf), rows)}
    theirs |= {f"llama.cpp {n}": partial(greedy, open_gguf(f), rows[0]) for n, f in files.items()}
    runs = {
        (n, limit): start(limit)
        for limit in (1, NEW_TOKENS)
        for n, start in {**{n: run for n, (run, _) in ours.items()}, **theirs}.items()
    }
    t = take_turns(runs, turns)
    speed = {n: (NEW_TOKENS - 1) / (t[n, NEW_TOKENS] - t[n, 1]) for n in (*ours, *theirs)}
    dense = speed["unquantized"]
    return {
        "prompt_tokens": len(rows[0]), "new_tokens": NEW_TOKENS, "batch": 1,
        "tokens_per_second": {n: round(s, 2) for n, s in speed.items()},
        "bytes_per_token": {n: size for n, (_, size) in ours.items()}
        | {f"llama.cpp {n}": weight_bytes(file) for n, file in files.items()},
        "unquantized_over_transformers": round(dense / speed["transformers float32"], 3),
        "over_unquantized": {n: round(s / dense, 3) for n, s in speed.items()},
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


def prefill_cost(model, peer, turns: int) -> dict:
    """Prefill with quantization over the plain one, by prompt length; llama.cpp's beside it."""
    out = {}
    recipes = {"unquantized": None, "ttq 4-bit": ttq.preset("ttq", bits=4)}
    for length in (128, 512, 2048):
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, model.config.vocab_size, (1, length))
        ours = {
            n: partial(read_prompt, model.params, jnp.asarray(tokens, jnp.int32),
                       config=model.config, recipe=recipe)
            for n, recipe in recipes.items()
        }  # fmt: skip
        t = take_turns(ours | {"llama.cpp F16": greedy(peer, tokens[0].tolist(), 1)}, turns)
        out[str(length)] = {
            "seconds": {n: round(s, 4) for n, s in t.items()},
            "ratio": round(t["ttq 4-bit"] / t["unquantized"], 3),
            "unquantized_over_llama_cpp": round(t["unquantized"] / t["llama.cpp F16"], 3),
        }
    return out


def run_cli(model: str, *options: str, checkout: Path = HERE) -> dict:
    """Wall clock, peak resident memory and times of one `ttq generate` in a fresh process."""
    command = [sys.executable, "-m", "ttq_jax", "generate", "--model", model, "--prompt", PROMPT,
               "--json", "--quiet", *options]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, cwd=checkout, env=os.environ | {"PYTHONPATH": "."}
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed with status {status}")
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "peak_resident_mb": round(usage.ru_maxrss / 1024),
        "timings": json.loads(output)["timings"],
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
        out[name] = {"first_token_cold": cold, "first_token_warm": warm}
    return out


def beside_older(checkout: Path, models: list[str], turns: int) -> dict:
    """The default recipe at the command line of an older version and of this one, in turns."""
    out = {}
    for model in models:
        found = {"before": [], "now": []}
        for turn in range(turns):
            log(f"  {model}: turn {turn + 1} of {turns}")
            for which, where in (("before", checkout), ("now", HERE)):
                found[which].append(run_cli(model, "--timings", checkout=where))
        out[model] = {
            which: {
                "tokens_per_second": statistics.median(
                    r["timings"]["tokens_per_second"] for r in runs
                ),
                "peak_resident_mb": statistics.median(r["peak_resident_mb"] for r in runs),
            }
            for which, runs in found.items()
        }
        rates = [out[model][which]["tokens_per_second"] for which in ("now", "before")]
        out[model]["faster"] = round(rates[0] / rates[1], 3)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--turns", type=int, default=3, help="repetitions (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma3-270m"],
                        help="packaged models (default: %(default)s)")  # fmt: skip
    parser.add_argument("--before", type=Path, metavar="CHECKOUT",
                        help="time the command line of this older checkout too")  # fmt: skip
    args = parser.parse_args()
    if args.out:
        check_destination(args.out)
    packages = ("jax", "jaxlib", "flax", "torch", "transformers", "llama-cpp-python")
    results = {
        "command": "python experiments/bench_cpu.py",
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in packages}
        | {"ttq_jax": ttq.__version__, "python": platform.python_version()},
        "models": {
            "smollm2": "SmolLM2-135M-Instruct (GGUF Q4_1), float32",
            "gemma3-270m": "Gemma-3-270M (GGUF Q4_K_M), float32",
        },
    }
    log("start-up")
    results["start_up"] = told(start_up(args.models))
    if args.before:
        log(f"beside {args.before}")
        results["beside_older"] = told(beside_older(args.before.resolve(), args.models, args.turns))
    results |= {"prefill": {}, "decode": {}}
    for name in args.models:
        model, gguf = ttq.load(name), ALIASES[name]()
        with tempfile.TemporaryDirectory() as folder:
            files = gguf_files(gguf, Path(folder))
            log(f"prefill: {name}")
            peer = open_gguf(files["F16"])
            results["prefill"][name] = told(prefill_cost(model, peer, args.turns))
            log(f"decode: {name}")
            widths = (2, 3, 4, 5, 8) if name == "smollm2" else (4,)
            results["decode"][name] = told(decode_speed(model, gguf, files, widths, args.turns))
    text = json.dumps(results, indent=1)
    print(text)
    if args.out:
        write_file(args.out, text + "\n")


if __name__ == "__main__":
    main()

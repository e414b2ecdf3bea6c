"""What the query projection of Qwen3 costs while decoding: dense, AWQ, TTQ with r = 0 and r = 16.

Claim     TTQ decodes exactly as AWQ does. Of what it adds, the per-prompt quantization is paid
          once per prompt, and the low rank's two thin products once per token.
Command   python experiments/query_projection.py --chip cpu
              --out experiments/results/query_projection_cpu.json
          python experiments/query_projection.py --chip v5e
              --out experiments/results/query_projection_v5e.json
          python experiments/query_projection.py --results
              experiments/results/query_projection_{v5e,v6e,cpu}.json
              --picture experiments/results/query_projection.svg
Cost      Estimates: minutes per chip, on any machine with libtpu. Measuring: 5 minutes on 2 CPU
          cores that do nothing else, or the ratios are noise.
Expect    Estimates, group 32, over dense bfloat16. v5e: AWQ and TTQ r = 0 from 1.3 times as fast
          (0.6B) to 4.85, 3.99 and 3.20 (32B at 2, 3 and 4 bits), r = 16 from 0.8 to 4.16, 3.73 and
          3.15. v6e: from 2.2 to 3.27, 2.80 and 3.20, r = 16 from 1.6 to 3.11, 2.68 and 3.15. The
          quantization, spread over 128 tokens, takes 4 % of that at most.
          Measured on a CPU, over float32: AWQ and TTQ r = 0 2.6 to 4.1 at 2 bits, 1.6 to 3.3 at 3,
          1.4 to 3.8 at 4; r = 16 within 6 % of that from 4B on but for one case; the quantization,
          spread over 128 tokens, takes 5 to 24 %. Speed-ups do not follow the sizes: with 4096 or
          8192 output channels (4B, 8B, 32B) XLA walks down columns that are a power of two apart
          and share few sets of the cache (4096 x 4224: 0.4 of the time of 4096 x 4096).

This repeats the paper's tables of the query projection's runtime (arXiv:2603.19296). Only a summary
of them is at hand: Qwen3 0.6B to 32B on A40, A100, L40, RTX3090 and RTX4090. The largest speed-up
over bfloat16 is 4.9 (Qwen3-32B, RTX4090), and TTQ with r = 0 is as fast as AWQ.

`--chip cpu`, `gpu` and `tpu` measure on this machine's device, in microseconds. The contenders take
turns. A cost is the median over the turns, a speed-up the median of the turns' own ratios. Other
names are TPUs that need not be there. Their costs are static cycles of the TPU compiler, and never
less than the time to move every stored byte once (`ttq_jax/chips/comparison.py`). Dense weights are
bfloat16, and float32 on a CPU. AWQ and TTQ with r = 0 run the same program, so the difference
between them in a measurement is noise.

"Quantization" is what the query projection adds to reading the prompt. Where one kernel multiplies
and quantizes in one read of the weight, it is that kernel's cost less the plain product's;
elsewhere it is the quantization alone. It leaves out D, which q, k and v share, and for r = 16 the
subtraction of the low rank.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from query_projection_picture import draw

import ttq_jax as ttq
from pallas_kernels import Choice, Target, choose, current_target
from ttq_jax.chips.absent import CHIPS, ChipError
from ttq_jax.chips.absent import chip as chip_named
from ttq_jax.chips.comparison import Case, cycles_of, dense_product, dense_shapes, kernel_cycles
from ttq_jax.chips.device_times import Contender, device_of, over_copies, over_stack, take_turns
from ttq_jax.evaluation.describe import device, table, versions
from ttq_jax.files import check_destination, write_file
from ttq_jax.linear import linear
from ttq_jax.quant.convert import quantize
from ttq_jax.quant.moments import observe
from ttq_jax.types import LowRank, leaf_bits

# Billions of parameters; hidden_size and num_attention_heads of each model's config.json, where
# head_dim is 128 throughout: the projection is hidden_size x heads * head_dim.
HEAD_DIM = 128
SIZES = {
    "0.6B": (0.6, 1024, 16), "1.7B": (1.7, 2048, 16), "4B": (4.0, 2560, 32),
    "8B": (8.2, 4096, 32), "14B": (14.8, 5120, 40), "32B": (32.8, 5120, 64),
}  # fmt: skip
PRESENT = ("cpu", "gpu", "tpu")
CHOICES = (*PRESENT, *(name for name, it in CHIPS.items() if it.bytes_per_cycle))
CONTENDERS = ("dense", "awq", "ttq r=0", "ttq r=16")

Shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Problem:
    """One projection, k input and n output channels, at one width of codes, for m rows.

    Where a kernel quantizes on the way of the prompt's product, the prompt has `prompt_tokens`.
    """

    k: int
    n: int
    m: int
    bits: int
    group_size: int
    dtype: str
    prompt_tokens: int

    @property
    def x(self) -> Shape:
        return Shape((self.m, self.k), jnp.dtype(self.dtype))

    def weight(self, contender: str) -> Any:
        """Shapes of what a contender stores, made by the library itself."""
        w = Shape((self.k, self.n), jnp.dtype(self.dtype))
        if contender == "dense":
            return w
        method, _, rank = contender.partition(" r=")
        rank = int(rank or 0)
        recipe = ttq.preset(method, bits=self.bits, group_size=self.group_size, rank=rank)
        factors = None
        if rank:
            down, up = Shape((self.k, rank), jnp.float32), Shape((rank, self.n), jnp.float32)
            factors = LowRank(down, up)

        def made(w: Any, x: Any, factors: Any) -> Any:
            moments = observe(x, jnp.ones(x.shape[:-1], bool), recipe.reads)
            return quantize(w, moments, recipe, factors)

        return jax.eval_shape(made, w, self.x, factors)

    def moved(self, contender: str) -> int:
        """Bytes of a call: every stored byte once, activations in and out."""
        leaves = jax.tree.leaves((self.x, self.weight(contender)))
        out = self.m * self.n * self.x.dtype.itemsize
        return sum(a.size * a.dtype.itemsize for a in leaves) + out

    def case(self, kernel: str, m: int) -> Case:
        """The same problem for a kernel by itself."""
        return Case(
            kernel=kernel, bits=self.bits, group_size=self.group_size, symmetric=False, m=m,
            k=self.k, n=self.n, dtype=self.dtype,
        )  # fmt: skip

    def choice(self, target: Target) -> Choice:
        """Who multiplies with the packed weight."""
        return choose(self.case("packed_matmul", self.m).problem, target)

    def quantizer(self, target: Target) -> Case:
        """What quantizes there: on the way of the prompt's product, or by itself."""
        on_the_way = self.case("prefill_quantize", self.prompt_tokens)
        if choose(on_the_way.problem, target).implementation == "xla":
            return self.case("quantize_pack", 0)
        return on_the_way


def from_stack(x: Any, stack: Any, layer: Any) -> Any:
    """A packed projection as the decode loop reads it."""
    return linear(x, stack.at(layer))


def contenders(problem: Problem, target: Target) -> dict[str, Contender]:
    """What takes turns on the device; "quantize" and "product" beside the four."""
    platform = target.platform

    def loops(calls: dict[str, Callable], of: str) -> dict[str, Contender]:
        return over_stack(
            calls, problem.x, problem.weight(of), size=problem.moved(of), platform=platform,
            work=2.0 * problem.m * problem.k * problem.n,
        )  # fmt: skip

    def products(x: Shape) -> Contender:
        size = problem.k * problem.n * x.dtype.itemsize
        return over_copies(
            linear, x, problem.weight("dense"), size=size, platform=platform,
            work=2.0 * x.shape[0] * problem.k * problem.n,
        )  # fmt: skip

    quantizer = problem.quantizer(target)
    x, weight = quantizer.operands()

    def quantized(x: Any, stack: Any, layer: Any) -> Any:
        return quantizer.run(x, (stack[0], stack[1][0]), layer=layer)

    made = {
        "dense": products(problem.x),
        **loops({"awq": from_stack, "ttq r=0": from_stack}, "ttq r=0"),
        **loops({"ttq r=16": from_stack}, "ttq r=16"),
        **over_stack(
            {"quantize": quantized}, x, weight, size=quantizer.floor_bytes(), platform=platform,
            work=2.0 * quantizer.m * problem.k * problem.n,
        ),
    }  # fmt: skip
    return made | ({"product": products(x[0])} if x else {})


def measured(problem: Problem, target: Target, turns: int) -> tuple[dict, list[str]]:
    """Microseconds of every turn by contender, and what to know of them."""
    seconds = take_turns(contenders(problem, target), turns)
    return {name: [1e6 * t for t in times] for name, times in seconds.items()}, []


def estimated(problem: Problem, chip: str, cycles: Callable[..., Any]) -> tuple[dict, list[str]]:
    """The same in cycles, of one turn; [] where the compiler gives none."""
    target = Target(platform="tpu", chip=chip)
    per_cycle = chip_named(chip).bytes_per_cycle
    kernel = "packed_matmul" if problem.choice(target).implementation == "tpu" else ""
    found: dict[str, tuple] = {}
    for name in CONTENDERS:
        named = "" if name == "dense" else kernel
        took = cycles(chip, linear, (problem.x, problem.weight(name)), kernel=named)
        found[name] = (*took, problem.moved(name))
    quantizer = problem.quantizer(target)
    found["quantize"] = (*kernel_cycles(quantizer, chip), quantizer.floor_bytes())
    if quantizer.m:
        plain = cycles(chip, dense_product, dense_shapes(quantizer))
        found["product"] = (*plain, quantizer.dense_bytes())
    costs = {
        name: [] if took is None else [max(took, moved / per_cycle)]
        for name, (took, _, _, moved) in found.items()
    }
    return costs, [f"{name}: {why}" for name, (_, _, why, _) in found.items() if why]


def median(values: np.ndarray) -> float | None:
    return round(float(np.median(values)), 3) if len(values) else None


def priced(costs: np.ndarray, dense: np.ndarray, with_them: np.ndarray) -> dict[str, Any]:
    """Costs, and the speed-up over dense of what they are in, turn by turn."""
    ratios = dense / with_them
    quartiles = np.percentile(ratios, [25, 75]) if len(ratios) else np.array([])
    return {
        "cost": median(costs), "speedup": median(ratios),
        "speedup_quartiles": quartiles.round(3).tolist(), "turns": costs.round(2).tolist(),
    }  # fmt: skip


def summary(costs: dict[str, list[float]], answer_tokens: int) -> dict[str, Any]:
    """A record's numbers, from the cost of every turn by contender.

    A turn is compared with itself: what slows the machine down for a moment slows both. A cost
    that there is not, [], leaves no number of what it enters.
    """
    turns = {name: np.array(each) for name, each in costs.items()}
    dense, quantize = turns["dense"], turns["quantize"] - turns.get("product", 0.0)
    per_token = quantize / answer_tokens
    once = priced(quantize, dense, turns["ttq r=0"] + per_token)
    return {
        "decode": {name: priced(turns[name], dense, turns[name]) for name in CONTENDERS},
        "quantization": once | {"per_token": median(per_token)},
    }


def record_of(
    size: str, problem: Problem, target: Target, run: Callable[..., Any], answer_tokens: int
) -> dict[str, Any]:
    """All that is known of one problem."""
    costs, notes = run(problem)
    found = summary(costs, answer_tokens)
    for name, one in found["decode"].items():
        one["stored_bits"] = round(leaf_bits(problem.weight(name)), 3)
    choice = problem.choice(target)
    found["quantization"]["by"] = problem.quantizer(target).kernel
    return {
        "model": f"Qwen3-{size}", "k": problem.k, "n": problem.n, "bits": problem.bits,
        "group_size": problem.group_size, "implementation": choice.implementation, **found,
        "notes": notes + ([choice.reason] if choice.fallback else []),
    }  # fmt: skip


def runner(args: argparse.Namespace) -> tuple[Target, Callable[..., Any]]:
    """What is computed for, and how a problem gets its costs; measures on the default device."""
    if args.chip in PRESENT:
        target = current_target()
        return target, partial(measured, target=target, turns=args.turns)
    chip_named(args.chip)
    # All widths are held against one dense product, AWQ and TTQ share a program.
    run = partial(estimated, chip=args.chip, cycles=functools.cache(cycles_of))
    return Target(platform="tpu", chip=args.chip), run


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result."""
    present = args.chip in PRESENT
    if not present:
        # Estimates are compiled in children, which must find no accelerator in use.
        jax.config.update("jax_platforms", "cpu")
    with jax.default_device(device_of(args.chip if present else "cpu")):
        target, run = runner(args)
        dtype = "float32" if target.platform == "cpu" else "bfloat16"
        records = []
        for size, bits, group in itertools.product(args.size, args.bits, args.group_size):
            print(f"Qwen3-{size}, {bits} bits, group {group}", file=sys.stderr, flush=True)
            _, k, heads = SIZES[size]
            problem = Problem(
                k=k, n=heads * HEAD_DIM, m=args.m, bits=bits, group_size=group, dtype=dtype,
                prompt_tokens=args.prompt_tokens,
            )  # fmt: skip
            records.append(record_of(size, problem, target, run, args.answer_tokens))
    return {
        "command": f"python experiments/query_projection.py --chip {args.chip}",
        "chip": args.chip, "unit": "microseconds" if present else "cycles", "dtype": dtype,
        "m": args.m, "answer_tokens": args.answer_tokens, "prompt_tokens": args.prompt_tokens,
        "turns": args.turns if present else 1, "machine": args.machine,
        "device": device() if present else f"none: estimates of the compiler of a {args.chip}",
        "versions": versions(*([] if present else ["libtpu"])), "records": records,
    }  # fmt: skip


def shown(value: float | None, form: str = ",.0f") -> str:
    return "-" if value is None else format(value, form)


def text_of(result: dict[str, Any]) -> str:
    """The result as a table; what follows a cost in brackets is the speed-up over dense."""
    packed, answer = CONTENDERS[1:], f"over {result['answer_tokens']} tokens"
    rows = [
        ["Qwen3", "K x N", "bits", "group", "dense", *packed, "quantization", answer, "with r=0"]
    ]
    notes: dict[str, None] = {}
    for r in result["records"]:
        decode, once = r["decode"], r["quantization"]
        rows.append([
            r["model"].partition("-")[2], f"{r['k']} x {r['n']}", str(r["bits"]),
            str(r["group_size"]), shown(decode["dense"]["cost"]),
            *(f"{shown(decode[c]['cost'])} ({shown(decode[c]['speedup'], '.2f')})" for c in packed),
            shown(once["cost"]), shown(once["per_token"]), f"({shown(once['speedup'], '.2f')})",
        ])  # fmt: skip
        notes |= dict.fromkeys(r["notes"])
    head = f"{result['chip']}, {result['dtype']}, rows: {result['m']}, {result['unit']} per call"
    return "\n".join([head, "", table(rows, left=2), *notes])


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    none, several = argparse.SUPPRESS, {"type": int, "nargs": "+"}
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--chip", choices=CHOICES, default=none, help="what is here, or the name of a TPU")
    add("--results", type=Path, nargs="+", default=none, help="show these files of --out instead")
    add = parser.add_argument
    add("--size", nargs="+", choices=SIZES, default=list(SIZES), help="of Qwen3")
    add("--bits", **several, choices=(2, 3, 4, 5, 8), default=[2, 3, 4], help="of a code")
    add("--group-size", **several, choices=(32, 64, 128), default=[32], help="rows per scale")
    add("--m", type=int, default=1, help="rows of activations")
    add("--answer-tokens", type=int, default=128, help="that a prompt's quantization serves")
    add("--prompt-tokens", type=int, default=512, help="read where a kernel quantizes on the way")
    add("--turns", type=int, default=9, help="measurements of each contender")
    add("--machine", default="", metavar="TEXT", help="what to know of it, kept in the result")
    add("--out", type=Path, default=none, help="write the result here as JSON")
    add("--picture", type=Path, default=none, help="draw it here")
    return parser


def main() -> None:
    parser = options()
    args = parser.parse_args()
    if "out" in args:
        check_destination(args.out)
    for name in ("m", "answer_tokens", "prompt_tokens", "turns"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more, got {value}")
    if "results" in args:
        results = [json.loads(path.read_text()) for path in args.results]
    else:
        try:
            results = [experiment(args)]
        except ChipError as e:
            raise SystemExit(str(e)) from e
    print("\n\n".join(map(text_of, results)))
    if "out" in args:
        write_file(args.out, json.dumps(results[0], indent=1) + "\n")
    if "picture" in args:
        draw(results, {f"Qwen3-{n}": b for n, (b, _, _) in SIZES.items()}, args.picture)


if __name__ == "__main__":
    main()

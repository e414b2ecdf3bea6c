"""Side by side with PyTorch: the same perplexities, and how fast other quantizers decode.

Claim     RTN, AWQ and TTQ written anew in PyTorch (`torch_quantizers.py`, nothing of ttq_jax) have
          ttq_jax's perplexity to 0.5 %; on a CPU ttq_jax decodes faster than transformers, torchao,
          HQQ and qwix do, in the same process and in turns.
Command   python experiments/compare_torch.py quality --corpus wikitext2=FILE
              --calibration c4=FILE --out experiments/results/compare_torch_quality.json
          pip install torchao hqq qwix
          python experiments/compare_torch.py speed --corpus wikitext2=FILE
              --out experiments/results/compare_torch_speed.json
Cost      SmolLM2-135M on 2 idle cores, 4 windows: quality about 30 minutes, speed about 10; 4 GB.
          Needs the test extra. torchao, HQQ and qwix are tried where they are installed; with
          torchao in the environment transformers imports it, and the test suite, to which a
          warning is an error, fails: install them into an environment of their own.
Expect    quality: a table and exit status 0, or 1 and the rows that differ by more than 0.5 %.
          speed: tokens per second, bits and perplexity of each contender, and what did not run.

SmolLM2's package holds Q4_1, so `rtn` at 4 bits in groups of 32 gives its very weights back: a
check of the arithmetic, not of a loss. The same holds of any peer on that grid, hence the groups of
64 in `speed`.

quality: both sides store scales and factors in float32, so that a difference is not one of storage;
the prompt is read by the unquantized weights. PyTorch's weights are fake-quantized: its seconds are
those of the evaluation (read, quantize, score) and say nothing of decoding. What differs is ties:
of TTQ's weights at 2 bits on the first window of WikiText-2, 9 in 106 million sit one step apart,
0.03 % of perplexity; with ttq_jax's matrices in transformers' model the two agree to 1e-6.

speed: the PyTorch contenders run eagerly, as `generate` runs a model on a CPU. qwix has no decoder
of its own: its arrays are multiplied by its own product inside ttq_jax's.
"""

import argparse
import copy
import dataclasses
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_cpu import NEW_TOKENS, log, take_turns, torch_generate, torch_model
from quality import CALIBRATION_TOKENS, corpus_text, offline_of, protocol_data, recipe_named

import ttq_jax as ttq
from ttq_jax.calibrate import prepare
from ttq_jax.checkpoint import ALIASES
from ttq_jax.corpora import calibration_windows, sha256
from ttq_jax.generate import generate_tokens
from ttq_jax.linear import add_bias, dense_weight
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits, unstack
from ttq_jax.perplexity import Protocol, score_window
from ttq_jax.prefill import decoded_shapes, prefill
from ttq_jax.prompts import pad_prompts
from ttq_jax.quant.grid import Grid
from ttq_jax.quant.lowrank import LowRankRule
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.scaling import NoScale, PowerLaw, SearchedAlpha
from ttq_jax.report import device, table, versions
from ttq_jax.sampling import Sampling
from ttq_jax.types import Offline, Prompts, effective_bits, kernels

LIMIT = 0.005
# Share of the weights that may sit a step apart because a tie was broken the other way.
TIES = 1e-6
# Ours by the last part of transformers' names.
NAMES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "fc1": "up", "fc2": "down",
}  # fmt: skip
# Everybody's at 2 to 4 bits in `speed`: on the grid that SmolLM2's file has, nobody loses anything.
GROUP = 64
PEERS = ("torchao", "hqq", "qwix")
# Of each kind of scale, what both sides understand by it.
SCALES = {
    "none": ("none", NoScale()),
    "power_law": ("prompt", PowerLaw()),
    "searched": ("corpus", SearchedAlpha()),
}


def torch_side(model: str) -> Any:
    """What `ttq.load` takes by this name, float32, as transformers reads it."""
    import torch
    import transformers

    path = ALIASES[model]() if model in ALIASES else Path(model).expanduser()
    if path.suffix == ".gguf":
        return torch_model(path)
    source = path if path.exists() else model
    return transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What every number of a run depends on."""
    import torch

    installed = [name for name in PEERS if importlib.util.find_spec(name)]
    return {
        "command": f"python experiments/compare_torch.py {args.command}", "model": args.model,
        "device": device(), "torch_threads": torch.get_num_threads(), "dtype": "float32",
        "load_average": round(os.getloadavg()[0], 1),
        "versions": versions("torch", "transformers", *installed),
    }  # fmt: skip


def write(path: Path | None, data: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(data, indent=1) + "\n")


# quality


def rule_of(name: str, recipe: Recipe) -> "Rule":
    """The recipe in PyTorch's terms; whatever those do not have is refused."""
    from torch_quantizers import Rule

    grid, rank = recipe.grid, recipe.low_rank.rank
    shape = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
    for kind, (moments, scale) in SCALES.items():
        known = Recipe(
            moments=moments, scale=scale, low_rank=LowRankRule(rank=rank),
            grid=Grid(store_dtype="float32", **shape),
        )  # fmt: skip
        if recipe == known:
            return Rule(scale=kind, rank=rank, **shape)
    raise SystemExit(
        f"method {name!r}: the PyTorch side knows rtn, awq@CALIBRATION and ttq, each with -gGROUP, "
        "-rRANK, -sym; the prompt read by unquantized weights, rounding to nearest, no prior"
    )


def recipes_of(methods: list[str], bits: list[int]) -> dict[str, Recipe | None]:
    """The unquantized model, and every method at every width with float32 scales and factors."""
    made: dict[str, Recipe | None] = {"none": None}
    for method in methods:
        base, at, corpus = method.partition("@")
        for width in bits:
            name = f"{base}-{width}{at}{corpus}"
            recipe = recipe_named(name)
            if recipe is None:
                raise SystemExit("method 'none' is always measured; leave it out")
            grid = dataclasses.replace(recipe.grid, store_dtype="float32")
            made[name] = dataclasses.replace(recipe, grid=grid)
            rule_of(name, made[name])  # refuses before anything is loaded
    return made


def calibrated_on(name: str, recipe: Recipe | None, calibration: dict[str, str]) -> str | None:
    """The calibration text that a method looks at, by its name; None if it looks at none."""
    if recipe is None or not recipe.source.reads_corpus:
        return None
    corpus = name.partition("@")[2]
    if corpus not in calibration:
        raise SystemExit(f"method {name}: expected awq@NAME with NAME of a --calibration NAME=FILE")
    return corpus


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    value = jax.block_until_ready(run())
    return value, time.perf_counter() - start


class Sides:
    """One model on both sides, quantized alike."""

    def __init__(self, name: str, calibration: dict[str, str]):
        from torch_quantizers import FakeQuantized

        self.model, self.pair = ttq.load(name), FakeQuantized(torch_side(name))
        self.calibration = calibration
        self.recipe: Recipe | None = None
        self.offline = Offline()

    def prepare(self, name: str, recipe: Recipe | None) -> dict[str, float]:
        """What comes before any window; the seconds that it took."""
        corpus, tokens = calibrated_on(name, recipe, self.calibration), None
        if corpus:
            text = self.calibration[corpus]  # the windows that `offline_of` reads
            tokens = as_torch(calibration_windows(
                self.model.tokenizer, text, tokens=CALIBRATION_TOKENS, window=512
            ))  # fmt: skip
        self.recipe, rule = recipe, recipe and rule_of(name, recipe)
        self.offline, ours = timed(partial(offline_of, self.model, name, recipe, self.calibration))
        _, theirs = timed(lambda: rule and self.pair.prepare(rule, tokens))
        return {"ours": round(ours, 2), "theirs": round(theirs, 2)}

    def ours(self, protocol: Protocol, window: np.ndarray) -> float:
        """Negative log-likelihood of a window's scored tokens."""
        return float(score_window(
            self.model.params, jnp.asarray(window), self.offline, config=self.model.config,
            recipe=self.recipe, protocol=protocol,
        ))  # fmt: skip

    def theirs(self, protocol: Protocol, window: np.ndarray) -> float:
        """The same in PyTorch."""
        run = self.pair.score if self.recipe else self.pair.score_dense
        return run(as_torch(window), prompt_of(protocol))

    def explain(self, protocol: Protocol, windows: np.ndarray) -> dict[str, Any]:
        """How many weights differ, and how much the perplexities do when none does.

        PyTorch's weights are replaced by ours, window after window.
        """
        import torch
        from torch_quantizers import linears, score

        apart, ours, theirs, keys = 0, 0.0, 0.0, linears(self.pair.copy)
        for window in windows:
            ours += self.ours(protocol, window)
            self.theirs(protocol, window)  # makes their weights
            tokens = jnp.asarray(window)[None, : prompt_of(protocol)]
            found = our_weights(self.model.params, tokens, self.offline,
                                config=self.model.config, recipe=self.recipe)  # fmt: skip
            arrays = {name: np.asarray(w) for name, w in found.items()}
            apart += self.pair.replace({
                (layer, name): torch.from_numpy(arrays[NAMES[name.split(".")[-1]]][layer].T.copy())
                for layer, name in keys
            })  # fmt: skip
            theirs += score(
                self.pair.dense, as_torch(window), prompt_of(protocol), lambda _: self.pair.copy
            )
        return {
            "weights_apart": apart,
            "weights": len(windows) * sum(module.weight.numel() for module in keys.values()),
            "difference_with_equal_weights": float(
                np.expm1((ours - theirs) / len(windows) / protocol.scored)
            ),
        }


@partial(jax.jit, static_argnames=("config", "recipe"))
def our_weights(params, tokens, offline, *, config, recipe):
    """The matrices [L, d_in, d_out] that the packed weights stand for, by projection."""
    cache = empty_cache(config, *tokens.shape, jnp.float32)
    prompts = Prompts(tokens, jnp.ones(tokens.shape, bool))
    _, _, packed, _ = prefill(params, prompts, cache, config=config, recipe=recipe, offline=offline)
    return {name: dense_weight(kernel) for name, kernel in kernels(packed["layers"]).items()}


def as_torch(tokens: np.ndarray) -> "torch.Tensor":
    import torch

    return torch.from_numpy(tokens.astype(np.int64))


def prompt_of(protocol: Protocol) -> int | None:
    return protocol.prompt_tokens if protocol.kind == "causal" else None


def compare(sides: Sides, protocol: Protocol, windows: np.ndarray) -> dict[str, Any]:
    """Scores window after window, both sides in turns."""
    sides.ours(protocol, windows[0])  # compiles
    nll: dict[str, list[float]] = {"ours": [], "theirs": []}
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for window in windows:
        for side in nll:
            value, took = timed(partial(getattr(sides, side), protocol, window))
            nll[side].append(value)
            seconds[side].append(took)
    mean = {side: sum(each) / len(each) / protocol.scored for side, each in nll.items()}
    return {
        "perplexity": {side: round(float(np.exp(m)), 4) for side, m in mean.items()},
        "difference": float(np.exp(mean["ours"] - mean["theirs"]) - 1),
        "seconds_per_window": {s: round(statistics.median(t), 3) for s, t in seconds.items()},
        "nll": nll,
    }


def quality(args: argparse.Namespace) -> int:
    """Perplexities of both sides; status 1 if any two differ by more than `LIMIT`, but for ties."""
    recipes = recipes_of(args.method, args.bits)
    texts = dict(map(corpus_text, args.corpus))
    calibration = dict(map(corpus_text, args.calibration))
    read = {n: calibrated_on(n, recipe, calibration) for n, recipe in recipes.items()}
    sides = Sides(args.model, calibration)
    windows = {
        n: ttq.cut_windows(sides.model.tokenizer, t, args.window, max_windows=args.windows)
        for n, t in texts.items()
    }
    found = settings(args) | {"limit": LIMIT, "rows": []}
    for name, recipe in recipes.items():
        preparing = sides.prepare(name, recipe)
        for kind, corpus in itertools.product(args.protocol, texts):
            protocol = Protocol(kind=kind, window=args.window, prompt_tokens=args.prompt_tokens)
            row = {
                "recipe_name": name, "recipe": recipe and recipe.describe(), "corpus": corpus,
                "corpus_sha256": sha256(texts[corpus]),
                "calibration_sha256": sha256(calibration[read[name]]) if read[name] else None,
                "protocol": protocol_data(protocol), "windows": len(windows[corpus]),
                "scored": protocol.scored, "preparing_seconds": preparing,
            }  # fmt: skip
            row |= compare(sides, protocol, windows[corpus])
            if recipe is not None and not abs(row["difference"]) <= LIMIT:
                row["explanation"] = sides.explain(protocol, windows[corpus])
                sides.prepare(name, recipe)  # their weights, where no prompt makes them
            log(f"{name} {kind} {corpus}: {row['perplexity']}, {row['difference']:+.3%}")
            found["rows"].append(row)
            write(args.out, found)
        jax.clear_caches()
    return verdict(found["rows"])


def verdict(rows: list[dict[str, Any]]) -> int:
    """Prints the table, and of what differs too much the reason; the exit status."""
    cells = [["method", "protocol", "corpus", "ours", "theirs", "difference", "s", "s theirs"]]
    for row in rows:
        ppl, seconds = row["perplexity"], row["seconds_per_window"]
        cells.append([
            row["recipe_name"], row["protocol"]["kind"], row["corpus"],
            f"{ppl['ours']:.3f}", f"{ppl['theirs']:.3f}", f"{row['difference']:+.3%}",
            f"{seconds['ours']:.2f}", f"{seconds['theirs']:.2f}",
        ])  # fmt: skip
    print(table(cells, left=3))
    status = 0
    for row in rows:
        # A difference that is not a number is too large.
        if abs(row["difference"]) <= LIMIT:
            continue
        what = f"{row['recipe_name']} {row['protocol']['kind']} {row['corpus']}"
        line, why = f"{what} differs by {row['difference']:+.2%}", row.get("explanation")
        if why:
            line += (
                f": {why['weights_apart']} of {why['weights']} weights are apart; with equal ones "
                f"{why['difference_with_equal_weights']:+.3%}"
            )
        if explained(row):
            print(f"{line}: ties")
        else:
            status = 1
            log(f"{line}; expected at most {LIMIT:.1%}: one of the two sides is wrong")
    if not status:
        print(f"all {len(rows)} perplexities within {LIMIT:.1%} of PyTorch's, but for ties")
    return status


def explained(row: dict[str, Any]) -> bool:
    """Whether a handful of ties is all that lies between the two sides."""
    why = row.get("explanation")
    return (
        why is not None
        and why["weights_apart"] <= TIES * why["weights"]
        and abs(why["difference_with_equal_weights"]) <= LIMIT
    )


# speed


@dataclasses.dataclass(frozen=True)
class Contender:
    """One who decodes.

    about: what it is: library, grid, activations.
    run: from a number of new tokens to what generates them.
    nll: of a window's scored tokens, by its weights after a prompt read unquantized.
    bits: stored per weight of the blocks' linear layers, everything counted.
    """

    about: str
    run: Callable[[int], Callable[[], Any]]
    nll: Callable[[np.ndarray], float]
    bits: float


@dataclasses.dataclass(frozen=True)
class Race:
    """What all contenders share.

    dense: the unquantized model of transformers.
    prompt: token ids to continue.
    protocol: causal.
    """

    model: ttq.Model
    dense: Any
    prompt: list[int]
    protocol: Protocol


def ours(race: Race, method: str) -> Contender:
    """ttq_jax as it comes: bfloat16 scales."""
    model, recipe = race.model, recipe_named(method)
    offline = prepare(model, recipe)
    prompts = pad_prompts([race.prompt], max_positions=model.config.max_positions)

    def run(limit: int) -> Callable[[], Any]:
        return partial(
            generate_tokens, model.params, prompts, offline, jax.random.key(0),
            jnp.asarray(limit, jnp.int32), config=model.config, recipe=recipe, sampling=Sampling(),
            capacity=NEW_TOKENS, eos_ids=(),
        )  # fmt: skip

    def nll(window: np.ndarray) -> float:
        return float(score_window(
            model.params, jnp.asarray(window), offline, config=model.config, recipe=recipe,
            protocol=race.protocol,
        ))  # fmt: skip

    bits = effective_bits(decoded_shapes(model.params, model.config, recipe, offline))
    return Contender("weights from the prompt" if recipe else "as loaded", run, nll, bits)


def in_torch(race: Race, model: Any, about: str) -> Contender:
    """A transformers model, however its layers are made; greedy `generate`, eager."""
    from torch_quantizers import score

    def nll(window: np.ndarray) -> float:
        return score(race.dense, as_torch(window), race.protocol.prompt_tokens, lambda _: model)

    return Contender(about, partial(torch_generate, model, [race.prompt]), nll, torch_bits(model))


def stored_bytes(tensor: Any) -> int:
    """Bytes of a tensor, or of the tensors that one of torchao's consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def torch_bits(model: Any) -> float:
    """Bits per weight of the blocks' linear layers, as they are in memory."""
    stored = weights = 0
    for module in model.get_decoder().layers.modules():
        if hasattr(module, "W_q"):  # HQQ's
            stored += sum(
                map(stored_bytes, (module.W_q, module.meta["scale"], module.meta["zero"]))
            )
            weights += module.meta["shape"].numel()
        elif hasattr(module, "in_features"):
            stored += stored_bytes(module.weight)
            weights += module.in_features * module.out_features
    return 8 * stored / weights


def by_torchao(race: Race, bits: int) -> Contender:
    """Weight-only, activations float32: int8 with a scale per row, int4 in groups."""
    import torch
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def in_blocks(module: Any, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and ".layers." in name

    model = copy.deepcopy(race.dense)
    config = (
        Int8WeightOnlyConfig() if bits == 8 else PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    )
    quantize_(model, config, filter_fn=in_blocks)
    return in_torch(race, model, f"{type(config).__name__}, eager")


def by_hqq(race: Race, bits: int) -> Contender:
    """float32 on the CPU, by its PyTorch backend."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = copy.deepcopy(race.dense)
    AutoHQQHFModel.quantize_model(
        model, quant_config=BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1),
        compute_dtype=torch.float32, device="cpu",
    )  # fmt: skip
    return in_torch(race, model, "PyTorch backend, eager")


def by_qwix(race: Race, bits: int) -> Contender:
    """qwix's arrays and its product in ttq_jax's decoder: int8 per column, int4 in groups."""
    import qwix

    model = race.model
    how = {"qtype": jnp.int8, "channelwise_axes": (1,)}
    if bits == 4:
        how = {"qtype": jnp.int4, "channelwise_axes": (1,), "tiled_axes": {0: GROUP}}

    def project(site: str, x: jax.Array, weights: dict) -> tuple[dict[str, jax.Array], None]:
        del site
        ys = {}
        for name, w in weights.items():
            y = qwix.dot(x, w["kernel"], preferred_element_type=jnp.float32)
            ys[name] = add_bias(y, w.get("bias"))
        return ys, None

    tree = unstack(model.params)
    stored = weights = 0
    for layer in tree["layers"]:
        for name, leaf in layer.items():
            if "kernel" in leaf:
                made = qwix.quantize(leaf["kernel"], **how)
                layer[name] = {**leaf, "kernel": made}
                stored += sum(a.on_device_size_in_bytes() for a in jax.tree.leaves(made))
                weights += leaf["kernel"].size
    greedy = partial(decode_greedily, config=model.config, project=project, capacity=NEW_TOKENS)
    tokens = jnp.asarray([race.prompt], jnp.int32)

    def nll(window: np.ndarray) -> float:
        return float(score_projected(
            model.params, tree, jnp.asarray(window), config=model.config, project=project,
            prompt_tokens=race.protocol.prompt_tokens,
        ))  # fmt: skip

    return Contender(
"qwix.dot in ttq_jax's decoder",
        lambda limit: partial(greedy, model.params, tree, tokens, limit), nll, 8 * stored / weights,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("config", "project", "capacity"))
def decode_greedily(params, tree, tokens, limit, *, config, project, capacity):
    """`limit` tokens after a prompt that params read, by a tree that `project` multiplies."""
    valid = jnp.ones(tokens.shape, bool)
    cache = empty_cache(config, 1, tokens.shape[1] + capacity, jnp.float32)
    hidden, cache, _ = forward(config, params, tokens, valid, cache, slots=tokens.shape[1])

    def choose(hidden):
        return jnp.argmax(logits(config, params, hidden[:, -1]), axis=-1).astype(jnp.int32)

    def step(i, state):
        out, token, cache = state
        hidden, cache, _ = forward(
            config, tree, token[:, None], jnp.ones((1, 1), bool), cache, project=project
        )
        token = choose(hidden)
        return out.at[i].set(token[0]), token, cache

    first = choose(hidden)
    out = jnp.zeros(capacity, jnp.int32).at[0].set(first[0])
    return jax.lax.fori_loop(1, limit, step, (out, first, cache))[0]


@partial(jax.jit, static_argnames=("config", "project", "prompt_tokens"))
def score_projected(params, tree, window, *, config, project, prompt_tokens):
    """The causal protocol for a tree that `project` multiplies."""
    cache = empty_cache(config, 1, len(window), jnp.float32)
    prompt, rest = window[None, :prompt_tokens], window[None, prompt_tokens:-1]
    hidden, cache, _ = forward(config, params, prompt, jnp.ones(prompt.shape, bool), cache)
    hidden = hidden[0, -1:]
    if rest.size:
        after, _, _ = forward(
            config, tree, rest, jnp.ones(rest.shape, bool), cache, project=project
        )
        hidden = jnp.concatenate([hidden, after[0]])
    found = jax.nn.log_softmax(logits(config, params, hidden))
    return -jnp.take_along_axis(found, window[prompt_tokens:, None], axis=1).sum()


UNQUANTIZED, TRANSFORMERS = "ttq_jax unquantized", "transformers float32"
CONTENDERS: dict[str, Callable[[Race], Contender]] = {
    UNQUANTIZED: partial(ours, method="none"),
    "ttq_jax ttq 2-bit": partial(ours, method=f"ttq-2-g{GROUP}"),
    "ttq_jax ttq 3-bit": partial(ours, method=f"ttq-3-g{GROUP}"),
    "ttq_jax ttq 4-bit": partial(ours, method=f"ttq-4-g{GROUP}"),
    "ttq_jax fast": partial(ours, method="fast"),
    TRANSFORMERS: lambda race: in_torch(race, race.dense, "generate, greedy, eager"),
    "torchao int8": partial(by_torchao, bits=8),
    "torchao int4": partial(by_torchao, bits=4),
    "hqq 4-bit": partial(by_hqq, bits=4),
    "hqq 3-bit": partial(by_hqq, bits=3),
    "qwix int8": partial(by_qwix, bits=8),
    "qwix int4": partial(by_qwix, bits=4),
}


def line_up(race: Race) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that run here, and why the others do not."""
    ready, left_out = {}, {}
    for name, make in CONTENDERS.items():
        package = name.split()[0]
        if package in PEERS and importlib.util.find_spec(package) is None:
            left_out[name] = f"not installed: pip install {package}"
            continue
        log(f"  {name}")
        try:
            one = make(race)
            jax.block_until_ready(one.run(2)())
        except Exception as error:
            if package not in PEERS:
                raise
            why = " ".join(str(error).split())[:300]
            left_out[name] = f"does not run here: {type(error).__name__}: {why}"
            continue
        ready[name] = one
    return ready, left_out


def speed(args: argparse.Namespace) -> int:
    """Tokens per second of each contender, with its bits and its perplexity on the same text."""
    if os.getloadavg()[0] > 1:
        log(f"load average {os.getloadavg()[0]:.1f}: whatever else runs slows some libraries more "
            "than others; these ratios will mean little")  # fmt: skip
    (corpus, text), *_ = map(corpus_text, args.corpus)
    model, dense = ttq.load(args.model), torch_side(args.model)
    protocol = Protocol(window=args.window, prompt_tokens=args.prompt_tokens)
    windows = ttq.cut_windows(model.tokenizer, text, protocol.window, max_windows=args.windows)
    race = Race(model, dense, windows[0, : args.prompt_tokens].tolist(), protocol)
    found = settings(args)
    log("line-up")
    ready, left_out = line_up(race)
    log("decode")
    seconds = take_turns(
        {(n, limit): one.run(limit) for n, one in ready.items() for limit in (1, NEW_TOKENS)},
        args.turns,
    )
    rates = {n: (NEW_TOKENS - 1) / (seconds[n, NEW_TOKENS] - seconds[n, 1]) for n in ready}
    rows = []
    for name, one in ready.items():
        log(f"  perplexity: {name}")
        nll = sum(map(one.nll, windows)) / len(windows) / protocol.scored
        rows.append({
            "contender": name, "about": one.about, "bits": round(one.bits, 3),
            "perplexity": round(float(np.exp(nll)), 3),
            "tokens_per_second": round(rates[name], 2),
            "over_transformers": round(rates[name] / rates[TRANSFORMERS], 3),
            "over_unquantized": round(rates[name] / rates[UNQUANTIZED], 3),
        })  # fmt: skip
    found |= {
        "corpus": corpus, "corpus_sha256": sha256(text), "protocol": protocol_data(protocol),
        "windows": len(windows), "prompt_tokens": len(race.prompt), "new_tokens": NEW_TOKENS,
        "batch": 1, "group_size": GROUP, "turns": args.turns, "rows": rows, "left_out": left_out,
        "load_average_after": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    write(args.out, found)
    print(table([
        ["contender", "bits", "perplexity", "tokens/s", "over transformers", "over unquantized"],
        *([r["contender"], f"{r['bits']:.2f}", f"{r['perplexity']:.2f}",
           f"{r['tokens_per_second']:.1f}", f"{r['over_transformers']:.2f}",
           f"{r['over_unquantized']:.2f}"] for r in rows),
    ]))  # fmt: skip
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    for name, run, about in (
        ("quality", quality, "perplexities of both sides"),
        ("speed", speed, "tokens per second of everybody"),
    ):
        one = commands.add_parser(name, help=about)
        one.add_argument("--model", default="smollm2",
                         help="alias, .gguf file, Hugging Face directory or hub id "
                              "(default: %(default)s)")  # fmt: skip
        one.add_argument("--corpus", action="append", required=True, metavar="NAME=FILE")
        one.add_argument("--windows", type=int, default=4, help="per corpus, default: %(default)s")
        one.add_argument("--window", type=int, default=512)
        one.add_argument("--prompt-tokens", type=int, default=256)
        one.add_argument("--out", type=Path, help="write the results here as JSON")
        one.set_defaults(run=run)
    one = commands.choices["quality"]
    one.add_argument("--calibration", action="append", default=[], metavar="NAME=FILE",
                     help="what awq@NAME looks at")  # fmt: skip
    one.add_argument("--method", nargs="+", default=["rtn", "ttq", "ttq-r16"],
                     help="rtn, awq@CALIBRATION, ttq, with -gGROUP, -rRANK, -sym "
                          "(default: %(default)s)")  # fmt: skip
    one.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    one.add_argument("--protocol", nargs="+", default=["causal", "window"],
                     choices=["causal", "window"])  # fmt: skip
    commands.choices["speed"].add_argument("--turns", type=int, default=5,
                                           help="default: %(default)s")  # fmt: skip
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())

"""Decoding beside PyTorch and other quantizers: one model, one text, in turns in one process.

Claim     On a CPU, decoding from weights made of the prompt at 2 to 4 bits is 3.2 to 3.9 times as
          fast as transformers' float32 `generate`, 1.5 to 1.8 times as fast as our own float32, and
          faster than what else installs here.
Command   pip install torchao hqq qwix
          python experiments/compare_torch_speed.py --corpus wikitext2=FILE
              --out experiments/results/compare_torch_speed.json
Cost      SmolLM2-135M on 2 idle cores: about 15 minutes, 6 GB. Needs the test extra. torchao, HQQ
          and qwix are tried where they are installed; with torchao in the environment transformers
          imports it, and the test suite, to which a warning is an error, fails: install them into
          an environment of their own.
Expect    over transformers: ttq 3.88, 3.19, 3.50 at 2, 3, 4 bits, fast 3.71, unquantized 2.15;
          torchao int8 1.34, int4 0.44; HQQ 0.26 and 0.24 at 4 and 3 bits; qwix 2.03 and 1.99.

The PyTorch contenders run eagerly, as `generate` runs a model on a CPU. qwix has no decoder of its
own, so its product multiplies its arrays inside ttq_jax's decoder. At 2 to 4 bits all contenders
have groups of 64: on the grid of SmolLM2's own file none of them would lose anything.
"""

import argparse
import copy
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_cpu import NEW_TOKENS, log, take_turns, torch_generate
from compare_torch import as_torch, options, settings, torch_side, write
from quality import corpus_text, protocol_data
from recipe_names import recipe_named

import ttq_jax as ttq
from ttq_jax.evaluation.corpora import sha256
from ttq_jax.evaluation.describe import table
from ttq_jax.evaluation.perplexity import Protocol, window_nll
from ttq_jax.files import check_destination
from ttq_jax.generate import generate_tokens
from ttq_jax.linear import add_bias
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits, unstack
from ttq_jax.offline.calibrate import prepare
from ttq_jax.prefill import decoded_shapes
from ttq_jax.prompts import pad_prompts
from ttq_jax.quant.head import joined
from ttq_jax.sampling import Sampling
from ttq_jax.types import effective_bits

GROUP = 64
PEERS = ("torchao", "hqq", "qwix")


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
    params, besides = joined(model.params, recipe, offline)
    prompts = pad_prompts([race.prompt], max_positions=model.config.max_positions)

    def run(limit: int) -> Callable[[], Any]:
        return partial(
            generate_tokens, params, prompts, besides, jax.random.key(0),
            jnp.asarray(limit, jnp.int32), config=model.config, recipe=recipe, sampling=Sampling(),
            capacity=NEW_TOKENS, eos_ids=(),
        )  # fmt: skip

    def nll(window: np.ndarray) -> float:
        return window_nll(model, window, recipe=recipe, offline=offline, protocol=race.protocol)

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
    if args.out:
        check_destination(args.out)
    if os.getloadavg()[0] > 1:
        log(f"load average {os.getloadavg()[0]:.1f}: whatever else runs slows some libraries more "
            "than others; these ratios will mean little")  # fmt: skip
    (corpus, text), *_ = map(corpus_text, args.corpus)
    model, dense = ttq.load(args.model), torch_side(args.model)
    protocol = Protocol(window=args.window, prompt_tokens=args.prompt_tokens)
    windows = ttq.cut_windows(model.tokenizer, text, protocol.window, max_windows=args.windows)
    race = Race(model, dense, windows[0, : args.prompt_tokens].tolist(), protocol)
    found = settings(args.model, *filter(importlib.util.find_spec, PEERS))
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
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5, help="default: %(default)s")
    return speed(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())

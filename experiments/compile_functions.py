"""How long an unrolled model of a user's own takes to compile, dense and over packed weights.

Claim     a decoder of 30 unrolled layers, reading and a step of decoding, compiles packed in
          three times the time that it takes dense.
Command   python experiments/compile_functions.py --out experiments/results/compile_functions.json
Cost      some minutes on 2 cores, 1 GB of memory; no weights, no accelerator.
Expect    see experiments/results/compile_functions.json. The ratio is what counts. Seconds are
          those of all processors together, which a busy machine changes less than the clock's.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

import ttq_jax as ttq
from ttq_jax.evaluation.describe import versions
from ttq_jax.files import check_destination, write_file

WIDTH, FEED_FORWARD, HEADS = 256, 768, 4


class Layer(nn.Module):
    """A decoder's layer with a cache that is handed through."""

    @nn.compact
    def __call__(self, x, cache, at):
        dense = lambda n, name: nn.Dense(n, use_bias=False, name=name)  # noqa: E731
        h = nn.RMSNorm(name="attention_norm")(x)
        heads = (*x.shape[:2], HEADS, -1)
        q, k, v = (dense(WIDTH, name)(h).reshape(heads) for name in "qkv")
        zero = jnp.int32(0)
        cache = jax.lax.dynamic_update_slice(cache, jnp.stack([k, v]), (zero, zero, at, zero, zero))
        scores = jnp.einsum("btnh,bsnh->bnts", q, cache[0]) * (WIDTH // HEADS) ** -0.5
        seen = jnp.arange(cache.shape[2]) <= at + jnp.arange(x.shape[1])[:, None]
        scores = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
        mixed = jnp.einsum("bnts,bsnh->btnh", scores, cache[1]).reshape(x.shape)
        x = x + dense(WIDTH, "o")(mixed)
        h = nn.RMSNorm(name="mlp_norm")(x)
        up = nn.silu(dense(FEED_FORWARD, "gate")(h)) * dense(FEED_FORWARD, "up")(h)
        return x + dense(WIDTH, "down")(up), cache


class Model(nn.Module):
    """Unrolled layers."""

    n_layers: int

    @nn.compact
    def __call__(self, tokens, caches, at):
        x = nn.Embed(1000, WIDTH, name="embed")(tokens)
        new = []
        for i, cache in enumerate(caches):
            x, cache = Layer(name=f"layer_{i}")(x, cache, at)
            new.append(cache)
        return nn.Dense(1000, name="head")(nn.RMSNorm(name="norm")(x)[:, -1]), new


def seconds(fn, *args) -> dict:
    """Seconds to trace and to compile a function from nothing."""
    jax.clear_caches()
    start = time.process_time()
    lowered = jax.jit(fn).lower(*args)
    traced = time.process_time()
    lowered.compile()
    return {"trace": traced - start, "compile": time.process_time() - traced}


def figures(n_layers: int, repeats: int, recipe: ttq.Recipe) -> dict:
    """Medians of both sides, in turns, for reading a prompt and for a step of decoding."""
    model = Model(n_layers)
    shape = jax.ShapeDtypeStruct
    caches = [shape((2, 1, 96, HEADS, WIDTH // HEADS), jnp.float32)] * n_layers
    at, prompt, token = shape((), jnp.int32), shape((1, 64), jnp.int32), shape((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), prompt, caches, at)
    read, step = ttq.read(model.apply, recipe), ttq.run(model.apply)
    packed = jax.eval_shape(read, params, prompt, caches, at)[1]
    programs = {
        "dense prompt": (model.apply, params, prompt), "quantizing prompt": (read, params, prompt),
        "dense step": (model.apply, params, token), "packed step": (step, packed, token),
    }  # fmt: skip
    runs: dict[str, list] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, (fn, tree, tokens) in programs.items():
            runs[name].append(seconds(fn, tree, tokens, caches, at))
    out = {
        name: {what: round(statistics.median(r[what] for r in rs), 2) for what in rs[0]}
        for name, rs in runs.items()
    }
    whole = {name: sum(one.values()) for name, one in out.items()}
    out["step ratio"] = round(whole["packed step"] / whole["dense step"], 2)
    out["prompt ratio"] = round(whole["quantizing prompt"] / whole["dense prompt"], 2)
    packed_whole = whole["packed step"] + whole["quantizing prompt"]
    out["whole ratio"] = round(packed_whole / (whole["dense step"] + whole["dense prompt"]), 2)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.out:
        check_destination(args.out)
    recipe = ttq.preset("ttq", bits=4)
    found = {
        "command": "python experiments/compile_functions.py",
        "device": f"CPU, {platform.machine()}",
        "versions": versions(),
        "layers": args.layers,
        "repeats": args.repeats,
        "recipe": recipe.describe(),
        "seconds": figures(args.layers, args.repeats, recipe),
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if args.out:
        write_file(args.out, text)


if __name__ == "__main__":
    main()

"""Models that nobody here wrote, over weights packed for their prompt, against themselves.

Claim     models of tunix (NNX), gemma (Linen) and keras-hub (Keras on JAX), a vision encoder and a
          vision-language model among them, answer over packed weights as the same unchanged code
          answers over the dense weights that those stand for.
Command   python experiments/foreign_models.py tunix --out experiments/results/foreign_tunix.json
          and likewise gemma and keras-hub. Real weights in tunix's code: tunix_smollm2.py.
Cost      minutes on 2 cores; tiny random models and no accelerator. Each library
          wants an environment of its own: `pip install google-tunix`, `pip install keras-hub`, then
          ttq-jax. pip does not find gemma a set of packages beside this JAX (November 2026):
          where tunix is, `pip install --no-deps gemma kauldron dialog chex toolz lark typeguard
          tensorboard`, then `pip install ipython mediapy`.
Expect    see the result files: "equal" is true in every row, "difference" is float32 rounding.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import numpy as np

import ttq_jax as ttq
from ttq_jax.evaluation.describe import versions
from ttq_jax.files import check_destination, write_file
from ttq_jax.functions import dense_tree, effective_bits, is_packed

NEW = 8
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a task.

    Attributes:
      name: of the model.
      fn: the model as a function of its parameters.
      params: random.
      answer: (read, step) -> (tokens, scores): the task, by two functions of fn's other arguments.
    """

    name: str
    fn: Callable[..., Any]
    params: Any
    answer: Callable[..., Any]


def greedy(read: Any, step: Any, prompt: jax.Array, cache: Any, inputs: Any) -> Any:
    """Reads a prompt and decodes; `inputs(tokens, at)` are the arguments beside the cache."""
    scores, cache = read(*inputs(prompt, 0), cache)

    def body(carry: Any, at: jax.Array) -> Any:
        token, cache = carry
        scores, cache = step(*inputs(token[:, None], at), cache)
        return (jnp.argmax(scores[:, -1], -1).astype(jnp.int32), cache), (token, scores[:, -1])

    first = jnp.argmax(scores[:, -1], -1).astype(jnp.int32)
    places = prompt.shape[1] + jnp.arange(NEW, dtype=jnp.int32)
    return jax.lax.scan(body, (first, cache), places)[1]


def cached(name: str, module: Any, config: Any, prompt: jax.Array) -> Case:
    """A decoder of tunix with its own cache, and a prompt int32[B, T]."""
    from flax import nnx

    model, slots = module(config, rngs=nnx.Rngs(0)), prompt.shape[1] + NEW
    fn, params, rest = ttq.functional(model)
    # tunix begins with feed-forward kernels of zeros, which show nothing of the feed-forward.
    for i, (_, leaf) in enumerate(nnx.to_flat_state(params)):
        if not leaf[...].any():
            key = jax.random.fold_in(KEY, i)
            leaf.set_value(jax.random.normal(key, leaf.shape) * leaf.shape[-2] ** -0.5)

    def run(
        params: Any, tokens: jax.Array, positions: jax.Array, mask: jax.Array, cache: Any
    ) -> Any:
        return fn(params, rest, tokens, positions, cache, mask)[0]

    shape = (len(prompt), slots, config.num_kv_heads, config.head_dim)
    layer = {name: jnp.zeros(shape) for name in "kv"}
    layer["end_index"] = jnp.zeros(len(prompt), jnp.int32)
    cache = {f"layer_{i}": layer for i in range(config.num_layers)}
    inputs = lambda tokens, at: (tokens, *places(tokens, at, slots))  # noqa: E731
    return Case(name, run, params, lambda read, step: greedy(read, step, prompt, cache, inputs))


def places(tokens: jax.Array, at: Any, slots: int) -> tuple[jax.Array, jax.Array]:
    """Positions int32[B, T] of tokens that begin at one, and which slots of a cache they see."""
    place = at + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    seen = jnp.arange(slots)[None] <= place[:, None]
    wide = (len(tokens), *seen.shape)
    return jnp.broadcast_to(place, tokens.shape), jnp.broadcast_to(seen, wide)


def tunix_cases() -> list[Case]:
    """Decoders of tunix."""
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen3 import model as qwen3

    sizes = {
        "num_layers": 3, "vocab_size": 101, "embed_dim": 64, "hidden_dim": 96, "num_heads": 4,
        "head_dim": 16, "num_kv_heads": 2, "rope_theta": 10_000, "norm_eps": 1e-6,
    }  # fmt: skip
    prompt = jax.random.randint(KEY, (2, 16), 0, 101, jnp.int32)
    mixture = {"num_experts": 4, "num_experts_per_tok": 2}
    qwen, config = qwen3.Qwen3, qwen3.ModelConfig
    return [
        cached("Qwen3", qwen, config(**sizes), prompt),
        cached("Qwen3, tied", qwen, config(**sizes, use_tied_embedding=True), prompt),
        cached("Qwen3, mixture of experts", qwen, config(**sizes, **mixture), prompt),
        cached("Llama 3", llama3.Llama3, llama3.ModelConfig(**sizes), prompt),
    ]


def gemma_cases() -> list[Case]:
    """Decoders of google-deepmind's gemma in the layouts of Gemma 3, with its own cache."""
    from gemma import gm
    from gemma.gm.nn import _config

    local, whole = (
        _config._modules.AttentionType.LOCAL_SLIDING,
        _config._modules.AttentionType.GLOBAL,
    )
    prompt = jax.random.randint(KEY, (2, 16), 0, 101, jnp.int32)
    slots = prompt.shape[1] + NEW

    def case(name: str, **how: Any) -> Case:
        config = dataclasses.replace(
            gm.nn.Gemma3_270M.config, num_embed=101, embed_dim=64, hidden_dim=96, head_dim=16,
            attention_types=(local, whole, local), sliding_window_size=8, **how,
        )  # fmt: skip
        model = gm.nn.Gemma3_270M(config=config, dtype=jnp.float32)

        def run(
            params: Any, tokens: jax.Array, positions: jax.Array, mask: jax.Array, cache: Any
        ) -> Any:
            out = model.apply(params, tokens, positions=positions, attention_mask=mask, cache=cache)
            return out.logits, out.cache

        inputs = lambda tokens, at: (tokens, *places(tokens, at, slots))  # noqa: E731
        cache = config.init_cache(len(prompt), jnp.float32, cache_length=slots)
        params = jax.jit(model.init)(KEY, *inputs(prompt, 0)[:1])
        answer = lambda read, step: greedy(read, step, prompt, cache, inputs)  # noqa: E731
        return Case(name, run, params, answer)

    return [
        case("Gemma 3", num_heads=4, num_kv_heads=2),
        case("Gemma 3, one kernel for q, k and v", num_heads=4, num_kv_heads=4),
        case("Gemma 3, the other gating layout", num_heads=4, num_kv_heads=1,
             transpose_gating_einsum=False),
    ]  # fmt: skip


def keras(model: Any) -> tuple[Any, Any]:
    """(fn, params) of a Keras model: its variables by path."""
    params = {v.path: v.value for v in model.trainable_variables}
    others = [v.value for v in model.non_trainable_variables]

    def fn(params: Any, inputs: Any) -> Any:
        return model.stateless_call(list(params.values()), others, inputs)[0]

    # Trees of dicts are sorted by key: the model's own order is asked for by name.
    names = list(params)
    return (lambda params, inputs: fn({name: params[name] for name in names}, inputs)), params


def keras_cases() -> list[Case]:
    """A decoder, a vision encoder and a vision-language model of keras-hub."""
    import keras_hub

    models, cases = keras_hub.models, []
    sizes = {
        "vocabulary_size": 101, "num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 2,
        "hidden_dim": 64, "intermediate_dim": 96,
    }  # fmt: skip
    for name, model, image in (
        ("Llama", models.LlamaBackbone(**sizes), None),
        ("PaliGemma, an image and a question", models.PaliGemmaBackbone(
            **sizes, head_dim=16, image_size=16, vit_patch_size=4, vit_num_heads=2,
            vit_hidden_dim=32, vit_num_layers=2, vit_intermediate_dim=48,
        ), jax.random.normal(KEY, (1, 16, 16, 3))),
    ):  # fmt: skip
        cases.append(decoder(name, *keras(model), image))
    vit = models.ViTBackbone(
        image_shape=(16, 16, 3), patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=48
    )
    fn, params = keras(vit)
    images = jax.random.normal(KEY, (2, 16, 16, 3))

    def encode(read: Any, step: Any) -> Any:
        read(images)
        scores = step(images)
        return jnp.argmax(scores, -1), scores

    return [*cases, Case("ViT", fn, params, encode)]


def decoder(name: str, fn: Any, params: Any, image: Any) -> Case:
    """A Keras decoder without a cache: every token reads the text again."""
    length = 12
    question = jax.random.randint(KEY, (1, length), 1, 101, jnp.int32)
    table = next(path for path in params if path.endswith("token_embedding/embeddings"))

    def scores(params: Any, tokens: jax.Array, count: Any) -> jax.Array:
        places = jnp.arange(tokens.shape[1])[None]
        inputs = {"token_ids": tokens, "padding_mask": (places < count).astype(jnp.int32)}
        if image is not None:
            inputs |= {"images": image, "response_mask": (places >= length).astype(jnp.int32)}
        hidden = fn(params, inputs)
        last = jnp.take(hidden[0], hidden.shape[1] - tokens.shape[1] + count - 1, axis=0)
        return (last @ params[table].T)[None]

    def answer(read: Any, step: Any) -> Any:
        first = jnp.argmax(read(question, length), -1).astype(jnp.int32)
        text = jnp.pad(question, ((0, 0), (0, NEW + 1))).at[:, length].set(first)

        def body(text: jax.Array, i: jax.Array) -> Any:
            found = step(text, length + 1 + i)
            token = jnp.argmax(found, -1).astype(jnp.int32)
            return text.at[:, length + 1 + i].set(token, mode="drop"), (token, found)

        return jax.lax.scan(body, text, jnp.arange(NEW, dtype=jnp.int32))[1]

    return Case(name, scores, params, answer)


def compared(case: Case, recipe: ttq.Recipe) -> dict[str, Any]:
    """One row: packed against the dense tree that the packed one stands for, and the original."""
    fn = case.fn

    @jax.jit
    def quantized(params: Any) -> Any:
        trees = []

        def read(*args: Any) -> Any:
            out, packed = ttq.read(fn, recipe)(params, *args)
            trees.append(packed)
            return out

        return case.answer(read, lambda *args: ttq.run(fn)(trees[0], *args)), trees[0]

    @jax.jit
    def plain(params: Any, rounded: Any) -> Any:
        return case.answer(lambda *args: fn(params, *args), lambda *args: fn(rounded, *args))

    (tokens, scores), packed = quantized(case.params)
    faked, wanted = plain(case.params, dense_tree(case.params, packed))
    dense, _ = plain(case.params, case.params)
    kernels = [leaf for leaf in jax.tree.leaves(packed, is_leaf=is_packed) if is_packed(leaf)]
    return {
        "model": case.name,
        "kernels": len(kernels),
        "packed paths": [leaf.operands[0].path for leaf in kernels],
        "effective_bits": round(effective_bits(packed), 3),
        "equal": bool(np.array_equal(tokens, faked)),
        "difference": float(f"{jnp.abs(scores - wanted).max() / jnp.abs(wanted).max():.1e}"),
        "tokens as dense": round(float(jnp.mean(tokens == dense)), 3),
    }


LIBRARIES = {
    "tunix": ("google-tunix", tunix_cases),
    "gemma": ("gemma", gemma_cases),
    "keras-hub": ("keras-hub", keras_cases),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    if args.out:
        check_destination(args.out)
    package, cases = LIBRARIES[args.library]
    recipes = {
        name: ttq.preset(name, bits=4, group_size=16, moments="prompt", head=None)
        for name in ("ttq", "best")
    }
    rows = []
    for case in cases():
        for name, recipe in recipes.items():
            rows.append({"recipe": name} | compared(case, recipe))
            print({k: v for k, v in rows[-1].items() if k != "packed paths"}, file=sys.stderr)
    found = {
        "command": f"python experiments/foreign_models.py {args.library}",
        "versions": versions() | {package: importlib.metadata.version(package)},
        "rows": rows,
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if args.out:
        write_file(args.out, text)


if __name__ == "__main__":
    main()

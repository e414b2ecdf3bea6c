"""Rope scalings and experts of GGUF files: logits beside llama.cpp's, on the same tiny files.

Claim     a file's rope scaling means here what it means in llama.cpp: linear, yarn, longrope's
          factors as tensors, and Llama 3's rope_freqs.weight. So do the routers of mixtures.
Command   pip install llama-cpp-python==0.3.36
          python experiments/compare_llama_cpp.py --out experiments/results/llama_cpp.json
Cost      a minute on 2 cores, after the package has been built.
Expect    experiments/results/llama_cpp.json: in every case the largest difference is below
          1e-4 of the largest logit, and the scaling itself moves the logits far more than that.

A longrope model has two sets of factors. llama.cpp takes the long ones when its context is larger
than the original one, whatever the text is; transformers and this package, when the text is. The
cases choose context and text so that both do the same.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import pre_tokenizers

from ttq_jax.checkpoint import load
from ttq_jax.files import write_file
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits

WIDTH, FFN, LAYERS, HEADS, KV, VOCAB, TRAINED = 64, 96, 2, 4, 2, 259, 256
KEPT = 8
"""How many logits of the last token are kept of each case."""
PAIRS = 8


def llama3_factors(factor: float, theta: float) -> np.ndarray:
    """The divisors that llama.cpp's converter writes for the released Llama 3 models."""
    wavelength = 2 * np.pi * theta ** (np.arange(PAIRS) / PAIRS)
    smooth = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A file and a text.

    Attributes:
      arch: llama.cpp's name.
      rope: keys below "ARCH.rope.".
      tensors: of the rotation.
      tokens: how many are read.
      context: of llama.cpp.
      experts: in every layer, of which a token reaches two; 0 for none.
    """

    arch: str = "llama"
    rope: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    tokens: int = 200
    context: int = 512
    experts: int = 0

    @property
    def kv_heads(self) -> int:
        """llama.cpp's OLMoE has as many keys as queries."""
        return HEADS if self.arch == "olmoe" else KV


YARN = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64}
# The converter writes them for every architecture; llama.cpp reads them for a few others.
UNREAD = {
    "scaling.yarn_ext_factor": 0.5, "scaling.yarn_attn_factor": 0.88,
    "scaling.yarn_beta_fast": 2.0, "scaling.yarn_beta_slow": 0.05,
}  # fmt: skip
LONG = {"scaling.type": "longrope", "scaling.attn_factor": math.sqrt(1 + 1 / 8)}


def factors(pairs: int) -> dict[str, np.ndarray]:
    """Longrope's two tensors."""
    at = np.arange(pairs, dtype=np.float32)
    return {"rope_factors_short.weight": 1 + at / 8, "rope_factors_long.weight": 1 + at}


CASES = {
    "none": Case(),
    "linear": Case(rope={"scaling.type": "linear", "scaling.factor": 4.0}),
    "linear, factor alone": Case(rope={"scaling.factor": 4.0}),
    "linear, old key alone": Case(rope={"scale_linear": 4.0}),
    "linear, attn_factor": Case(
        rope={"scaling.type": "linear", "scaling.factor": 2.0, "scaling.attn_factor": 1.5}
    ),
    "none, with a factor": Case(rope={"scaling.type": "none", "scaling.factor": 4.0}),
    "yarn": Case(rope=YARN),
    "yarn, qwen3": Case(arch="qwen3", rope=YARN),
    "yarn, attn_factor": Case(rope=YARN | {"scaling.attn_factor": 0.7}),
    "yarn, keys of its own": Case(rope=YARN | UNREAD),
    "yarn, qwen3, keys of its own": Case(arch="qwen3", rope=YARN | UNREAD),
    "yarn, no original context": Case(
        rope={"scaling.type": "yarn", "scaling.factor": 4.0}, tokens=250
    ),
    "yarn, factor 1": Case(rope=YARN | {"scaling.factor": 1.0}),
    "longrope, short text": Case(
        rope=LONG | {"scaling.original_context_length": 256}, tensors=factors(PAIRS), context=256
    ),
    "longrope, long text": Case(
        rope=LONG | {"scaling.original_context_length": 128}, tensors=factors(PAIRS)
    ),
    "longrope, phi3 that rotates in part": Case(
        arch="phi3",
        rope=LONG | {"scaling.original_context_length": 128, "dimension_count": 12},
        tensors=factors(6),
    ),
    "llama3": Case(
        rope={"freq_base": 5e5}, tensors={"rope_freqs.weight": llama3_factors(8.0, 5e5)}
    ),
    "experts, mixtral": Case(rope=YARN, experts=4),
    "experts, qwen3moe": Case(arch="qwen3moe", rope=YARN, experts=4),
    "experts, olmoe": Case(arch="olmoe", rope=YARN, experts=4),
}  # fmt: skip


def header(case: Case) -> dict[str, Any]:
    """The file's keys."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "ab"]
    keys = {
        "block_count": LAYERS, "context_length": TRAINED, "embedding_length": WIDTH,
        "feed_forward_length": FFN, "attention.head_count": HEADS,
        "attention.head_count_kv": case.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4,
        "rope.dimension_count": WIDTH // HEADS,
    } | {f"rope.{name}": value for name, value in case.rope.items()}  # fmt: skip
    if case.experts:
        keys |= {"expert_count": case.experts, "expert_used_count": 2}
    if case.experts and case.arch != "llama":
        keys["expert_feed_forward_length"] = FFN
    return {f"{case.arch}.{name}": value for name, value in keys.items()} | {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 256 + [3] * 2 + [1],
        "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
    }  # fmt: skip


def weights(case: Case) -> dict[str, np.ndarray]:
    """Random tensors; queries and keys so large that positions matter."""
    rng, kv, head = np.random.default_rng(0), WIDTH // HEADS * case.kv_heads, WIDTH // HEADS
    stack = (case.experts,) if case.experts else ()

    def linear(*shape: int, size: float = 1.0) -> np.ndarray:
        return (rng.normal(size=shape) * size * shape[-1] ** -0.5).astype(np.float32)

    def norm(width: int) -> np.ndarray:
        return np.exp(0.3 * rng.normal(size=width)).astype(np.float32)

    out = {"token_embd.weight": linear(VOCAB, WIDTH, size=8.0)}
    out |= {"output.weight": linear(VOCAB, WIDTH), "output_norm.weight": norm(WIDTH)}
    for i in range(LAYERS):
        q, k = linear(WIDTH, WIDTH, size=2.0), linear(kv, WIDTH, size=2.0)
        v, gate, up = linear(kv, WIDTH), linear(*stack, FFN, WIDTH), linear(*stack, FFN, WIDTH)
        down = linear(*stack, WIDTH, FFN)
        layer = {
            "attn_norm": norm(WIDTH), "ffn_norm": norm(WIDTH), "attn_output": linear(WIDTH, WIDTH)
        }  # fmt: skip
        if case.arch == "phi3":
            layer |= {"attn_qkv": np.concatenate([q, k, v]), "ffn_up": np.concatenate([gate, up])}
        else:
            layer |= {"attn_q": q, "attn_k": k, "attn_v": v}
        if case.experts:
            layer |= {"ffn_gate_inp": linear(case.experts, WIDTH, size=4.0)}
            layer |= {"ffn_gate_exps": gate, "ffn_up_exps": up, "ffn_down_exps": down}
        else:
            layer |= {"ffn_down": down} | ({} if case.arch == "phi3" else {
                "ffn_gate": gate, "ffn_up": up,
            })  # fmt: skip
        if case.arch in {"qwen3", "qwen3moe"}:
            layer |= {"attn_q_norm": 2 * norm(head), "attn_k_norm": norm(head)}
        if case.arch == "olmoe":
            layer |= {"attn_q_norm": 2 * norm(WIDTH), "attn_k_norm": norm(WIDTH)}
        out |= {f"blk.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return out | case.tensors


def write(path: Path, case: Case) -> None:
    """Writes a case's file."""
    writer = gguf.GGUFWriter(str(path), case.arch)
    kinds = {int: "uint32", float: "float32", str: "string", list: "array"}
    for key, value in header(case).items():
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    for name, tensor in weights(case).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def text(case: Case) -> np.ndarray:
    """The tokens that are read."""
    return np.random.default_rng(1).integers(0, 256, case.tokens)


def ours(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of every token, by this package."""
    model = load(path)

    @jax.jit
    def read(tokens: jax.Array) -> jax.Array:
        cache = empty_cache(model.config, 1, tokens.shape[1], jnp.float32)
        valid = jnp.ones(tokens.shape, bool)
        hidden, _, _ = forward(model.config, model.params, tokens, valid, cache)
        return logits(model.config, model.params, hidden)[0]

    return np.asarray(read(jnp.asarray(tokens[None], jnp.int32)))


def theirs(path: Path, case: Case, tokens: np.ndarray) -> np.ndarray:
    """The same by llama.cpp: float32 throughout, every setting of the rotation from the file."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=case.context, n_batch=case.context, n_ubatch=case.context,
        logits_all=True, type_k=0, type_v=0, n_gpu_layers=0, verbose=False,
        # The package's own defaults would take the place of the file's values.
        yarn_attn_factor=-1.0, yarn_beta_fast=-1.0, yarn_beta_slow=-1.0,
    )  # fmt: skip
    model.eval(tokens.tolist())
    return model.scores[: len(tokens)].copy()


def compare(name: str, directory: Path) -> dict[str, Any]:
    """A row of results."""
    case, path = CASES[name], directory / "model.gguf"
    tokens = text(case)
    plain = dataclasses.replace(case, rope={"dimension_count": 12} if case.arch == "phi3" else {},
                                tensors={})  # fmt: skip
    write(path, plain)
    unscaled = ours(path, tokens)
    write(path, case)
    one, other = ours(path, tokens), theirs(path, case, tokens)
    size = np.abs(other).max()
    return {
        "case": name, "arch": case.arch, "tokens": case.tokens, "context": case.context,
        "difference": float(np.abs(one - other).max() / size),
        "moved_by_the_scaling": float(np.abs(unscaled - other).max() / size),
        "last_logits": [round(float(x), 5) for x in other[-1, :KEPT]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the rows here, as JSON")
    args = parser.parse_args()
    names = ("jax", "numpy", "gguf", "llama-cpp-python")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name in CASES:
            rows.append(compare(name, Path(directory)))
            print(f"{name:40} {rows[-1]['difference']:.1e}  {rows[-1]['moved_by_the_scaling']:.1e}")
    made = {"versions": {n: importlib.metadata.version(n) for n in names}, "rows": rows}
    if args.out:
        write_file(args.out, json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()

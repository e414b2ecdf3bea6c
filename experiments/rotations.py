"""Whether rotating a model's weights makes them easier to round.

Claim     nothing is gained, and without second order much is lost: at 3 bits `fast` has four times
          the gap, because rotation hides the few channels that hold most of the power.
Command   python experiments/rotations.py --model smollm2 --corpus wikitext2=FILE …
              --recipe fast-3-g32-asym-coded-h0-p1-f4@residual --windows 8
              --out experiments/results/rotations_smollm2.jsonl
          python experiments/quality_pairs.py experiments/results/rotations_smollm2.jsonl
              --over fast-3-g32-asym-coded-h0-p1-f4
Cost      as quality.py measure.
Expect    rows as those of quality.py. The unquantized model's perplexity is the same however it is
          rotated.

A name is one of quality.py's. `@residual` after it rotates the residual stream, `@heads` the values
of every attention head, `@rotated` both, as QuaRot does before any prompt (Ashkboos et al., 2024,
arXiv:2404.00456): an orthogonal matrix is multiplied into the weights on one side of a vector and
its transpose into those on the other. Scales of norms are multiplied into the weights after them
first. A Hadamard matrix with random signs is used, in blocks of the largest power of two that
divides the width. A model with norms after its branches, such as Gemma 3, cannot have its residual
stream rotated: their scales stand between the weights and the stream.
"""

import argparse
import dataclasses
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from quality import measure
from recipe_names import NAMES

import ttq_jax as ttq

KINDS = ("residual", "heads", "rotated")


def hadamard(width: int, seed: int) -> np.ndarray:
    """An orthogonal matrix: random signs, then Hadamard blocks; float32[width, width]."""
    block = width & -width
    one = np.ones((1, 1), np.float32)
    while len(one) < block:
        one = np.block([[one, one], [one, -one]])
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], width).astype(np.float32)
    return signs[:, None] * np.kron(np.eye(width // block, dtype=np.float32), one / block**0.5)


def rotated_stream(model: ttq.Model) -> ttq.Model:
    """The model with its residual stream rotated and its norms' scales in the weights.

    Raises:
      SystemExit: a model whose norms do not let it.
    """
    config, params = model.config, model.params
    if config.norm != "rms" or config.norm_placement != "pre" or config.n_experts:
        raise SystemExit(
            f"{model.name}: expected RMS norms without a 1 added, in front of each branch, and no "
            f"experts, got {config.norm!r}, {config.norm_placement!r} and {config.n_experts}"
        )
    by = hadamard(config.d_model, seed=0)
    table = np.asarray(params["embed"]["embedding"])
    head = table.T if config.tie_embeddings else np.asarray(params["head"]["kernel"])
    layers = dict(params["layers"])

    def read(name: str, norm: str) -> dict:
        scale = np.asarray(params["layers"][norm]["scale"])
        kernel = np.asarray(layers[name]["kernel"]) * scale[:, :, None]
        return layers[name] | {"kernel": jnp.asarray(by.T @ kernel)}

    for name in ("q", "k", "v"):
        layers[name] = read(name, "attn_norm")
    for name in ("gate", "up"):
        layers[name] = read(name, "mlp_norm")
    for name in ("o", "down"):
        layers[name] = layers[name] | {
            "kernel": jnp.asarray(np.asarray(layers[name]["kernel"]) @ by)
        }
    for norm in ("attn_norm", "mlp_norm"):
        layers[norm] = {"scale": jnp.ones_like(layers[norm]["scale"])}
    final = np.asarray(params["final_norm"]["scale"])
    tree = params | {
        "embed": {"embedding": jnp.asarray(table @ by)},
        "head": {"kernel": jnp.asarray(by.T @ (final[:, None] * head))},
        "final_norm": {"scale": jnp.ones_like(params["final_norm"]["scale"])},
        "layers": layers,
    }
    config = dataclasses.replace(config, tie_embeddings=False)
    return dataclasses.replace(model, config=config, params=tree)


def rotated_heads(model: ttq.Model) -> ttq.Model:
    """The model with the values of every head rotated, by one matrix for all."""
    config, layers = model.config, dict(model.params["layers"])
    by = hadamard(config.head_dim, seed=1)
    values, out = (np.asarray(layers[name]["kernel"]) for name in ("v", "o"))
    apart = values.reshape(*values.shape[:2], config.n_kv_heads, config.head_dim) @ by
    heads = out.reshape(len(out), config.n_heads, config.head_dim, -1)
    together = np.einsum("hr,lnho->lnro", by, heads)
    layers["v"] = layers["v"] | {"kernel": jnp.asarray(apart.reshape(values.shape))}
    layers["o"] = layers["o"] | {"kernel": jnp.asarray(together.reshape(out.shape))}
    return dataclasses.replace(model, params=model.params | {"layers": layers})


def rotated(model: ttq.Model, kind: str) -> ttq.Model:
    """The model, rotated as one of `KINDS` says."""
    model = model if kind == "heads" else rotated_stream(model)
    return model if kind == "residual" else rotated_heads(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--corpus", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--recipe", action="append", default=[], metavar="NAME[@KIND]",
                        help=f"{NAMES}; KIND: {', '.join(KINDS)}")  # fmt: skip
    parser.add_argument("--windows", type=int, default=8, help="per corpus, default: %(default)s")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(calibration=[])
    args = parser.parse_args()
    plain = ttq.load(args.model)

    @cache
    def model_of(name: str) -> ttq.Model:
        kind = name.partition("@")[2]
        if kind and kind not in KINDS:
            raise SystemExit(f"--recipe {name}: expected one of {', '.join(KINDS)} after the @")
        return rotated(plain, kind) if kind else plain

    measure(args, model_of)


if __name__ == "__main__":
    main()

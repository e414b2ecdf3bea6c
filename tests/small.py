"""Small random models in our own form, for tests that need no checkpoint and no tokenizer."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ttq_jax.checkpoint.placing import names_of, shardings
from ttq_jax.config import ModelConfig, Rope
from ttq_jax.models.decoder import init_params
from ttq_jax.types import Prompts

BASE = {
    "family": "llama", "vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 4,
    "n_kv_heads": 2, "head_dim": 16, "d_ff": 96, "max_positions": 512, "embed_dim": 64,
    "query_scale": 0.25, "rope": Rope(theta=10000.0),
}  # fmt: skip

OPT = {
    "family": "opt", "norm": "layer", "activation": "relu", "gated": False, "rope": None,
    "n_kv_heads": 4, "qkv_bias": True, "o_bias": True, "mlp_bias": True,
}  # fmt: skip


def small_config(**changes) -> ModelConfig:
    """A two-layer model; OPT's switches with `**OPT`."""
    return ModelConfig(**{**BASE, **changes})


@functools.cache
def _shapes(config: ModelConfig):
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def small_params(config: ModelConfig, seed: int = 0):
    """Random parameters with opinions: channels differ in size, logits are of order one.

    Of `init_params` only the shapes: NumPy draws without a program for each of them.
    """
    rng, spreads = np.random.default_rng([seed, 1]), np.random.default_rng(seed)
    channels = 0.0 if config.norm == "rms_plus_one" else 1.0

    def draw(path, one):
        *above, name = names_of(path)
        if name in {"scale", "bias"}:
            return jnp.full(one.shape, channels if name == "scale" else 0.0, jnp.float32)
        projection = "layers" in above and name == "kernel"
        size = 1 / math.sqrt(one.shape[-2]) if projection else 0.02
        return jnp.asarray(size * rng.normal(size=one.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, _shapes(config))
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * 10.0
    for name in ("attn_norm", "mlp_norm"):
        scale = params["layers"][name]["scale"]
        spread = np.exp(spreads.normal(size=scale.shape))
        params["layers"][name]["scale"] = scale * jnp.asarray(spread, jnp.float32)
    return params


def in_host(params, mesh=None):
    """The tree as `load(dense_memory="host")` places it."""
    where = shardings(params, mesh, "host")

    def place(path, array):
        return jax.device_put(array, where[names_of(path)], may_alias=True)

    return jax.tree_util.tree_map_with_path(place, params)


def prompts_of(rows, length: int, side: str = "right", fill: int = 0) -> Prompts:
    """Pads rows of token ids to `length` on one side, with `fill` in the padding."""
    tokens = np.full((len(rows), length), fill, np.int32)
    valid = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        tokens[i, at], valid[i, at] = row, True
    return Prompts(jnp.asarray(tokens), jnp.asarray(valid))


def random_rows(lengths, vocab: int = 97, seed: int = 0):
    """Rows of random token ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab, n).tolist() for n in lengths]

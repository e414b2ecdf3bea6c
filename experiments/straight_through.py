"""What `learned_recipe.py` learns, and the loss that it learns by.

Quantization inside the decoder, differentiable in α, λ and a clipping factor c: the package's own
range, codes and decoding, rounding with the derivative of what it rounds (straight through).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ttq_jax.config import ModelConfig
from ttq_jax.evaluation.perplexity import Protocol
from ttq_jax.linear import linear
from ttq_jax.models.cache import activation_dtype, empty_cache
from ttq_jax.models.decoder import forward, logits, plain
from ttq_jax.quant.grid import Grid, decode, encode, fit_range, split_groups, store
from ttq_jax.quant.moments import Reads, p_mean
from ttq_jax.quant.scaling import PowerLaw
from ttq_jax.sites import observing
from ttq_jax.types import Cache, Moments, Params, kernels

START = PowerLaw()
# The clip's bounds; beyond the lower one a 3-bit grid would have lost most weights.
LEAST_CLIP = 0.1


@struct.dataclass
class Theta:
    """What is learned; each float32[n, l] with n = 1 or the projections, l = 1 or the layers.

    λ is kept as its logarithm, which keeps it positive.
    """

    alpha: Any
    log_lam: Any
    clip: Any


def default_theta() -> Theta:
    """The closed form's values."""
    full = partial(jnp.full, (1, 1), dtype=jnp.float32)
    return Theta(alpha=full(START.alpha), log_lam=full(np.log(START.lam)), clip=full(1.0))


def at_resolution(theta: Theta, variant: str, projections: int, layers: int) -> Theta:
    """The same numbers, as many times as the variant has them.

    Raises:
      SystemExit: there are more of them than that.
    """
    shape = {"global": (1, 1), "projection": (projections, 1), "layer": (projections, layers)}
    try:
        return jax.tree.map(lambda a: jnp.broadcast_to(a, shape[variant]), theta)
    except ValueError as e:
        raise SystemExit(
            f"start: expected at most {shape[variant]} numbers of each kind for variant {variant}, "
            f"got {theta.alpha.shape}; start from a coarser variant of the same model"
        ) from e


def by_projection(theta: Theta, names: list[str], layers: int) -> dict[str, Theta]:
    """Per projection the numbers of each layer, [L], whatever the variant."""
    whole = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(names), layers)), theta)
    return {name: jax.tree.map(lambda a, i=i: a[i], whole) for i, name in enumerate(names)}


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def encode_through(groups: jax.Array, scales: jax.Array, zeros: jax.Array, grid: Grid) -> jax.Array:
    """The codes of `encode`, with the derivative of what they round: straight through."""
    return encode(groups, scales, zeros, grid)


@encode_through.defjvp
def _encode_jvp(grid: Grid, at: tuple, moved: tuple) -> tuple[jax.Array, jax.Array]:
    unrounded, change = jax.jvp(lambda g, s, z: g / s[:, None] + z[:, None], at, moved)
    # A code at the end of the grid stays there: beyond it a weight has no say.
    inside = (unrounded >= 0) & (unrounded <= 2**grid.bits - 1)
    return encode(*at, grid), jnp.where(inside, change, jnp.zeros_like(change))


def fake_quantized(w: jax.Array, m: jax.Array, theta: Theta, grid: Grid) -> jax.Array:
    """What a weight [d_in, d_out] stands for once it is quantized; m [d_in] relative moments."""
    w = w.astype(jnp.float32)
    # The floor is PowerLaw's: a channel that no token excites.
    d = jnp.maximum((m + jnp.exp(theta.log_lam)) ** theta.alpha, 1e-4)
    d = store(d, grid.store_dtype).astype(jnp.float32)
    groups = split_groups(w * d[:, None], grid.rows_per_group(len(w)))
    low, high = jnp.min(groups, axis=1), jnp.max(groups, axis=1)
    scales, zeros = fit_range(theta.clip * low, theta.clip * high, grid)
    codes = encode_through(groups, scales, zeros, grid)
    dense = decode(codes, scales, zeros).reshape(-1, w.shape[1])[: len(w)]
    return dense / d[:, None]


def fake_project(grid: Grid) -> Callable[..., tuple[dict[str, jax.Array], None]]:
    """The `Project` that multiplies by what the weights are after quantization."""

    # Recomputed on the way back: a layer's weights in every stage of rounding are never kept.
    @partial(jax.checkpoint, static_argnums=(0,), prevent_cse=False)
    def project(
        site: str, x: jax.Array, weights: dict[str, Params], layer: dict[str, Any]
    ) -> tuple[dict[str, jax.Array], None]:
        ys = {}
        for name, leaf in weights.items():
            w = fake_quantized(leaf["kernel"].kernel, layer["m"][site], layer["theta"][name], grid)
            ys[name] = linear(x, w, leaf.get("bias"))
        return ys, None

    return project


def relative(moments: Moments) -> jax.Array:
    """The channels' root mean squares over their mean, as `PowerLaw` takes them; [d_in]."""
    m = p_mean(moments, START.p)
    mean = jnp.mean(m)
    return jnp.where(mean > 0, m / jnp.where(mean > 0, mean, 1.0), 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a loss depends on besides weights, text and θ; static under jit."""

    config: ModelConfig
    protocol: Protocol
    grid: Grid

    def read_prompt(
        self, params: Params, tokens: jax.Array
    ) -> tuple[jax.Array, Cache, dict[str, jax.Array]]:
        """The unquantized model's last state after the prompt, its cache, relative moments."""
        p = self.protocol
        read, valid = tokens[None, : p.prompt_tokens], jnp.ones((1, p.prompt_tokens), bool)
        cache = empty_cache(self.config, 1, p.window, activation_dtype(params))
        hidden, cache, seen = forward(
            self.config, params, read, valid, cache, slots=p.prompt_tokens,
            project=observing(valid, Reads((START.p,))),
        )  # fmt: skip
        return hidden[0, -1:], cache, {s: jax.vmap(relative)(m) for s, m in seen.items()}

    def states(
        self, params: Params, tokens: jax.Array, theta: Theta, *, teacher: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Final states that predict the scored tokens, quantized and (if asked) unquantized."""
        last, cache, m = self.read_prompt(params, tokens)
        names = list(kernels(params["layers"]))
        numbers = by_projection(theta, names, self.config.n_layers)
        rest = tokens[None, self.protocol.prompt_tokens : -1]

        def read(**how: Any) -> jax.Array:
            valid = jnp.ones(rest.shape, bool)
            after, _, _ = forward(self.config, params, rest, valid, cache, **how)
            return jnp.concatenate([last, after[0]])

        ours = read(project=fake_project(self.grid), per_layer={"theta": numbers, "m": m})
        return ours, read(project=plain) if teacher else ours

    def loss(self, theta: Theta, params: Params, tokens: jax.Array, kind: str) -> jax.Array:
        """Nats per scored token of one window."""
        ours, theirs = self.states(params, tokens, theta, teacher=kind == "kl")
        log_q = jax.nn.log_softmax(logits(self.config, params, ours))
        if kind == "nll":
            scored = tokens[self.protocol.prompt_tokens :, None]
            return -jnp.mean(jnp.take_along_axis(log_q, scored, axis=1))
        log_p = jax.nn.log_softmax(logits(self.config, params, theirs))
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1))


@partial(jax.jit, static_argnames=("setting", "kind"))
def loss_of(
    theta: Theta, params: Params, tokens: jax.Array, *, setting: Setting, kind: str
) -> jax.Array:
    """`Setting.loss`, compiled."""
    return setting.loss(theta, params, tokens, kind)

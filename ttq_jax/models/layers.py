"""Norms, activations and rotations: the parts of a block that hold no large weight."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ttq_jax.config import ModelConfig

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Norm(nn.Module):
    """RMS norm (Zhang & Sennrich, 2019), Gemma's (1+w) variant, or layer norm, over the last axis.

    Statistics are taken in float32 whatever the input's dtype.

    Attributes:
      kind: see `ModelConfig.norm`.
      eps: added to the variance.
    """

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Normalizes each vector and scales its channels."""
        init = nn.initializers.zeros if self.kind == "rms_plus_one" else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],)).astype(jnp.float32)
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        scale = 1.0 + scale if self.kind == "rms_plus_one" else scale
        y = y * jnp.broadcast_to(scale, y.shape)
        if self.kind == "layer":
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
            y = y + jnp.broadcast_to(bias, y.shape)
        return y.astype(x.dtype)


def make_norm(config: ModelConfig, name: str | None = None) -> Norm:
    """The config's norm under a parameter name."""
    return Norm(config.norm, config.norm_eps, name=name)


def rotate(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    inverse_frequencies: Float[Array, " half"],
) -> Float[Array, "B T N H"]:
    """Rotary position embedding, half-split convention (pairs are channels i and i + H/2).

    Args:
      x: queries or keys.
      positions: of each token in its sequence.
      inverse_frequencies: [H / 2], radians per token; `Rope.inverse_frequencies`.

    Returns:
      The rotated heads, in x's dtype; computed in float32.
    """
    angle = positions[:, :, None, None].astype(jnp.float32) * inverse_frequencies[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def scaled(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """A factor times x, in the dtype of x; x itself at 1."""
    return x if factor == 1.0 else x * jnp.asarray(factor, x.dtype)


def softcap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """c·tanh(x/c), or x itself when there is no cap (Gemma 2 report, 2024)."""
    return x if cap is None else cap * jnp.tanh(x / cap)

"""Norms, activations and rotations: the parts of a block that hold no large weight."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ttq_jax.config import ModelConfig, Rope

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


def growth(rope: Rope, head_dim: int, lengths: Int[Array, " B"]) -> Float[Array, "B half"]:
    """The factor on a rotation's frequencies for texts of some length, see `Rope`.

    Args:
      rope: the rotation.
      head_dim: H.
      lengths: of the texts so far, tokens.

    Returns:
      1 for each pair of channels of texts within the original context, and for other scalings.
    """
    count, length = rope.channels(head_dim), lengths.astype(jnp.float32)[:, None]
    if rope.scaling == "longrope":
        ratio = np.array(rope.short_factors) / np.array(rope.long_factors)
        beyond = length > rope.original_positions
        return jnp.where(beyond, jnp.asarray(ratio, jnp.float32)[None], jnp.float32(1))
    if rope.scaling == "dynamic":
        # theta' = theta · stretch ^ (R / (R - 2)), as a factor on theta' ^ (-2i / R).
        stretch = rope.factor * length / rope.original_positions - (rope.factor - 1)
        log = jnp.log(jnp.maximum(stretch, 1.0))
        exponents = jnp.asarray(np.arange(0, count, 2) / (count - 2), jnp.float32)[None]
        return jnp.exp(-log * exponents)
    return jnp.ones((lengths.shape[0], count // 2), jnp.float32)


def rotate(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    inverse_frequencies: Float[Array, "#B half"],
    magnitude: Float[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """Rotary position embedding, half-split convention (pairs are channels i and i + R/2).

    Args:
      x: queries or keys.
      positions: of each token in its sequence.
      inverse_frequencies: [R / 2], radians per token; `Rope.inverse_frequencies`. The first R
        channels rotate.
      magnitude: factor on the channels that rotate; None for 1.

    Returns:
      The rotated heads, in x's dtype; computed in float32.
    """
    angle = positions[:, :, None, None].astype(jnp.float32) * inverse_frequencies[:, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if magnitude is not None:
        cos, sin = magnitude * cos, magnitude * sin
    count = 2 * inverse_frequencies.shape[-1]
    first, second = jnp.split(x[..., :count].astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    kept = () if count == x.shape[-1] else (x[..., count:].astype(jnp.float32),)
    return jnp.concatenate((*turned, *kept), axis=-1).astype(x.dtype)


def scaled(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """A factor times x, in the dtype of x; x itself at 1."""
    return x if factor == 1.0 else x * jnp.asarray(factor, x.dtype)


def softcap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """c·tanh(x/c), or x itself when there is no cap (Gemma 2 report, 2024)."""
    return x if cap is None else cap * jnp.tanh(x / cap)

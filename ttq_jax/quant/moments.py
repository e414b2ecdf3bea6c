"""Observation: what a linear layer saw, reduced to power sums per input channel.

TTQ (arXiv:2603.19296) reads them from the prompt, AWQ (Lin et al., 2023) from a calibration
corpus; nothing else distinguishes the two.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ttq_jax.types import Moments


def observe(
    x: Float[Array, "*batch T d_in"], valid: Bool[Array, "*batch T"], powers: tuple[float, ...]
) -> Moments:
    """Power sums of the real tokens' activations; padding never enters.

    Args:
      x: activations entering a linear layer.
      valid: True where a token is real.
      powers: exponents p > 0 of Σ |x|^p.

    Returns:
      float32 moments over all leading axes.
    """
    # Selected, not multiplied: 0 · inf in a padding row would be NaN.
    magnitude = jnp.where(valid[..., None], jnp.abs(x.astype(jnp.float32)), 0.0)
    axes = tuple(range(x.ndim - 1))
    rows = [jnp.sum(jnp.square(magnitude) if p == 2 else magnitude**p, axis=axes) for p in powers]
    return Moments(jnp.stack(rows), jnp.sum(valid, dtype=jnp.float32), powers)


def p_mean(moments: Moments, p: float) -> Float[Array, "d_in"]:
    """The p-mean (E|x|^p)^(1/p) of each channel: the p-norm, made independent of prompt length.

    Args:
      moments: holding power `p`.
      p: 1 gives the mean magnitude (AWQ), 2 the root mean square (TTQ).

    Returns:
      float32[d_in], >= 0; zeros if nothing was observed.
    """
    return moments.mean_power(p) ** (1.0 / p)

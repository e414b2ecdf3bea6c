"""From logits to the next token."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ttq_jax.config import ConfigError
from ttq_jax.errors import check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Filters apply in the order top-k, top-p.

    Attributes:
      temperature: divides the logits, >= 0; 0 takes the likeliest token (greedy).
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens whose probabilities first reach this sum, in (0, 1]
        (nucleus sampling, Holtzman et al., 2020).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        check_fields(self, ConfigError)
        if not (0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ConfigError(
                "sampling: expected a finite temperature >= 0, top_k >= 0 and 0 < top_p <= 1; got "
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError(
                "top_k and top_p have no effect at temperature 0, which takes the likeliest token; "
                f"got top_k={self.top_k}, top_p={self.top_p}: set a temperature above 0 too"
            )


FIXED = "threefry2x32"
"""The generator of draws that a result depends on and no user asked for: the same whatever
`jax_default_prng_impl` says."""


def make_key(seed: int, impl: str | None = None) -> Array:
    """A key whose draws depend on the seed, not on whether 64-bit types are enabled.

    Args:
      seed: any integer, of which the low 32 bits count.
      impl: the generator; None for jax's default.

    Returns:
      A typed PRNG key, made by an explicit transfer.
    """
    return jax.random.key(jax.device_put(np.uint32(seed % 2**32)), impl=impl)


def likeliest(logits: Float[Array, "*batch V"]) -> Int[Array, "*batch"]:
    """The first of the largest logits; 0 where one is NaN, which `generate` refuses later."""
    # XLA's argmax on a CPU compares one pair at a time; these two reductions take its vectors.
    largest = jnp.max(logits, axis=-1, keepdims=True)
    at = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.min(jnp.where(logits < largest, jnp.int32(logits.shape[-1]), at), axis=-1)


def filtered(logits: Float[Array, "*batch V"], sampling: Sampling) -> Float[Array, "*batch V"]:
    """The logits of the distribution that tokens are drawn from.

    Args:
      logits: unnormalized log-probabilities, float32.
      sampling: how, with a temperature above 0.

    Returns:
      Likewise; -inf for tokens that the filters leave out.
    """
    logits = logits / sampling.temperature
    if sampling.top_k:
        k = min(sampling.top_k, logits.shape[-1])
        kth = jax.lax.top_k(logits, k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(order, axis=-1)
        # A token stays if the likelier ones do not reach top_p yet; the first always stays.
        inside = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
        lowest = jnp.min(jnp.where(inside, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


def sample(key: Array, logits: Float[Array, "B V"], sampling: Sampling) -> Int[Array, " B"]:
    """Chooses one token per row.

    Args:
      key: a PRNG key, unused when greedy.
      logits: unnormalized log-probabilities, float32.
      sampling: how.

    Returns:
      int32 token ids.
    """
    if sampling.temperature == 0:
        return likeliest(logits)
    return jax.random.categorical(key, filtered(logits, sampling), axis=-1).astype(jnp.int32)

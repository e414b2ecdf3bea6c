"""Two streams through one read of the prompt: X by the unquantized weights, X̃ by those made so far.

Decoding feeds a layer what quantized layers before it made, X̃, and not the X that the prompt's own
read has there. So its codes are chosen for X̃: moments are those of X̃, and what is rounded is the
weight whose product with X̃ comes nearest to X W,

    argmin_V  |X̃ V − X W|² / T + δ |V − W|²  =  W + (X̃ᵀX̃/T + δ)⁻¹ X̃ᵀ (X − X̃)/T · W

of which only a part α of the second term is added: a prompt's tokens are few, and the whole of it
fits them too closely. QEP (arXiv:2504.09629), GPTAQ (arXiv:2504.02692) and Qronos
(arXiv:2505.11695) do so from a calibration corpus. Where tokens are fewer than channels the same
is (X̃ᵀ) (X̃X̃ᵀ/T + δ)⁻¹ (X − X̃)/T: one system of the prompt's size, and nothing of d_in × d_in.
"""

import dataclasses

import jax.numpy as jnp
import jax.scipy as jsp
from jaxtyping import Array, Bool, Float

from ttq_jax.config import ConfigError
from ttq_jax.errors import check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correction:
    """How far a weight is moved to make up for the layers before it; read by `prefill="both"`.

    Attributes:
      strength: α in [0, 1], the part of the correction that is added; 0 for none.
      damping: δ > 0 as a multiple of the mean second moment of X̃'s channels.

    Raises:
      ConfigError: a value outside its range.
    """

    strength: float = 0.5
    damping: float = 1.0

    def __post_init__(self):
        check_fields(self, ConfigError)
        if not 0 <= self.strength <= 1 or not 0 < self.damping < float("inf"):
            raise ConfigError(
                "correction: expected strength in [0, 1] and a finite damping above 0, got "
                f"strength={self.strength} and damping={self.damping}"
            )


@dataclasses.dataclass(frozen=True)
class Streams:
    """A site's activations in both streams.

    Attributes:
      exact: X, [B, T, d_in].
      drifted: X̃, the same shape.
      moves: matrices; a weight multiplied by one after the other is added to it. None for no
        correction.
    """

    exact: Array
    drifted: Array
    moves: tuple[Array, ...]

    def moved(self, w: Float[Array, "d_in n"]) -> Float[Array, "d_in n"]:
        """W, corrected; float32."""
        added = w = w.astype(jnp.float32)
        for factor in self.moves:
            added = _product(factor, added)
        return w + added if self.moves else w


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def apart(x: Float[Array, "both T d_in"], valid: Bool[Array, "B T"], rule: Correction) -> Streams:
    """The two streams of a site, and what corrects its weights.

    Args:
      x: the rows of both, X first.
      valid: which tokens are real; the others correct nothing.
      rule: how far.

    Returns:
      Both streams.
    """
    exact, drifted = jnp.split(x, 2)
    if not rule.strength:
        return Streams(exact, drifted, ())

    def rows(a: Array) -> Array:
        return jnp.where(valid[..., None], a.astype(jnp.float32), 0.0).reshape(-1, a.shape[-1])

    seen = rows(drifted)
    n, d_in = seen.shape
    count = jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1.0)
    missing = (rows(exact) - seen) * (jnp.float32(rule.strength) / count)
    mean = jnp.sum(jnp.square(seen)) / (count * jnp.float32(d_in))
    # A stream of zeros moves nothing, and must not divide by nothing.
    damping = jnp.where(mean > 0, mean * jnp.float32(rule.damping), 1.0)

    def solved(gram: Array, wanted: Array) -> Array:
        system = gram / count + damping * jnp.eye(len(gram), dtype=jnp.float32)
        return jsp.linalg.solve(system, wanted, assume_a="pos")

    # Two forms of one matrix; the smaller system is solved.
    if n < d_in:
        return Streams(exact, drifted, (solved(_product(seen, seen.T), missing), seen.T))
    whole = solved(_product(seen.T, seen), _product(seen.T, missing))
    return Streams(exact, drifted, (whole,))

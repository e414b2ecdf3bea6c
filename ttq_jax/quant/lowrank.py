"""Static low rank: the top-r part of a weight is kept in full precision, the rest is quantized.

Ŵ = Q((W − BA) D) D⁻¹ + BA with BA the truncated SVD of W (arXiv:2603.19296): it depends on the
weight alone, so it is computed once per model and handed to every prompt.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ttq_jax.config import ConfigError
from ttq_jax.types import LowRank


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticLowRank:
    """The top-r singular triplets of W.

    Attributes:
      rank: r >= 0; 0 keeps nothing. A rank above a weight's smaller side keeps all of it.
    """

    rank: int = 0

    def __post_init__(self):
        if self.rank < 0:
            raise ConfigError(f"rank: expected 0 (none) or more, got {self.rank}")


def truncated_svd(w: Float[Array, "d_in d_out"], rank: int) -> LowRank:
    """The best rank-r approximation of W in the Frobenius norm (Eckart & Young, 1936).

    Args:
      w: a weight.
      rank: r >= 1.

    Returns:
      float32 factors; the singular values are split evenly between the two.
    """
    u, s, vt = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return LowRank(u[:, :rank] * root, root[:, None] * vt[:rank])


@partial(jax.jit, static_argnames="rank")
def factor_layers(kernel: Float[Array, "L d_in d_out"], rank: int) -> LowRank:
    """`truncated_svd` of every layer, one layer at a time.

    Args:
      kernel: a projection's weights, stacked.
      rank: r >= 1.

    Returns:
      Factors stacked over the layers.
    """
    return jax.lax.map(lambda w: truncated_svd(w, rank), kernel)

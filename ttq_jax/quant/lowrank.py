"""The low-rank part of a weight, kept beside the codes: Ŵ = Q((W − BA) D) D⁻¹ + BA.

Static: BA is the truncated SVD of W (arXiv:2603.19296), or of W with its rows weighted by the power
of their inputs; computed before any prompt. Error: the part of the rounding error E = W − Ŵ that
the prompt's own inputs X excite most, E U Uᵀ with U the top output directions of Xᵀ E; computed
after rounding. Mean: what the mean input μ makes of E, as the matrix μ (μᵀ E) / ‖μ‖²; bias
correction (Nagel et al., 2019, arXiv:1906.04721) as one more rank, so that it is a part of the
weight and is scaled with the input.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ttq_jax.config import ConfigError
from ttq_jax.errors import check_fields, shown
from ttq_jax.host import fetched
from ttq_jax.quant.grid import store
from ttq_jax.types import LowRank

_STORES = ("float", "int8")

# More directions than asked for make the iteration converge faster (Halko et al., 2011).
_OVERSAMPLING = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankRule:
    """Ranks of the part beside the codes. One above a weight's smaller side keeps all of it.

    Attributes:
      rank: rank of the static part, >= 0; 0 for none.
      weighted: whether the static part is the best one for inputs with the corpus's (or prior's)
        power per channel, instead of for white noise.
      error_rank: rank of the correction of the rounding error, >= 0; 0 for none.
      mean: whether one more rank makes the mean input's output exact. Scales and codes are then
        chosen by variances in place of E[x²], but second order by the Gram matrix as it is.
      iterations: steps of the subspace iteration that finds it, >= 1.
      store: "float" (the grid's store dtype) or "int8" with a scale per rank.

    Raises:
      ConfigError: a value outside its range.
    """

    rank: int = 0
    weighted: bool = False
    error_rank: int = 0
    mean: bool = False
    iterations: int = 2
    store: str = "float"

    def __post_init__(self):
        check_fields(self, ConfigError)
        if self.rank < 0 or self.error_rank < 0 or self.iterations < 1:
            raise ConfigError(
                "low_rank: expected rank >= 0, error_rank >= 0 and iterations >= 1, got "
                f"rank={self.rank}, error_rank={self.error_rank}, iterations={self.iterations}"
            )
        if self.store not in _STORES:
            raise ConfigError(
                f"low_rank.store: expected one of {', '.join(_STORES)}, got {shown(self.store)}"
            )
        if self.weighted and not self.rank:
            raise ConfigError(
                "low_rank.weighted: expected a static part to weight, got rank 0; set low_rank.rank"
            )

    @property
    def total(self) -> int:
        """The rank of all parts together."""
        return self.rank + self.error_rank + self.mean

    @property
    def after(self) -> bool:
        """Whether a part is computed after rounding."""
        return bool(self.error_rank or self.mean)

    @property
    def span(self) -> int:
        """How much of the Gram matrix is read: all for the error part, otherwise none."""
        return -1 if self.error_rank else 0


def stored_factors(factors: LowRank, rule: LowRankRule, dtype: str) -> LowRank:
    """Factors as they are stored.

    Args:
      factors: float32.
      rule: its `store` says how.
      dtype: of floating factors.

    Returns:
      The factors, each rounded to nearest; the same object if they are stored already.
    """
    if factors.down_scale is not None:
        return factors
    if rule.store == "float":
        return LowRank(store(factors.down, dtype), store(factors.up, dtype))

    def eight_bits(a: Array, axis: int) -> tuple[Array, Array]:
        scale = jnp.max(jnp.abs(a), axis=axis) / 127.0
        scale = store(jnp.where(scale > 0, scale, 1.0), dtype)
        unit = a / jnp.expand_dims(scale.astype(jnp.float32), axis)
        return jnp.clip(jnp.round(unit), -127, 127).astype(jnp.int8), scale

    down, down_scale = eight_bits(factors.down.astype(jnp.float32), -2)
    up, up_scale = eight_bits(factors.up.astype(jnp.float32), -1)
    return LowRank(down, up, down_scale, up_scale)


def joined(first: LowRank | None, second: LowRank) -> LowRank:
    """Both corrections as one: their ranks side by side."""
    if first is None:
        return second
    scales: list[Array | None] = [None, None]
    if first.down_scale is not None:
        scales = [
            jnp.concatenate([first.down_scale, second.down_scale], axis=-1),
            jnp.concatenate([first.up_scale, second.up_scale], axis=-1),
        ]
    return LowRank(
        jnp.concatenate([first.down, second.down], axis=-1),
        jnp.concatenate([first.up, second.up], axis=-2),
        *scales,
    )


def truncated_svd(
    w: Float[Array, "d_in d_out"], rank: int, power: Float[Array, " d_in"] | None = None
) -> LowRank:
    """The best rank-r approximation of W for inputs with this power per channel.

    Args:
      w: a weight.
      rank: r >= 1.
      power: E[x²]; None weighs all channels alike (Eckart & Young, 1936).

    Returns:
      float32 factors; the singular values are split evenly between the two.
    """
    weight = jnp.ones(len(w), jnp.float32) if power is None else jnp.sqrt(power)
    # A channel that was never excited keeps a little weight, so that it can be divided out.
    weight = jnp.maximum(weight, 1e-3 * jnp.max(weight))[:, None]
    weight = jnp.where(weight > 0, weight, 1.0)
    u, s, vt = jnp.linalg.svd(w.astype(jnp.float32) * weight, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return LowRank(u[:, :rank] * root[None] / weight, root[:, None] * vt[:rank])


@partial(jax.jit, static_argnames="rank")
def factor_layers(
    kernel: Float[Array, "*L d_in d_out"], rank: int, power: Float[Array, "*L d_in"] | None = None
) -> LowRank:
    """`truncated_svd` of every layer, and every expert of it, one at a time.

    Args:
      kernel: a projection's weights, stacked.
      rank: r >= 1.
      power: per layer and expert, see `truncated_svd`.

    Returns:
      Factors stacked likewise.
    """
    if kernel.ndim > 3:
        one = lambda at: factor_layers(at[0], rank, at[1])  # noqa: E731
        return jax.lax.map(one, (kernel, power))
    return jax.lax.map(lambda at: truncated_svd(fetched(at[0]), rank, at[1]), (kernel, power))


def mean_factors(error: Float[Array, "d_in d_out"], mean: Float[Array, " d_in"]) -> LowRank:
    """The part of an error that the mean input excites.

    Args:
      error: W − Ŵ.
      mean: E[x] of the inputs, μ.

    Returns:
      float32 factors of μ (μᵀ E) / ‖μ‖², the first of length 1; zeros for μ = 0.
    """
    length = jnp.sqrt(jnp.sum(jnp.square(mean)))
    unit = mean / jnp.where(length > 0, length, 1.0)
    # A sum, not a product: XLA then computes the error on the way and never holds it.
    up = jnp.sum(unit[:, None] * error, axis=0)
    return LowRank(unit[:, None], up[None])


def error_factors(
    error: Float[Array, "d_in d_out"], gram: Float[Array, "d_in d_in"], rule: LowRankRule
) -> LowRank:
    """The part of an error that the inputs excite most, by randomized subspace iteration.

    Args:
      error: W − Ŵ.
      gram: E[x xᵀ] of the inputs.
      rule: its error rank and iterations.

    Returns:
      float32 factors of E U Uᵀ, U the top eigenvectors of Eᵀ E[x xᵀ] E.
    """
    d_out = error.shape[1]
    rank = min(rule.error_rank, *error.shape)
    width = min(rank + _OVERSAMPLING, d_out)
    # An error is as small as a rounding step, and a TPU would multiply in bfloat16.
    times = partial(jnp.matmul, precision="highest")

    def seen(v: Array) -> Array:
        return times(error.T, times(gram, times(error, v)))

    def orthonormal(v: Array) -> Array:
        return jnp.linalg.qr(v)[0]

    # A fixed key of a fixed generator: the same prompt gives the same weights.
    key = jax.random.key(0, impl="threefry2x32")
    start = jax.random.normal(key, (d_out, width), jnp.float32)
    basis = jax.lax.fori_loop(
        0, rule.iterations, lambda _, v: orthonormal(seen(v)), orthonormal(seen(start))
    )
    _, vectors = jnp.linalg.eigh(times(basis.T, seen(basis)))
    top = times(basis, vectors[:, ::-1][:, :rank])
    return LowRank(times(error, top), top.T)

"""The channel scale: one positive number D per input channel, from the moments.

Scaling a channel up before rounding makes its relative error smaller; D divides the activation
at decoding, so the product is unchanged. Each rule is a frozen value with three members: `powers`,
the moments it reads; `shared`, whether the projections that read one input get one D; and a call
`(moments, trial) -> D`, where `trial(D)` is the activation-weighted error of quantizing with D.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ttq_jax.config import ConfigError
from ttq_jax.errors import check_fields
from ttq_jax.quant.moments import p_mean
from ttq_jax.types import Moments

Trial = Callable[[Float[Array, " d_in"]], Float[Array, ""]]

# A channel that is zero at every token could get D = 0. Its weights do not matter, but x / D must
# be finite.
_FLOOR = 1e-4

POWERS = (0.1, 8.0)
"""The smallest and the largest p. Float32 holds Σ |x|^p up to 1e38: at p = 8 that is 2000 tokens of
|x| = 20,000, and some channels do reach thousands. Below 0.1, (E|x|^p)^(1/p) overflows."""


def _check_power(p: float) -> None:
    """Refuses an exponent whose moments float32 cannot hold.

    Raises:
      ConfigError: it is outside `POWERS`.
    """
    if not POWERS[0] <= p <= POWERS[1]:
        raise ConfigError(
            f"scale.p: expected {POWERS[0]:g} to {POWERS[1]:g}, whose sums of |x|^p float32 holds; "
            f"got {p}"
        )


def _relative(moments: Moments, p: float) -> Float[Array, " d_in"]:
    """Channel p-means over their mean; ones if every input was zero."""
    m = p_mean(moments, p)
    mean = jnp.mean(m)
    return jnp.where(mean > 0, m / jnp.where(mean > 0, mean, 1.0), 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoScale:
    """D = 1: plain round-to-nearest."""

    shared: ClassVar[bool] = True

    @property
    def powers(self) -> tuple[float, ...]:
        """No moments are read."""
        return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """TTQ's closed form D_i = (m_i + λ)^α, with m the channel p-means relative to their mean.

    The paper fixes α = 0.5, p = 2, λ = 0.4 (arXiv:2603.19296). m is normalized by the token count
    and its own mean, so that D depends neither on the prompt's length nor on the unit of x.

    Attributes:
      alpha: α, exponent of the channel scale, in [0, 2].
      lam: λ >= 0, added to m, which is relative to its mean.
      p: exponent of the activation moment, in [0.1, 8].
    """

    alpha: float = 0.5
    lam: float = 0.4
    p: float = 2.0
    shared: ClassVar[bool] = True  # D follows from the moments alone

    def __post_init__(self):
        check_fields(self, ConfigError)
        if not (0 <= self.alpha <= 2 and 0 <= self.lam < math.inf):
            raise ConfigError(
                f"power-law scale: expected 0 <= alpha <= 2 and a finite lam >= 0; "
                f"got alpha={self.alpha}, lam={self.lam}"
            )
        _check_power(self.p)

    @property
    def powers(self) -> tuple[float, ...]:
        """The one moment of the formula."""
        return (self.p,)

    def __call__(self, moments: Moments, trial: Trial) -> Float[Array, " d_in"]:
        """D, positive."""
        del trial
        return jnp.maximum((_relative(moments, self.p) + self.lam) ** self.alpha, _FLOOR)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchedAlpha:
    """AWQ's scale D = m^α with α searched per layer (Lin et al., 2023).

    Our conventions (implementations differ): m is the mean magnitude, D is divided by
    sqrt(max D · min D), the loss is the diagonal activation-weighted weight error
    Σ E[x_i²] (W − Ŵ)², and α runs over i/steps for i = 0 … steps − 1, so that α = 0 (no scaling)
    is always a candidate.

    Attributes:
      steps: candidates, >= 1.
      p: exponent of the activation moment, in [0.1, 8].
      shared: whether projections that read one input get one α, by the sum of their errors.
    """

    steps: int = 20
    p: float = 1.0
    shared: bool = False

    def __post_init__(self):
        check_fields(self, ConfigError)
        if self.steps < 1:
            raise ConfigError(f"searched scale: expected steps >= 1, got {self.steps}")
        _check_power(self.p)

    @property
    def powers(self) -> tuple[float, ...]:
        """The moment that scales and the one that weighs the error."""
        return tuple(sorted({self.p, 2.0}))

    def candidate(self, moments: Moments, alpha: Float[Array, ""]) -> Float[Array, " d_in"]:
        """D for one α, centred so that its extremes are reciprocal."""
        d = jnp.maximum(_relative(moments, self.p), _FLOOR) ** alpha
        return d / jnp.sqrt(jnp.max(d) * jnp.min(d))

    def __call__(self, moments: Moments, trial: Trial) -> Float[Array, " d_in"]:
        """D of the α that leaves the smallest error, positive."""
        alphas = jnp.arange(self.steps, dtype=jnp.float32) / self.steps
        # Mapped, not vmapped: one candidate's temporaries at a time.
        errors = jax.lax.map(lambda a: trial(self.candidate(moments, a)), alphas)
        return self.candidate(moments, alphas[jax.lax.argmin(errors, 0, jnp.int32)])


ScaleRule = NoScale | PowerLaw | SearchedAlpha

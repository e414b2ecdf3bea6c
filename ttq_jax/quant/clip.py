"""Rounding with clip search: narrow a group's range where that lowers the output error.

Each group and column picks, from a few shrink factors of its range, the one with the smallest
activation-weighted error Σ_i h_i (w_i − ŵ_i)², h_i = E[x_i²]/D_i² (Lin et al., 2023, AutoAWQ's
search, there on layer outputs). The full range is always a candidate, so by this measure the search
is never worse than no search.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ttq_jax.config import ConfigError
from ttq_jax.errors import check_fields
from ttq_jax.quant.grid import Grid, decode, encode, fit_range

# One factor is tried after the other, and all are listed before.
_MOST_STEPS = 10_000


def shrink_factors(steps: int, smallest: float) -> tuple[float, ...]:
    """Evenly spaced factors on a group's range, from 1 down.

    Args:
      steps: how many, 1 to 10000.
      smallest: the last one, in (0, 1].

    Returns:
      The factors; (1,) for one step.

    Raises:
      ConfigError: a value outside its range.
    """
    if not 1 <= steps <= _MOST_STEPS or not 0 < smallest <= 1:
        raise ConfigError(
            f"clip search: expected steps >= 1, at most {_MOST_STEPS}, and 0 < smallest <= 1, got "
            f"{steps} and {smallest}"
        )
    step = (1.0 - smallest) / max(steps - 1, 1)
    return tuple(1.0 - i * step for i in range(steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipSearch:
    """Nearest rounding after a search over the groups' ranges.

    Attributes:
      steps: shrink factors tried, >= 1; the defaults are AutoAWQ's (1, 0.95, …, 0.55).
      smallest: the last factor tried, in (0, 1].
    """

    steps: int = 10
    smallest: float = 0.55
    powers: ClassVar[tuple[float, ...]] = (2.0,)  # weighs the error
    span: ClassVar[int] = 0

    def __post_init__(self):
        check_fields(self, ConfigError)
        shrink_factors(self.steps, self.smallest)

    @property
    def shrinks(self) -> tuple[float, ...]:
        """The factors on a group's range that are tried, the whole range first."""
        return shrink_factors(self.steps, self.smallest)


def search_ranges(
    groups: Float[Array, "n_group rows n"],
    importance: Float[Array, "n_group rows"],
    grid: Grid,
    shrinks: tuple[float, ...],
) -> tuple[Float[Array, "n_group n"], Float[Array, "n_group n"]]:
    """The search as plain JAX, for roundings without a kernel.

    Args:
      groups: scaled weights, float32.
      importance: h, what a squared error costs.
      grid: the codes' grid.
      shrinks: factors on a group's range; the first of equally good ones wins.

    Returns:
      (scales, zeros), float32 with the values that are stored.
    """
    low, high = jnp.min(groups, axis=1), jnp.max(groups, axis=1)
    if len(shrinks) == 1:
        return fit_range(low * shrinks[0], high * shrinks[0], grid)

    def error(shrink: Array) -> Array:
        scales, zeros = fit_range(low * shrink, high * shrink, grid)
        wrong = groups - decode(encode(groups, scales, zeros, grid), scales, zeros)
        return jnp.einsum("gr,grn->gn", importance, jnp.square(wrong), precision="highest")

    # Mapped, not vmapped: one candidate's temporaries at a time.
    factors = jnp.asarray(shrinks, jnp.float32)
    best = factors[jax.lax.argmin(jax.lax.map(error, factors), 0, jnp.int32)]
    return fit_range(low * best, high * best, grid)

"""Rounding with clip search: give up a group's extremes where that costs the output least.

Each group and column picks, from a few shrink factors of its range, the one with the smallest
activation-weighted error Σ_i h_i (w_i − ŵ_i)², h_i = E[x_i²]/D_i² (Lin et al., 2023, AutoAWQ's
search, there on layer outputs). The full range is always a candidate: by its own measure the
search never does worse than none.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from ttq_jax.config import ConfigError
from ttq_jax.quant.grid import Grid, decode, encode, fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipSearch:
    """Nearest rounding after a search over the groups' ranges.

    Attributes:
      steps: shrink factors tried, >= 1; the defaults are AutoAWQ's (1, 0.95, …, 0.55).
      smallest: the last factor tried, in (0, 1].
    """

    steps: int = 10
    smallest: float = 0.55

    def __post_init__(self):
        if self.steps < 1 or not 0 < self.smallest <= 1:
            raise ConfigError(
                f"clip search: expected steps >= 1 and 0 < smallest <= 1, "
                f"got {self.steps} and {self.smallest}"
            )

    @property
    def powers(self) -> tuple[float, ...]:
        """The moment that weighs the error."""
        return (2.0,)

    def __call__(
        self,
        groups: Float[Array, "n_group rows d_out"],
        importance: Float[Array, "n_group rows"] | None,
        grid: Grid,
    ) -> tuple[UInt8[Array, "n_group rows d_out"], Array, Array | None]:
        """(codes, scales, zeros).

        Args:
          groups: weights as they are rounded (scaled), float32.
          importance: h, the weight of each row's squared error; None weighs all rows alike.
          grid: the grid.

        Returns:
          Codes and the grid chosen per group and column.
        """
        h = jnp.ones(groups.shape[:2]) if importance is None else importance

        def error(shrink: Array) -> Array:
            scales, zeros = fit(groups, grid, shrink)
            rounded = decode(encode(groups, scales, zeros, grid), scales, zeros, grid)
            return jnp.sum(h[..., None] * jnp.square(groups - rounded), axis=1)

        def try_factor(
            best: tuple[Array, Array], shrink: Array
        ) -> tuple[tuple[Array, Array], None]:
            tried = error(shrink)
            better = tried < best[0]
            return (jnp.where(better, tried, best[0]), jnp.where(better, shrink, best[1])), None

        factors = jnp.linspace(1.0, self.smallest, self.steps)
        full = jnp.ones(groups.shape[::2])
        (_, shrink), _ = jax.lax.scan(try_factor, (error(full), full), factors[1:])
        scales, zeros = fit(groups, grid, shrink)
        return encode(groups, scales, zeros, grid), scales, zeros

"""Rounding with clip search: narrow a group's range where that lowers the output error.

Each group and column picks, from a few shrink factors of its range, the one with the smallest
activation-weighted error Σ_i h_i (w_i − ŵ_i)², h_i = E[x_i²]/D_i² (Lin et al., 2023, AutoAWQ's
search, there on layer outputs). The full range is always a candidate, so by this measure the search
is never worse than no search.

A range is a guess at the scale and the zero point. *Refits* fit both to the codes that it leads to,
and round again: see `pallas_kernels.search`, whose lines the kernels run, too.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from ttq_jax.config import ConfigError
from ttq_jax.errors import check_fields
from ttq_jax.quant.grid import Grid, encode, search_ranges, split_groups

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


def check_refits(refits: int) -> None:
    """Refuses a number of refits that is none.

    Args:
      refits: see `ClipSearch`.

    Raises:
      ConfigError: it is below 0 or above 100.
    """
    if not 0 <= refits <= 100:
        raise ConfigError(
            f"refits: expected 0 (none) to 100, got {refits}; after 2 to 4 little is left to gain"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipSearch:
    """Nearest rounding after a search over the groups' ranges.

    Attributes:
      steps: shrink factors tried, >= 1; the defaults are AutoAWQ's (1, 0.95, …, 0.55).
      smallest: the last factor tried, in (0, 1].
      refits: how often each candidate's scale and zero point are fitted to its codes, 0 to 100;
        on a symmetric grid the scale alone.
    """

    steps: int = 10
    smallest: float = 0.55
    refits: int = 0
    powers: ClassVar[tuple[float, ...]] = (2.0,)  # weighs the error
    span: ClassVar[int] = 0

    def __post_init__(self):
        check_fields(self, ConfigError)
        shrink_factors(self.steps, self.smallest)
        check_refits(self.refits)

    @property
    def shrinks(self) -> tuple[float, ...]:
        """The factors on a group's range that are tried, the whole range first."""
        return shrink_factors(self.steps, self.smallest)

    def round(
        self, w: Float[Array, "d_in n"], gram: Float[Array, "d_in 1 1"] | None, grid: Grid
    ) -> tuple[UInt8[Array, "k n"], Float[Array, "n_group n"], Float[Array, "n_group n"]]:
        """Codes of a scaled weight, see `SecondOrder.round`.

        Args:
          w: D · W.
          gram: E[x²] of x / D, a Gram matrix in blocks of one channel; None weighs all alike.
          grid: the codes' grid.

        Returns:
          (codes, scales, zeros).
        """
        rows = grid.rows_per_group(w.shape[0])
        groups = split_groups(w, rows)
        h = jnp.ones(w.shape[0], jnp.float32) if gram is None else gram[:, 0, 0]
        scales, zeros = search_ranges(
            groups, split_groups(h, rows), grid, self.shrinks, self.refits
        )
        codes = encode(groups, scales, zeros, grid).astype(jnp.uint8)
        return codes.reshape(-1, w.shape[1]), scales, zeros

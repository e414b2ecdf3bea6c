"""Rounding with clip search: give up a group's extremes where that costs the output least.

Each group and column picks, from a few shrink factors of its range, the one with the smallest
activation-weighted error Σ_i h_i (w_i − ŵ_i)², h_i = E[x_i²]/D_i² (Lin et al., 2023, AutoAWQ's
search, there on layer outputs). The full range is always a candidate: by its own measure the
search never does worse than none.
"""

import dataclasses

from ttq_jax.config import ConfigError


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

    @property
    def shrinks(self) -> tuple[float, ...]:
        """The factors on a group's range that are tried, the whole range first."""
        step = (1.0 - self.smallest) / max(self.steps - 1, 1)
        return tuple(1.0 - i * step for i in range(self.steps))

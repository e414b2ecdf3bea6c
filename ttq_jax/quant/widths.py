"""Mixed precision: rules that give some projections, or some of their layers, another grid."""

import dataclasses
import re

from ttq_jax.config import ConfigError
from ttq_jax.quant.grid import Grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Width:
    """A rule that sets the bits or the group size of what it selects.

    Attributes:
      select: regular expression; must match all of "layers/down" (a projection in every layer) or
        of "layers/3/down" (in one).
      bits: 2, 3, 4, 5 or 8; None changes nothing.
      group_size: as in `Grid`; None changes nothing.

    Raises:
      ConfigError: not a regular expression, or nothing to change.
    """

    select: str
    bits: int | None = None
    group_size: int | None = None

    def __post_init__(self):
        try:
            re.compile(self.select)
        except re.error as e:
            raise ConfigError(
                f"widths: not a regular expression: {self.select!r} ({e}); paths look like "
                "layers/down or layers/3/down"
            ) from e
        if self.bits is None and self.group_size is None:
            raise ConfigError(
                f"widths: expected bits or group_size for {self.select!r}, got neither"
            )
        self.applied(Grid())

    def matches(self, projection: str, layer: int) -> bool:
        """Whether it selects this projection of this layer."""
        paths = (f"layers/{projection}", f"layers/{layer}/{projection}")
        return any(re.fullmatch(self.select, path) for path in paths)

    def applied(self, grid: Grid) -> Grid:
        """The grid with the rule's changes."""
        return dataclasses.replace(
            grid,
            bits=grid.bits if self.bits is None else self.bits,
            group_size=grid.group_size if self.group_size is None else self.group_size,
        )


def grids_of(
    grid: Grid, rules: tuple[Width, ...], projection: str, n_layers: int
) -> tuple[Grid, ...]:
    """A projection's grid in every layer; of several rules that match, the last one counts.

    Args:
      grid: without rules.
      rules: in order.
      projection: "q", "down", ….
      n_layers: L.

    Returns:
      L grids.
    """
    grids = []
    for layer in range(n_layers):
        matching = [rule for rule in rules if rule.matches(projection, layer)]
        grids.append(matching[-1].applied(grid) if matching else grid)
    return tuple(grids)

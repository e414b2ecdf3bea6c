"""Mixed precision: rules that give some projections, or some of their layers, another grid."""

import dataclasses
import re

from ttq_jax.config import ConfigError
from ttq_jax.errors import shown
from ttq_jax.foreign import why
from ttq_jax.quant.grid import Grid


def check_pattern(what: str, pattern: str) -> None:
    """Refuses what is no regular expression of a path.

    Args:
      what: the setting that it is the value of.
      pattern: to check.

    Raises:
      ConfigError: it is none.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise ConfigError(
            f"{what}: not a regular expression: {shown(pattern)} ({why(e)}); paths look like "
            "layers/down or, in widths, layers/3/down"
        ) from e


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
        check_pattern("widths", self.select)
        if self.bits is None and self.group_size is None:
            raise ConfigError(
                f"widths: expected bits or group_size for {shown(self.select)}, got neither"
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

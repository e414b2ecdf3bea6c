"""Recipes: four independent choices and a grid, as one frozen value.

A recipe is static under jit: two equal recipes share one compiled program. The named presets are
data; a new method is a new row.
"""

import dataclasses
import re
from typing import Any

from ttq_jax.config import ConfigError
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.grid import Grid, Nearest
from ttq_jax.quant.lowrank import StaticLowRank
from ttq_jax.quant.scaling import NoScale, PowerLaw, ScaleRule, SearchedAlpha

Rounding = Nearest | ClipSearch

_CHOICES = {
    "moments": ("none", "corpus", "prompt"),
    "prefill": ("full", "quantized"),
    "batch": ("pooled", "per_prompt"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How weights are quantized.

    Attributes:
      moments: whose activations are looked at: nobody's, a calibration corpus's, this prompt's.
      scale: which channel scale.
      rounding: which rounding.
      low_rank: what is kept in full precision.
      grid: bits, groups and storage.
      prefill: "full": the prompt is read by the unquantized weights; "quantized": each layer's
        output already uses its quantized weight, so later layers see its error (the paper's).
      batch: "pooled": one weight tree from the moments of all prompts of a batch; "per_prompt":
        a tree for each.
      select: regular expression; a projection is quantized if its path ("layers/q", …) matches
        fully. The embedding and the head are never quantized.

    Raises:
      ConfigError: a value outside its range, or choices that need moments without any.
    """

    moments: str = "prompt"
    scale: ScaleRule = PowerLaw()
    rounding: Rounding = Nearest()
    low_rank: StaticLowRank = StaticLowRank()
    grid: Grid = Grid()
    prefill: str = "full"
    batch: str = "pooled"
    select: str = "layers/.*"

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.moments == "none" and self.scale.powers:
            raise ConfigError(
                f"a {type(self.scale).__name__} scale reads activation moments, but this recipe "
                "has none; set moments to 'prompt' or 'corpus', or the scale to NoScale()"
            )
        try:
            re.compile(self.select)
        except re.error as e:
            raise ConfigError(f"select: not a regular expression: {self.select!r} ({e})") from e

    @property
    def powers(self) -> tuple[float, ...]:
        """The moments that the scale and the rounding read, ascending."""
        if self.moments == "none":
            return ()
        return tuple(sorted({*self.scale.powers, *self.rounding.powers}))

    def selects(self, projection: str) -> bool:
        """Whether a projection ("q", "down", …) is quantized."""
        return re.fullmatch(self.select, f"layers/{projection}") is not None

    def describe(self) -> dict[str, Any]:
        """Every choice as plain JSON data, each axis with the name of its rule."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                rule = {} if field.name in {"grid", "low_rank"} else {"rule": type(value).__name__}
                value = {**rule, **dataclasses.asdict(value)}
            out[field.name] = value
        return out


PRESETS: dict[str, Recipe | None] = {
    "none": None,
    "rtn": Recipe(moments="none", scale=NoScale()),
    "awq": Recipe(moments="corpus", scale=SearchedAlpha()),
    "ttq": Recipe(),
}


def preset(
    name: str,
    *,
    bits: int = 4,
    group_size: int = 32,
    rank: int = 0,
    symmetric: bool = False,
    clip: bool = False,
    **choices: Any,
) -> Recipe | None:
    """A named recipe, with the usual knobs applied.

    Args:
      name: a key of `PRESETS`.
      bits: 2, 3, 4, 5 or 8.
      group_size: a positive multiple of 8, or -1 for the whole row.
      rank: of the static low-rank part, 0 for none.
      symmetric: no zero points.
      clip: search each group's range (`ClipSearch`) before rounding.
      **choices: further fields of `Recipe` (or of `Grid`), by name.

    Returns:
      The recipe; None for "none", which quantizes nothing.

    Raises:
      ConfigError: an unknown name or a value outside its range.
    """
    if name not in PRESETS:
        raise ConfigError(f"method: expected one of {', '.join(PRESETS)}, got {name!r}")
    of_grid = {f.name for f in dataclasses.fields(Grid)}
    grid = Grid(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        **{k: choices.pop(k) for k in list(choices) if k in of_grid},
    )
    low_rank = StaticLowRank(rank=rank)
    base = PRESETS[name]
    if base is None:
        return None
    if clip:
        choices.setdefault("rounding", ClipSearch())
    return dataclasses.replace(base, grid=grid, low_rank=low_rank, **choices)

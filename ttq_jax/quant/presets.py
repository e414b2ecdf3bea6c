"""The named recipes, as data: a new method is a new row."""

import dataclasses
from typing import Any

from ttq_jax.config import ConfigError
from ttq_jax.errors import shown
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.grid import Grid, Nearest
from ttq_jax.quant.half_quadratic import HalfQuadratic
from ttq_jax.quant.names import quantizes_nothing
from ttq_jax.quant.recipe import RULE_NAMES, Recipe
from ttq_jax.quant.scaling import NoScale, SearchedAlpha
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.quant.source import Source

# 4.3 stored bits per weight: a bit more per code gains more than narrower groups of the same cost,
# and zero points in eight bits more than a symmetric grid.
_WIDE = Grid(bits=4, group_size=64, scales="coded")
# It hardly changes a long prompt's moments; those of a short one are too noisy by themselves.
_BLEND = Source(prior="weights", prior_tokens=16.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A named recipe.

    Attributes:
      recipe: None quantizes nothing.
      about: what it is.
      cost: beyond reading the prompt.
      use: when to choose it.
    """

    recipe: Recipe | None
    about: str
    cost: str
    use: str


PRESETS: dict[str, Preset] = {
    "none": Preset(
        recipe=None,
        about="the unquantized model",
        cost="none",
        use="the baseline",
    ),
    "rtn": Preset(
        recipe=Recipe(moments="none", scale=NoScale()),
        about="round to nearest",
        cost="once per model",
        use="the baseline without activations",
    ),
    "hqq": Preset(
        recipe=Recipe(moments="none", scale=NoScale(), rounding=HalfQuadratic()),
        about="HQQ: half-quadratic zero points",
        cost="once per model",
        use="another baseline without activations",
    ),
    "awq": Preset(
        recipe=Recipe(moments="corpus", scale=SearchedAlpha()),
        about="AWQ: scale searched on a corpus",
        cost="calibration, once per model",
        use="offline baseline; needs --calibration",
    ),
    "gptq": Preset(
        recipe=Recipe(
            moments="corpus",
            scale=NoScale(),
            rounding=SecondOrder(steps=1, smallest=1.0, damping=0.01, static_groups=False),
        ),
        about="GPTQ: second-order rounding on a corpus",
        cost="calibration, once per model",
        use="offline baseline; needs --calibration",
    ),
    "paper": Preset(
        recipe=Recipe(prefill="quantized"),
        about="TTQ as published",
        cost="one read of the weights, shared with prefill",
        use="to compare with the paper (its r = 16: --rank 16)",
    ),
    "ttq": Preset(
        recipe=Recipe(),
        about="TTQ with the prompt read by the unquantized weights",
        cost="one read of the weights, shared with prefill",
        use="the cheapest per-prompt recipe",
    ),
    "fast": Preset(
        recipe=Recipe(
            moments=_BLEND,
            # Refits from the whole range leave less error than a search over ranges without. The
            # smallest range is for who asks for more steps.
            rounding=ClipSearch(steps=1, smallest=0.6, refits=4),
            grid=_WIDE,
            head=8,
        ),
        about="TTQ in groups of 64 with fitted scales and a prior",
        cost="as ttq, with more arithmetic per weight",
        use="the default",
    ),
    "best": Preset(
        recipe=Recipe(moments=_BLEND, rounding=SecondOrder(act_order=True), grid=_WIDE, head=8),
        about="second-order rounding from the prompt, groups of 64",
        cost="15 prefills of 256 tokens (CPU), at any length",
        use="for long answers or the best quality",
    ),
}


def preset(
    name: str,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    rank: int | None = None,
    symmetric: bool | None = None,
    clip: bool = False,
    **choices: Any,
) -> Recipe | None:
    """A named recipe with some settings changed; the others keep the preset's value.

    Args:
      name: a key of `PRESETS`.
      bits: 2, 3, 4, 5 or 8.
      group_size: a positive multiple of 8, or -1 for all input channels.
      rank: of the static low-rank part, 0 for none.
      symmetric: no zero points.
      clip: search each group's range (`ClipSearch`) before rounding to nearest.
      **choices: further fields of `Recipe` (or of `Grid`), by name.

    Returns:
      The recipe; None for "none", which quantizes nothing.

    Raises:
      ConfigError: an unknown name, a value outside its range, `clip` for another rounding, or any
        setting for "none".
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"recipe: expected one of {', '.join(PRESETS)}, got {shown(name)}")
    base = PRESETS[name].recipe
    given: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    if base is None:
        asked = {k for k, v in (given | choices | {"rank": rank}).items() if v is not None}
        if asked or clip:
            useless = min(asked, default="clip")
            raise ConfigError(quantizes_nothing(name, f"{useless} has no effect"))
        return None
    of_grid = {f.name for f in dataclasses.fields(Grid)}
    given |= {k: choices.pop(k) for k in list(choices) if k in of_grid}
    given = {k: v for k, v in given.items() if v is not None}
    low_rank = choices.pop("low_rank", base.low_rank)
    if rank is not None:
        low_rank = dataclasses.replace(low_rank, rank=rank)
    if clip:
        check_clip(name, base)
        choices.setdefault("rounding", ClipSearch())
    grid = dataclasses.replace(choices.pop("grid", base.grid), **given)
    return dataclasses.replace(base, grid=grid, low_rank=low_rank, **choices)


def check_clip(name: str, base: Recipe) -> None:
    """Refuses a clip search that would replace a recipe's own rounding.

    Args:
      name: the recipe's.
      base: the recipe.

    Raises:
      ConfigError: it does not round to nearest.
    """
    if not isinstance(base.rounding, Nearest | ClipSearch):
        raise ConfigError(
            f"clip (--clip) needs rounding to nearest, but the rounding of recipe {name} is "
            f"{RULE_NAMES[type(base.rounding)]}; change that rule's own settings "
            "(rounding.steps=10, …) or set rounding=clip"
        )

"""Recipes: four independent choices and a grid, as one frozen value.

A recipe is static under jit: two equal recipes share one compiled program. The named presets are
data; a new method is a new row.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any, TypeGuard

from ttq_jax.config import ConfigError
from ttq_jax.errors import check_fields, shown
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.grid import BITS, Grid, Nearest
from ttq_jax.quant.half_quadratic import HalfQuadratic
from ttq_jax.quant.lowrank import LowRankRule
from ttq_jax.quant.moments import Reads
from ttq_jax.quant.names import PREFILLS
from ttq_jax.quant.scaling import NoScale, PowerLaw, ScaleRule, SearchedAlpha
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.quant.source import Source
from ttq_jax.quant.streams import Correction
from ttq_jax.quant.widths import Width, check_pattern, grids_of

KernelRounding = Nearest | ClipSearch
Rounding = KernelRounding | SecondOrder | HalfQuadratic

# What makes an object one of a recipe's axes: rules of the user's own have it too.
_MEMBERS = {
    "moments": ("of", "prior"), "scale": ("powers", "shared"), "rounding": ("powers", "span"),
    "low_rank": ("rank", "total"), "grid": ("bits", "rows_per_group"),
}  # fmt: skip
_DEFAULTS = {
    "moments": Source(), "scale": PowerLaw(), "rounding": Nearest(), "low_rank": LowRankRule(),
    "grid": Grid(),
}  # fmt: skip
# Stores and rows from before there was such a choice say nothing of it.
_ADDED: dict[str, dict[str, Any]] = {
    "grid": {"scales": "float"}, "rounding": {"refits": 0, "descents": 0},
    "low_rank": {"mean": False},
}  # fmt: skip
_CHOICES = {"prefill": PREFILLS, "batch": ("pooled", "per_prompt")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How weights are quantized.

    Attributes:
      moments: whose activation moments are used; a string is short for `Source(of=…)`.
      scale: the rule for the channel scale.
      rounding: the rule for the codes.
      low_rank: the low-rank part beside the codes.
      grid: bits, groups and storage.
      widths: rules that change the grid of some projections or layers; the last match counts.
      prefill: "full": the unquantized weights read the prompt; "quantized": each layer reads it
        with its own quantized weights, so later layers see the error (as in the paper); "both":
        as "full", but each layer is quantized for what the quantized layers before it make of the
        prompt, see `correction`. It reads the prompt twice.
      correction: how each weight makes up for the error of the layers before it, with "both".
      batch: "pooled": one weight tree from the moments of all prompts of a batch; "per_prompt":
        one tree per prompt.
      select: regular expression; a projection is quantized if its path ("layers/q", …) matches
        fully.
      head: bits per code of the embedding and the head, which are rounded to nearest before any
        prompt: 2, 3, 4, 5 or 8; None leaves them as they are.

    Raises:
      ConfigError: a value outside its range, or choices that do not go together.
    """

    moments: Source | str = Source()
    scale: ScaleRule = PowerLaw()
    rounding: Rounding = Nearest()
    low_rank: LowRankRule = LowRankRule()
    grid: Grid = Grid()
    widths: tuple[Width, ...] = ()
    prefill: str = "full"
    correction: Correction = Correction()
    batch: str = "pooled"
    select: str = "layers/.*"
    head: int | None = None

    def __post_init__(self):
        check_fields(self, ConfigError)
        if isinstance(self.moments, str):
            object.__setattr__(self, "moments", Source(of=self.moments))
        for name, members in _MEMBERS.items():
            value = getattr(self, name)
            if missing := [member for member in members if not hasattr(value, member)]:
                raise ConfigError(
                    f"{name}: expected an object such as {_DEFAULTS[name]}, which has "
                    f"{missing[0]!r}; got {shown(value)}"
                )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name}: expected one of {', '.join(allowed)}, got "
                    f"{shown(getattr(self, name))}"
                )
        if self.head is not None and self.head not in BITS:
            raise ConfigError(
                f"head: expected one of {', '.join(map(str, BITS))}, or none (None), got "
                f"{shown(self.head)}"
            )
        self._check_moments()
        check_pattern("select", self.select)

    def _check_moments(self) -> None:
        """Refuses choices that read moments which this recipe does not have.

        Raises:
          ConfigError: they do.
        """
        source = self.source
        if self.prefill == "both" and (source.of != "prompt" or source.refresh):
            raise ConfigError(
                "prefill = 'both' needs moments of the prompt and no refresh, because weights are "
                f"quantized for the prompt while it is read; got moments.of = {source.of!r} and "
                f"refresh = {source.refresh}; choose prefill = 'full'"
            )
        if self.prefill != "both" and self.correction != Correction():
            raise ConfigError(
                "correction is read by prefill = 'both', got "
                f"prefill = {self.prefill!r}; choose that, or leave correction out"
            )
        readers = {
            f"a {type(self.scale).__name__} scale": bool(self.scale.powers),
            "second-order rounding": bool(self.rounding.span),
            "low_rank.error_rank": bool(self.low_rank.error_rank),
            "low_rank.mean": self.low_rank.mean,
        }
        for what, reads in readers.items():
            if source.of == "none" and reads:
                raise ConfigError(
                    f"{what} reads activation moments, but this recipe has none; set moments.of to "
                    "'prompt' or 'corpus', or choose a rule that reads none"
                )
        if self.low_rank.weighted and not self.reads_offline:
            raise ConfigError(
                "low_rank.weighted needs the moments of a corpus or of a prior, which exist before "
                "any prompt, but this recipe has none; set moments.of to 'corpus', or moments.prior"
            )
        if source.decay and self.batch != "pooled":
            raise ConfigError(
                "moments.decay needs batch = 'pooled', because a conversation has one set of "
                f"moments; got batch = {self.batch!r}"
            )

    @property
    def source(self) -> Source:
        """The source of the moments."""
        assert isinstance(self.moments, Source)
        return self.moments

    @property
    def reads_offline(self) -> bool:
        """Whether the recipe needs moments from before any prompt."""
        return self.source.of == "corpus" or self.source.prior != "none"

    @property
    def reads(self) -> Reads:
        """The moments that the scale, the rounding and the low rank read."""
        if self.source.of == "none":
            return Reads()
        second = {2.0} if self.low_rank.weighted else set()
        spans = {self.rounding.span, self.low_rank.span}
        return Reads(
            powers=tuple(sorted({*self.scale.powers, *self.rounding.powers, *second})),
            span=-1 if -1 in spans else max(spans),
            first=self.low_rank.mean,
        )

    def selects(self, projection: str) -> bool:
        """Whether a projection ("q", "down", …) is quantized."""
        return re.fullmatch(self.select, f"layers/{projection}") is not None

    def selected(self, projections: Iterable[str]) -> list[str]:
        """Those of the projections that are quantized, at least one.

        Raises:
          ConfigError: there is none.
        """
        names = list(projections)
        found = [name for name in names if self.selects(name)]
        if not found:
            paths = ", ".join(f"layers/{name}" for name in names)
            raise ConfigError(
                f"select: expected a match with one of {paths}, got {shown(self.select)}"
            )
        return found

    def grids(self, projection: str, n_layers: int) -> tuple[Grid, ...]:
        """The projection's grid in every layer."""
        return grids_of(self.grid, self.widths, projection, n_layers)

    def describe(self) -> dict[str, Any]:
        """Every choice as plain JSON data, each axis with the name of its rule."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                value = [dataclasses.asdict(rule) for rule in value]
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                rule = {"rule": RULE_NAMES[type(value)]} if type(value) in RULE_NAMES else {}
                added = _ADDED.get(field.name, {})
                knobs = {
                    k: v
                    for k, v in dataclasses.asdict(value).items()
                    if k not in added or v != added[k]
                }
                # JSON has no infinity.
                value = rule | {k: "inf" if v == math.inf else v for k, v in knobs.items()}
            if field.name == "correction" and self.prefill != "both":
                continue
            if field.name != "head" or value is not None:
                out[field.name] = value
        return out


RULES: dict[str, dict[str, type]] = {
    "scale": {"none": NoScale, "power_law": PowerLaw, "searched": SearchedAlpha},
    "rounding": {
        "nearest": Nearest,
        "clip": ClipSearch,
        "second_order": SecondOrder,
        "half_quadratic": HalfQuadratic,
    },
}
"""The axes that choose between rules, each with its own settings."""


def has_kernel(rounding: Any) -> TypeGuard[KernelRounding]:
    """Whether kernels round so; the others are plain JAX."""
    return isinstance(rounding, Nearest | ClipSearch)


RULE_NAMES = {rule: name for rules in RULES.values() for name, rule in rules.items()}

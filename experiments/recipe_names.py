"""Recipes by short names, as `fast-3-g32-h0-p5-f4`, for the commands that compare many."""

from typing import Any

import ttq_jax as ttq
from ttq_jax.quant.grid import SCALES
from ttq_jax.quant.presets import PRESETS
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.scaling import NoScale
from ttq_jax.quant.source import Source

NAMES = (
    "FILE.toml or "
    "PRESET[-BITS][-gGROUP][-rRANK][-sym|-asym][-coded|-coded4|-float][-hHEAD][-nTOKENS|-sTOKENS]"
    "[-unscaled][-mean][-pSTEPS][-fREFITS][-dDESCENTS][-mTENTHS][-full|-quantized|-both]"
    "[-aTENTHS][-kTENTHS][@CALIBRATION]; h0 leaves the head as it is; a prior worth so many "
    "tokens, n from the weights (0 for none), s from samples; unscaled has no channel scale; mean "
    "corrects what the mean input makes of the error; p, f, d and m (damping) are of the rounding, "
    "a (strength) and k (damping) of the correction"
)

_SHORT = {"g": "group_size", "r": "rank"}
_PRIORS = {"n": "weights", "s": "samples"}
_SETTINGS = {
    "p": ("rounding.steps", 1), "f": ("rounding.refits", 1), "d": ("rounding.descents", 1),
    "m": ("rounding.damping", 10),
    "a": ("correction.strength", 10), "k": ("correction.damping", 10),
}  # fmt: skip


def recipe_named(name: str) -> Recipe | None:
    """The recipe of a name as in `NAMES`: `paper-3-r16`, `best-4-g192-sym`, `awq-3@c4`."""
    if name.endswith(".toml"):
        return ttq.load_recipe(name)
    base, *rest = name.split("@")[0].split("-")
    given: dict[str, Any] = {}
    settings = []
    for part in rest:
        letter, number = part[0], part[1:]
        if part in {"sym", "asym"}:
            given["symmetric"] = part == "sym"
        elif part in SCALES:
            given["scales"] = part
        elif part in {"full", "quantized", "both"}:
            given["prefill"] = part
        elif part == "unscaled":
            given["scale"] = NoScale()
        elif part == "mean":
            settings.append("low_rank.mean=true")
        elif part.isdigit():
            given["bits"] = int(part)
        elif letter == "h" and number.isdigit():
            given["head"] = int(number) or None
        elif letter in _SHORT and number.isdigit():
            given[_SHORT[letter]] = int(number)
        elif letter in _PRIORS and number.isdigit():
            prior = _PRIORS[letter] if int(number) else "none"
            given["moments"] = Source(prior=prior, prior_tokens=float(number))
        elif letter in _SETTINGS and number.isdigit():
            field, parts = _SETTINGS[letter]
            settings.append(f"{field}={int(number) / parts:g}")
        else:
            base = ""
    if base not in PRESETS:
        raise SystemExit(f"recipe {name!r}: expected {NAMES}; PRESET one of {', '.join(PRESETS)}")
    recipe = ttq.preset(base, **given)
    return ttq.with_settings(recipe, settings) if settings else recipe

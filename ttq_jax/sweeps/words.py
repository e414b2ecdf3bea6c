"""What tables and pictures call things: models, methods, settings and numbers, in words."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ttq_jax.checkpoint.packaged import CONTENTS
from ttq_jax.sweeps.rows import Row

_METHODS = {
    "none": "unquantized", "rtn": "RTN", "hqq": "HQQ", "awq": "AWQ", "gptq": "GPTQ",
    "paper": "TTQ as published", "ttq": "TTQ",
}  # fmt: skip
_CORPORA = {"wikitext2": "WikiText-2", "ptb": "PTB", "c4": "C4", "gsm8k": "GSM8K"}
_SETTINGS = {
    "bits": "{}-bit", "group_size": "groups of {}", "rank": "rank {}", "alpha": "α {}",
    "lam": "λ {}", "p": "p {}", "prefill": "{} prefill", "dtype": "{} activations",
    "seed": "windows drawn by seed {}", "protocol": "{} protocol", "window": "windows of {}",
    "prompt_tokens": "prompts of {}", "max_windows": "up to {} windows per corpus",
    "zero_point": "{} zero points", "store_dtype": "scales in {}", "select": "only {}",
    "head": "{}-bit head",
}  # fmt: skip
_SPECIAL = {
    ("group_size", -1): "whole rows", ("symmetric", True): "symmetric",
    ("symmetric", False): "with zero points", ("clip", True): "clip search",
    ("scales", "float"): "floating-point scales", ("scales", "coded"): "coded scales",
    ("scales", "coded4"): "scales coded in 4 bits",
    ("clip", False): "no clip search", ("rank", 0): "no ranks",
    ("head", "none"): "unquantized head",
}  # fmt: skip
AXES = {
    "bits": "bits", "group_size": "group size", "rank": "rank", "lam": "λ", "alpha": "α", "p": "p",
    "calibration": "calibration corpus", "calibration_tokens": "calibration tokens",
    "prompt_tokens": "prompt length", "max_windows": "windows per corpus",
}  # fmt: skip


def method(name: str) -> str:
    """A recipe's name: a method's abbreviation, a file's stem, or as it is."""
    return _METHODS.get(name, Path(name).stem if name.endswith(".toml") else name)


def corpus(name: str) -> str:
    """A corpus by its usual spelling."""
    bare = name.removeprefix("hf:")
    return _CORPORA.get(bare, bare)


def axis(name: str) -> str:
    """An axis in words."""
    return AXES.get(name, name.replace("_", " "))


def value(axis: str, given: Any) -> str:
    """A setting in words, as in "groups of 64"."""
    if (axis, given) in _SPECIAL:
        return _SPECIAL[axis, given]
    number = isinstance(given, int | float) and not isinstance(given, bool)
    told = f"{given:.12g}" if number else str(given)
    return _SETTINGS.get(axis, f"{axis.replace('_', ' ')} {{}}").format(told)


def label(values: Mapping[str, Any], axes: Iterable[str]) -> str:
    """A recipe and its values on these axes, as in "GPTQ calibrated on C4, 4-bit, groups of 64".

    Args:
      values: of a cell.
      axes: those that are said, if the cell has them.

    Returns:
      One line.
    """
    told = {axis: values[axis] for axis in axes if axis in values}
    tokens, on = told.pop("calibration_tokens", None), told.pop("calibration", None)
    said = method(str(values["recipe"]))
    if tokens is not None or on is not None:
        parts = [f"{tokens} tokens" if tokens is not None else "", corpus(on) if on else ""]
        said += f" calibrated on {' of '.join(filter(None, parts))}"
    return ", ".join([said, *(value(axis, one) for axis, one in told.items())])


def model_of(row: Row) -> tuple[str, str]:
    """(name, how its file was quantized) of a row's model; "" for a file that was not.

    Only what the row says, and what is known of the packaged aliases.
    """
    alias = str(row["cell"]["model"])
    title, known = CONTENTS.get(alias, (alias, ""))
    said = row.get("model")
    return title, (said.get("format", known) or "") if isinstance(said, dict) else known


def model(row: Row) -> str:
    """A row's model, as in "SmolLM2-135M-Instruct, Q4_1 file"."""
    return titled(*model_of(row))


def titled(name: str, quantized: str) -> str:
    """A model's name, with the format of a file that is itself quantized."""
    return f"{name}, {quantized} file" if quantized else name


def spoils(quantized: str) -> str:
    """One sentence on what a quantized file spoils.

    Args:
      quantized: the format of its file.
    """
    grid = file_grid(quantized)
    on = (
        f"to that grid ({grid[0]}-bit, groups of {grid[1]} or of a part of it)"
        if grid
        else "to grids like its own"
    )
    return (
        f"Its weights were already rounded in the file ({quantized}), so rounding them {on} "
        "costs next to nothing: such a result says nothing about a method."
    )


def file_grid(quantized: str) -> tuple[int, int] | None:
    """(bits, group size) of a file's only grid; None if it has several, or none."""
    plain = re.fullmatch(r"Q(\d)_[01]", quantized)
    return (int(plain[1]), 32) if plain else None


def fixed(number: float, digits: int) -> str:
    """A number with so many decimals; no minus before zeros."""
    text = f"{number:.{digits}f}"
    return text.removeprefix("-") if not text.strip("-0.") else text


def column(numbers: Sequence[float | None], digits: int) -> list[str]:
    """A column of numbers, all with the same decimals; one less where one needs four figures.

    Args:
      numbers: None is an empty cell.
      digits: decimals.

    Returns:
      As many cells.
    """
    most = max((abs(n) for n in numbers if n is not None), default=0.0)
    digits -= digits > 0 and most >= 1000
    return ["" if n is None else fixed(n, digits) for n in numbers]


def gaps(numbers: Sequence[float | None]) -> list[str]:
    """A column of gaps, all with three decimals; None is an empty cell."""
    return ["" if n is None else fixed(n, 3) for n in numbers]


def count(numbers: Iterable[int], what: str) -> str:
    """As in "4 windows", "2 to 4 windows"."""
    low, *rest = sorted(set(numbers))
    span = f"{low} to {rest[-1]}" if rest else f"{low}"
    return f"{span} {what}" + ("s" if rest or low != 1 else "")

"""Rows from a file that somebody may have edited, or another version written -> rows to report on.

What a report reads is checked here, once. What older versions did not write is left out, never
guessed: `model` and `model_bits` are such, and whatever else is optional below.
"""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

from ttq_jax.config import ConfigError
from ttq_jax.evaluation.acceptance import MEASURES
from ttq_jax.quant.names import PREFILLS
from ttq_jax.sweeps.rows import Row

Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    # An integer of hundreds of digits is no float.
    return type(value) in {int, float} and abs(value) <= sys.float_info.max


def _count(value: Any) -> bool:
    return _whole(value) and value > 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _some(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _flat(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _dict_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _agreement(value: Any) -> bool:
    if not isinstance(value, dict) or not _count(value.get("compared")):
        return False
    found = [value.get(name) for name in MEASURES]
    return all(isinstance(v, list) and v and all(map(_number, v)) for v in found)


# Field -> (what it may be, in words; whether it must be there).
Schema = dict[str, tuple[Check, str, bool]]

_ROW: Schema = {
    "key": (_some, "a text", True),
    "cell": (_dict_of(_flat), "texts, numbers and booleans by name", True),
    "recipe": (_maybe(_dict_of(lambda _: True)), "a recipe, or null", True),
    "device": (_text, "a text", True),
    "versions": (_dict_of(_text), "texts by package", True),
    "finished": (_text, "a date", True),
    "git_commit": (_maybe(_text), "a text, or null", False),
    "model": (_dict_of(lambda _: True), "what is known of the model, by name", False),
}
_CELL: Schema = {
    "model": (_some, "a text", True), "corpus": (_some, "a text", True),
    "recipe": (_some, "a text", True), "protocol": (_some, "causal or window", True),
    "window": (_count, "a count", True), "prompt_tokens": (_count, "a count", False),
    "max_windows": (_count, "a count", False), "calibration": (_some, "a text", False),
    "calibration_tokens": (_count, "a count", False),
}  # fmt: skip
_FINISHED: Schema = {
    "nll": (lambda v: isinstance(v, list) and bool(v) and all(map(_number, v)),
            "a list of finite numbers", True),
    "scored": (_count, "a count", True), "windows": (_count, "a count", True),
    "perplexity": (_positive, "a finite number above 0", True),
    "effective_bits": (_positive, "a finite number above 0", True),
    "model_bits": (_positive, "a finite number above 0", False),
    "bytes_per_token": (_count, "a count", False),
    "acceptance": (_agreement, "lists of one number per window by measure, and compared", False),
    "seconds": (_dict_of(_number), "numbers by name", False),
    "peak_memory_bytes": (_maybe(_number), "a number, or null", False),
    "corpus_sha256": (_maybe(_text), "a text, or null", False),
    "calibration_sha256": (_maybe(_text), "a text, or null", False),
}  # fmt: skip
_RECIPE: Schema = {
    "grid": (_dict_of(lambda _: True), "a table", True),
    "low_rank": (_dict_of(lambda _: True), "a table", True),
    "scale": (_dict_of(lambda _: True), "a table", True),
    "prefill": (lambda v: v in PREFILLS, " or ".join(PREFILLS), False),
}
_GRID: Schema = {
    "bits": (_count, "a count", True), "group_size": (_whole, "an integer", True),
    "symmetric": (lambda v: isinstance(v, bool), "true or false", True),
}  # fmt: skip
_LOW_RANK: Schema = {"rank": (_whole, "an integer", True)}
_MODEL: Schema = {"format": (_maybe(_text), "a text, or null", False)}


def checked(rows: Iterable[Row], where: str) -> list[Row]:
    """The rows, each as a report needs it.

    Args:
      rows: from `read_rows`.
      where: their directory, for messages.

    Returns:
      The same rows.

    Raises:
      ConfigError: a row lacks something, has something else in its place, or contradicts itself.
    """
    return [_checked(row, where) for row in rows]


def _checked(row: Row, where: str) -> Row:
    place = f"{where}: the row with key {str(row.get('key'))[:40]}"
    _fields(row, _ROW, place)
    _fields(row["cell"], _CELL, f"{place}: cell")
    _fields(row.get("model", {}), _MODEL, f"{place}: model")
    if "error" in row:
        _fields(row, {"error": (_text, "a text", True)}, place)
        return row
    _fields(row, _FINISHED, place)
    if (row["recipe"] is None) != (row["cell"]["recipe"] == "none"):
        raise ConfigError(f"{place}: expected a recipe, or null for the recipe none; {_AGAIN}")
    if row["recipe"] is not None:
        _fields(row["recipe"], _RECIPE, f"{place}: recipe")
        _fields(row["recipe"]["grid"], _GRID, f"{place}: grid")
        _fields(row["recipe"]["low_rank"], _LOW_RANK, f"{place}: low_rank")
    if row["cell"]["protocol"] == "causal" and "prompt_tokens" not in row["cell"]:
        raise ConfigError(f"{place}: expected prompt_tokens in a causal cell; {_AGAIN}")
    if row.get("calibration_sha256") and "calibration" not in row["cell"]:
        raise ConfigError(f"{place}: expected the calibration corpus that has a sha256; {_AGAIN}")
    _agrees(row, place)
    return row


_AGAIN = "remove that line, and ttq sweep measures it again"


def _agrees(row: Row, place: str) -> None:
    """Checks that the perplexity is the windows'.

    Raises:
      ConfigError: it is not.
    """
    if len(row["nll"]) != row["windows"]:
        raise ConfigError(
            f"{place}: expected one nll for each of {row['windows']} windows, got "
            f"{len(row['nll'])}; {_AGAIN}"
        )
    mean = sum(row["nll"]) / row["scored"] / row["windows"]
    if not math.isclose(mean, math.log(row["perplexity"]), rel_tol=1e-6, abs_tol=1e-6):
        raise ConfigError(
            f"{place}: expected the perplexity of its nll, {math.exp(min(mean, 700)):.6g}, got "
            f"{row['perplexity']:.6g}; {_AGAIN}"
        )


def _fields(data: dict[str, Any], schema: Schema, place: str) -> None:
    """Checks fields.

    Raises:
      ConfigError: one is missing, or is not what it should be.
    """
    for name, (check, expected, needed) in schema.items():
        if name not in data:
            if needed:
                raise ConfigError(f"{place}: expected {name} ({expected}), found none; {_AGAIN}")
        elif not check(data[name]):
            raise ConfigError(
                f"{place}: {name}: expected {expected}, got {repr(data[name])[:80]}; {_AGAIN}"
            )

"""Files that nobody vouches for: what they may hold is written down, and checked before it is used.

A schema is data. A type stands for itself (no bool is an int, and a float is finite, an int too); a
`range` for an integer in it; a set of texts for one of them; None for null; `object` for anything.
A tuple lists alternatives; [schema] is a list; {"*": schema} an object of equal values; and
{"name": schema, "other?": schema} an object in which "other" may be missing and further names are
ignored.
"""

import json
import math
import os
import stat
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ttq_jax.errors import shown

Schema = Any

COUNT = range(2**31)
"""Sizes, ids and indices: what 32 bits hold."""

# The deepest published file, a tokenizer.json, has 8 levels.
_DEEPEST = 64
_BYTES = 2**24

_WORDS = {
    str: "a text", bool: "true or false", int: "an integer", float: "a finite number",
    dict: "an object", list: "a list", type(None): "null", object: "anything",
}  # fmt: skip


def named(names: Iterable[str]) -> str:
    """A few of many names, for a message."""
    known = [name if len(name) <= 80 else f"{name[:79]}…" for name in names]
    more = f" and {len(known) - 5} more" if len(known) > 5 else ""
    return " ".join(f"{', '.join(known[:5])}{more}".split())


def why(error: BaseException) -> str:
    """What another library says of a file, on one line: at most 200 characters of it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


def is_file(path: Path) -> bool:
    """Whether a path leads to a file: no directory, and no pipe or device, which may never end."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):  # a name with a null byte is a ValueError
        return False


def is_inside(name: str) -> bool:
    """Whether a relative path, as a file gives it, stays inside the directory of that file.

    Links are followed wherever they lead: a hub's cache is made of them, and a name makes none.
    """
    path = Path(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def read_bytes(path: Path, error: type[ValueError], most: int = _BYTES) -> bytes:
    """A small file.

    Args:
      path: of the file.
      error: what is raised.
      most: bytes that it may have.

    Returns:
      Its content.

    Raises:
      ValueError: as `error`; there is none, it is no file, it is too large, or unreadable.
    """
    try:
        if path.exists() and not is_file(path):
            raise error(f"{path}: expected a file, found a directory, a pipe or a device")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise error(f"{path}: expected at most {most} bytes, found {size}")
            return file.read(size)
    except FileNotFoundError as e:
        raise error(f"{path}: expected this file, found none") from e
    except OSError as e:
        raise error(f"{path}: cannot be read ({e.strerror})") from e


def parse_json(text: bytes | str, where: str, error: type[ValueError]) -> Any:
    """A JSON value that is what it seems to be.

    Args:
      text: UTF-8, with or without a byte-order mark.
      where: its file, for the message.
      error: what is raised.

    Returns:
      The value.

    Raises:
      ValueError: as `error`; no JSON, or a key twice, NaN, infinity, half a character, a number
        that no computer holds, or too many levels.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {shown(twice)} is there twice")
        return made

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no number in JSON")

    def finite(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            raise ValueError(f"no computer holds the number {shown(digits)}")
        return number

    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(
            text, object_pairs_hook=once, parse_constant=no_number, parse_float=finite
        )
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        raise error(f"{where}: expected valid JSON: {why(e)}. Download or write it again") from e
    _check_depth(value, where, error)
    return value


def parse_toml(text: str, where: str, error: type[ValueError]) -> dict[str, Any]:
    """TOML data of a bounded depth.

    Args:
      text: to read.
      where: its file, for the message.
      error: what is raised.

    Returns:
      The data.

    Raises:
      ValueError: as `error`; not TOML, or too many levels. The message names the line.
    """
    try:
        data = tomllib.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as e:
        at_end = f"at line {len(text.splitlines())}, its end"
        raise error(f"{where}: not TOML: {why(e).replace('at end of document', at_end)}") from e
    _check_depth(data, where, error)
    return data


def _check_depth(value: Any, where: str, error: type[ValueError]) -> None:
    """Refuses what a recursive function cannot walk.

    Raises:
      ValueError: as `error`.
    """
    level = [value]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for one in level:
            below += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        level = [one for one in below if isinstance(one, dict | list)]
        if not level:
            return
    raise error(f"{where}: expected at most {_DEEPEST} levels of nesting, found more")


def read_json(
    path: Path, error: type[ValueError], schema: Schema = dict, *, most: int = _BYTES
) -> Any:
    """A JSON file that fits a schema.

    Args:
      path: of the file.
      error: what is raised.
      schema: see the module's docstring.
      most: bytes that it may have.

    Returns:
      The value.
    """
    value = parse_json(read_bytes(path, error, most), str(path), error)
    check(value, schema, str(path), error)
    return value


def check(value: Any, schema: Schema, where: str, error: type[ValueError]) -> None:
    """Refuses a value that does not fit.

    Args:
      value: to check.
      schema: see the module's docstring.
      where: its file, for the message.
      error: what is raised.

    Raises:
      ValueError: as `error`; the message names the place, what is expected there and what came.
    """
    if wrong := _misfit(value, schema, ""):
        raise error(f"{where}: {wrong}")


def _misfit(value: Any, schema: Schema, at: str) -> str:
    """What does not fit, "" if all does."""
    if _fits_itself(value, schema):
        return ""
    wrongs = []
    for one in schema if isinstance(schema, tuple) else (schema,):
        if isinstance(one, dict) and isinstance(value, dict):
            wrongs.append(_misfit_inside(value, one, at))
        elif isinstance(one, list) and isinstance(value, list):
            found = (_misfit(each, one[0], f"{at}[{i}]") for i, each in enumerate(value))
            wrongs.append(next(filter(None, found), ""))
    if wrongs:
        # Of several alternatives the one that fits furthest was meant.
        return "" if "" in wrongs else max(wrongs, key=_depth)
    return f"{at or 'its content'}: expected {_said(schema)}, got {shown(value)}"


def _depth(wrong: str) -> int:
    """How deep the place lies that a complaint names."""
    return wrong.partition(":")[0].count(".")


def _misfit_inside(value: dict[str, Any], schema: dict[str, Schema], at: str) -> str:
    """What does not fit inside an object, "" if all does."""
    if "*" in schema:
        inside = ((key, each, schema["*"]) for key, each in value.items())
    else:
        absent = [key for key in schema if not key.endswith("?") and key not in value]
        if absent:
            return f"{at or 'its content'}: expected the key {absent[0]!r}, found none"
        names = {key.removesuffix("?"): one for key, one in schema.items()}
        inside = ((key, value[key], one) for key, one in names.items() if key in value)
    dot = f"{at}." if at else ""
    found = (_misfit(each, one, f"{dot}{key[:80]}") for key, each, one in inside)
    return next(filter(None, found), "")


def _fits_itself(value: Any, schema: Schema) -> bool:
    """Whether a value fits without a look inside it."""
    if isinstance(schema, tuple):
        return any(_fits_itself(value, one) for one in schema)
    if isinstance(schema, range):
        return type(value) is int and value in schema
    if isinstance(schema, frozenset | set):
        return isinstance(value, str) and value in schema
    if schema is float:
        return type(value) in {int, float} and abs(value) <= sys.float_info.max
    return value is None if schema is None else schema is object or type(value) is schema


def _said(schema: Schema) -> str:
    """A schema in words."""
    if isinstance(schema, tuple):
        return " or ".join(map(_said, schema))
    if isinstance(schema, range):
        return f"an integer from {schema.start} to {schema.stop - 1}"
    if isinstance(schema, frozenset | set):
        return " or ".join(sorted(map(repr, schema)))
    return _WORDS[schema if isinstance(schema, type) else type(schema)]

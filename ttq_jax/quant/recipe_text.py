"""Recipes as text: settings on a command line, TOML files.

Both are read by one function, from the fields and types of the dataclasses that make up a recipe.
So a field that is added there can be set and saved without more code.
"""

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from ttq_jax.config import ConfigError
from ttq_jax.errors import expect, shown
from ttq_jax.files import write_file
from ttq_jax.foreign import parse_toml
from ttq_jax.quant.names import quantizes_nothing
from ttq_jax.quant.presets import check_clip, preset
from ttq_jax.quant.recipe import RULE_NAMES, RULES, Recipe
from ttq_jax.quant.scaling import PowerLaw
from ttq_jax.quant.widths import Width
from ttq_jax.text import read_text

_FIELDS = {field.name: getattr(Recipe(), field.name) for field in dataclasses.fields(Recipe)}
_TABLES = tuple(name for name, value in _FIELDS.items() if dataclasses.is_dataclass(value))
_PLAIN = tuple(name for name, value in _FIELDS.items() if isinstance(value, str))

_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}

SHORT = {
    "bits": "grid.bits",
    "group_size": "grid.group_size",
    "symmetric": "grid.symmetric",
    "zero_point": "grid.zero_point",
    "scales": "grid.scales",
    "store_dtype": "grid.store_dtype",
    "rank": "low_rank.rank",
    "prefill": "prefill",
    "select": "select",
    "head": "head",
    "clip": "rounding",
    "per_prompt": "batch",
    "alpha": "scale.alpha",
    "lam": "scale.lam",
    "p": "scale.p",
}
"""Short names of the most used settings: those with an option of the command line."""

_FLAGS = {"clip": "clip", "per_prompt": "per_prompt"}
_LAW = ("alpha", "lam", "p")

_HEAD = "# A recipe of ttq, see `ttq recipes`.\n" + "".join(
    f"# Rules of {axis}: {', '.join(names)}.\n" for axis, names in RULES.items()
)


def with_settings(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """A recipe with some of its choices changed.

    All settings are applied before the result is checked, so their order does not matter; of
    several for one key the last one counts. A rule that the recipe does not have yet starts with
    its defaults.

    Args:
      recipe: to be changed.
      settings: each "axis.key=value" ("rounding.damping=0.3"), "axis=rule" ("scale=searched"),
        "moments=corpus" (short for moments.of), a field by itself ("prefill=quantized"), or
        "widths=" with TOML ('widths=[{select = "layers/down", bits = 5}]').

    Returns:
      The changed recipe.

    Raises:
      ConfigError: an axis, key, rule or value that does not exist, or choices that do not go
        together.
    """
    expect("recipe", recipe, Recipe, 'a recipe, as in preset("fast")')
    if isinstance(settings, str):
        raise ConfigError(f"settings: expected a list of them, got the string {shown(settings)}")
    given: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        axis, dot, key = (part.strip() for part in name.partition("."))
        if not equals or (dot and not key):
            raise ConfigError(
                f"settings: expected AXIS.KEY=VALUE, AXIS=RULE or FIELD=VALUE, got {shown(setting)}"
            )
        _check_name("settings", axis, _FIELDS)
        text = text.strip()
        if dot:
            if axis not in _TABLES:
                raise ConfigError(f"{axis} has no keys: write {axis}=VALUE")
            given.setdefault(axis, {})[key] = _Text(text)
        elif axis in RULES:
            given.setdefault(axis, {})["rule"] = _Text(text)
        elif axis == "moments":
            given.setdefault(axis, {})["of"] = _Text(text)
        elif axis in _TABLES:
            keys = ", ".join(f"{axis}.{f.name}" for f in dataclasses.fields(_FIELDS[axis]))
            raise ConfigError(f"{axis} holds several values: set one of {keys}")
        elif axis in _PLAIN or axis == "head":
            given[axis] = _Text(text)
        else:
            given[axis] = _parsed(f"{axis} = {text}", axis)[axis]
    return _changed(recipe, given)


def recipe_named(
    name: str, short: Mapping[str, Any], settings: Iterable[str] = ()
) -> Recipe | None:
    """A preset or a file, with some choices changed.

    Args:
      name: of a preset, or of a TOML file.
      short: value by key of `SHORT`; a None or a flag's False changes nothing.
      settings: see `with_settings`; they count after the short ones.

    Returns:
      The recipe; None for "none".

    Raises:
      ConfigError: a value out of range, or a choice that the recipe does not read.
    """
    base = load_recipe(name) if name.endswith(".toml") else preset(name)
    given = {k: v for k, v in short.items() if v is not None and not (k in _FLAGS and v is False)}
    law = [key for key in _LAW if key in given]
    if base is None:
        options = (f"{key} (--{key.replace('_', '-')})" for key in given)
        for useless in [*options, *(f"--set {s}" for s in settings)]:
            raise ConfigError(quantizes_nothing(name, f"{useless} has no effect"))
        return None
    if "clip" in given:
        check_clip(name, base)
    changes = {key: f"{SHORT[key]}={_FLAGS.get(key, value)}" for key, value in given.items()}
    plain = [change for key, change in changes.items() if key not in law]
    made = with_settings(base, [*plain, *settings])
    if law and not isinstance(made.scale, PowerLaw):
        raise ConfigError(
            f"{law[0]} (--{law[0]}) belongs to a power-law scale, but the scale of recipe {name} is"
            f" {RULE_NAMES[type(made.scale)]}; use a recipe with a power law (ttq), or --set "
            "scale=power_law"
        )
    return with_settings(base, [*plain, *(changes[key] for key in law), *settings])


def from_toml(text: str) -> Recipe:
    """Reads what `to_toml` writes.

    Args:
      text: TOML; what is missing has its default.

    Returns:
      The recipe.

    Raises:
      ConfigError: not TOML, an unknown name or a value outside its range.
    """
    given = _parsed(text, "recipe")
    for name in given:
        _check_name("recipe", name, _FIELDS)
    for name in _TABLES:
        if not isinstance(given.get(name, {}), dict):
            raise ConfigError(f"{name}: expected a table ([{name}]), got {shown(given[name])}")
    return _changed(Recipe(), given)


def to_toml(recipe: Recipe) -> str:
    """A recipe as TOML, complete: `from_toml` gives the same recipe back.

    Args:
      recipe: to write.

    Returns:
      A table per axis, with the name of its rule; an array of tables for width rules.
    """
    said = recipe.describe()
    # TOML can write infinity; the string that stands for it in JSON is not needed.
    said["moments"]["prior_tokens"] = recipe.source.prior_tokens
    # TOML has no null.
    said.setdefault("head", "none")
    widths = said.pop("widths")
    parts = [tomli_w.dumps(said)]
    for rule in widths:
        known = {key: value for key, value in rule.items() if value is not None}
        parts.append(f"[[widths]]\n{tomli_w.dumps(known)}")
    return _HEAD + "\n".join(parts)


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe from a file.

    Args:
      path: of a TOML file, see `from_toml`.

    Returns:
      The recipe.

    Raises:
      ConfigError: it cannot be read, or holds no recipe.
    """
    text = read_text(path, ConfigError)
    if not _parsed(text, str(path)):
        raise ConfigError(
            f"{path}: expected at least one choice, as in [grid] bits = 4, got none; ttq recipes "
            "NAME prints them all"
        )
    try:
        return from_toml(text)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e


def save_recipe(path: str | Path, recipe: Recipe) -> None:
    """Writes a recipe to a file; an old file is replaced only when the new one is complete.

    Args:
      path: of a TOML file.
      recipe: to write.

    Raises:
      ConfigError: it cannot be written.
    """
    try:
        write_file(path, to_toml(recipe))
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written: {e.strerror}") from e


class _Text(str):
    """A value as text, still to be read by the type of its field."""


def _parsed(text: str, what: str) -> dict[str, Any]:
    """TOML data."""
    return parse_toml(text, what, ConfigError)


def _check_name(where: str, name: str, legal: Iterable[str]) -> None:
    """Refuses a name that does not exist.

    Raises:
      ConfigError: it does not.
    """
    if name not in legal:
        raise ConfigError(f"{where}: expected one of {', '.join(legal)}, got {shown(name)}")


def _changed(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """The recipe with all given changes made at once."""
    changes: dict[str, Any] = {}
    for axis, value in given.items():
        if axis in _TABLES:
            changes[axis] = _table(axis, getattr(recipe, axis), dict(value))
        elif axis in _PLAIN:
            changes[axis] = _value(axis, value, str)
        elif axis == "head":
            changes[axis] = _value(axis, value, int, none=True)
        else:
            changes[axis] = _widths(value)
    return dataclasses.replace(recipe, **changes)


def _table(axis: str, current: Any, given: dict[str, Any]) -> Any:
    """One axis: the current value, or another rule's defaults, with the given keys.

    Raises:
      ConfigError: no such rule, key or value.
    """
    if axis in RULES and "rule" in given:
        name = _value(f"{axis}.rule", given.pop("rule"), str)
        _check_name(axis, name, RULES[axis])
        if type(current) is not RULES[axis][name]:
            current = RULES[axis][name]()
    fields = {field.name for field in dataclasses.fields(current)}
    for key in given:
        if key not in fields:
            raise ConfigError(_no_such_key(axis, current, key))
    kinds = typing.get_type_hints(type(current))
    read = {key: _value(f"{axis}.{key}", value, kinds[key]) for key, value in given.items()}
    return dataclasses.replace(current, **read)


def _no_such_key(axis: str, current: Any, key: str) -> str:
    """The error message for an unknown key: the keys that there are, and the rule that has it."""
    names = ", ".join(field.name for field in dataclasses.fields(current))
    keys = f"the keys {names}" if names else "no keys"
    if axis not in RULES:
        return f"{axis}.{key[:80]}: no such key; {axis} has {keys}"
    owners = [
        name
        for name, rule in RULES[axis].items()
        if key in {field.name for field in dataclasses.fields(rule)}
    ]
    text = f"{axis}.{key[:80]}: no such key; {axis} rule {RULE_NAMES[type(current)]} has {keys}"
    return f"{text}; {key} belongs to rule {' and '.join(owners)}" if owners else text


def _widths(given: Any) -> tuple[Width, ...]:
    """Width rules from an array of tables.

    Raises:
      ConfigError: something else came.
    """
    if not isinstance(given, list) or not all(isinstance(rule, dict) for rule in given):
        raise ConfigError(
            'widths: expected tables like {select = "layers/down", bits = 5}, or [[widths]] in a '
            f"file, got {shown(given)}"
        )
    kinds = {"select": str, "bits": int, "group_size": int}
    rules = []
    for i, rule in enumerate(given, 1):
        for key in rule:
            _check_name(f"widths, rule {i}", key, kinds)
        if "select" not in rule:
            raise ConfigError(f'widths, rule {i}: expected select, as in select = "layers/down"')
        read = {key: _value(f"widths.{key}", value, kinds[key]) for key, value in rule.items()}
        rules.append(Width(**read))
    return tuple(rules)


def _value(where: str, value: Any, kind: type, *, none: bool = False) -> Any:
    """A value of the field's type; "none" is None where the field may be that.

    Raises:
      ConfigError: another type came, or not a number.
    """
    if none and value == "none":
        return None
    read: Any = _read(value, kind) if isinstance(value, _Text) else value
    if kind is float and type(read) is int and abs(read) < 2**53:
        read = float(read)
    # TOML's integers have 64 bits; NaN is no number.
    unfit = abs(read) >= 2**63 if type(read) is int else read != read
    if type(read) is not kind or unfit:
        wanted = _KINDS[kind] + (", or none" if none else "")
        raise ConfigError(f"{where}: expected {wanted}, got {shown(value)}")
    return read


def _read(text: _Text, kind: type) -> Any:
    """Text as a value of this type; the text itself if it is none."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text

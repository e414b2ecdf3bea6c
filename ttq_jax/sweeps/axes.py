"""A sweep file -> cells: the product of its axes. A cell is one run of `ttq perplexity`.

A key of the file is an option of that command (`bits`, `corpus`, `method`), a recipe field
(`rounding = "clip"`, `moments.prior_tokens`), `seed` or `acceptance`; its value is a list, or one
value. Keys before any table hold for all; each `[[part]]` adds its own axes, and the sweep is the
union of the parts' products.

An axis that a cell does not read is left out of it, such as the bits of the unquantized model or
the calibration corpus of a recipe that reads none. Cells that are then equal run once.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from ttq_jax.config import ConfigError
from ttq_jax.errors import shown
from ttq_jax.evaluation.perplexity import Protocol
from ttq_jax.foreign import parse_toml
from ttq_jax.models.cache import DTYPES as CACHE_DTYPES
from ttq_jax.quant.names import DEFAULT, PREFILLS, lacks_corpus, misnamed
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.recipe_text import SHORT, recipe_named
from ttq_jax.speculation import check as check_drafting
from ttq_jax.text import read_text

# Axes whose value may be given as LABEL=VALUE: the label is what rows and reports show.
LABELLED = ("model", "corpus", "calibration")

# Axis -> the type of its values, or what they may be; any field of a recipe is one besides.
AXES: dict[str, Any] = {
    "model": str, "dtype": ("float32", "bfloat16"), "ignore_key": str, "corpus": str,
    "dense_memory": ("device", "host"), "cache_dtype": CACHE_DTYPES,
    "recipe": str, "seed": int,
    "protocol": ("causal", "window"), "window": int, "prompt_tokens": int, "max_windows": int,
    "acceptance": bool, "calibration": str, "calibration_tokens": int,
    "bits": int, "group_size": int, "rank": int, "symmetric": bool, "clip": bool,
    "alpha": float, "lam": float, "p": float, "select": str, "prefill": PREFILLS,
    "zero_point": ("integer", "float"), "store_dtype": ("bfloat16", "float16", "float32"),
    "scales": ("float", "coded", "coded4"), "head": ("2", "3", "4", "5", "8", "none"),
}  # fmt: skip

_KINDS = {int: "an integer", float: "a number", bool: "true or false"}

# What the unquantized model depends on.
_OF_NONE = {
    "model", "dtype", "ignore_key", "dense_memory", "corpus", "recipe", "max_windows", "seed",
    "protocol", "window", "prompt_tokens", "cache_dtype",
}  # fmt: skip

# Slowest first: cells that share a model, a calibration or a program stand together.
_ORDER = ("model", "dtype", "ignore_key", "dense_memory", "seed", "protocol", "window",
          "prompt_tokens", "calibration", "calibration_tokens", "recipe")  # fmt: skip
_LAST = ("max_windows", "corpus")

# More than anybody's computer measures.
_MOST_CELLS = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A cell's options of `ttq perplexity` apart from the recipe's, with the same defaults.

    Attributes:
      model: a name that `load` takes.
      corpus: the text that is scored, see `read_corpus`.
      recipe: a preset's name, or a file's.
      dtype: of the unquantized weights and the activations.
      ignore_key: settings of the model's files that change nothing, separated by spaces.
      dense_memory: where the unquantized weights of the blocks lie, see `checkpoint.load`.
      cache_dtype: how keys and values are stored, see `generate`.
      protocol: "causal" or "window".
      window: W, tokens.
      prompt_tokens: P, tokens.
      max_windows: how many are scored; None for all.
      acceptance: whether the causal windows are also compared as by `ttq acceptance`.
      calibration: the calibration corpus of recipes that read one.
      calibration_tokens: how many of its tokens are read.
      seed: of the draw of windows; None takes the first ones.
    """

    model: str
    corpus: str
    recipe: str = DEFAULT
    dtype: Literal["float32", "bfloat16"] = "float32"
    ignore_key: str = ""
    dense_memory: Literal["device", "host"] = "device"
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    protocol: str = "causal"
    window: int = 512
    prompt_tokens: int = 256
    max_windows: int | None = None
    acceptance: bool = False
    calibration: str | None = None
    calibration_tokens: int = 8192
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of a sweep.

    Attributes:
      values: axis -> value of everything that was given and is read, defaults of the protocol
        included; labels replace the values that they name.
      options: the same without labels, defaults included.
      recipe: None for the unquantized model, or if it is illegal.
      protocol: what is read and scored; None if it is illegal.
      error: why the cell cannot run, "" if it can.
    """

    values: dict[str, Any]
    options: Options
    recipe: Recipe | None
    protocol: Protocol | None
    error: str = ""

    @property
    def key(self) -> str:
        """Identifies the cell: a digest of its values and of its whole recipe."""
        recipe = None if self.recipe is None else self.recipe.describe()
        text = json.dumps([self.values, recipe], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def name(self, axes: Iterable[str] | None = None) -> str:
        """Its values on some axes, or on all, for people."""
        shown = self.values if axes is None else [a for a in axes if a in self.values]
        return ", ".join(f"{axis} {self.values[axis]}" for axis in shown)


def read_sweep(path: str, changes: Sequence[str] = ()) -> list[Cell]:
    """The cells of a sweep file.

    Args:
      path: of a TOML file, see the module's docstring.
      changes: each "KEY=VALUE,VALUE,…" replaces that key in every part.

    Returns:
      Cells without repetition, in the order in which they run best.

    Raises:
      ConfigError: not TOML, a key that is not an axis or is changed twice, or a value that its
        option does not take.
      CorpusError: the file cannot be read.
    """
    data = parse_toml(read_text(path, ConfigError), path, ConfigError)
    given = _changes(changes)
    parts = data.pop("part", [{}])
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ConfigError(f"{path}: part: expected tables, [[part]], got {shown(parts)}")
    cells: dict[str, Cell] = {}
    try:
        for part in parts:
            axes = _axes(data) | _axes(part) | given
            product = math.prod(map(len, axes.values()))
            if product > _MOST_CELLS:
                raise ConfigError(
                    f"expected at most {_MOST_CELLS} cells in a part, got {shown(product)}"
                )
            for point in itertools.product(*axes.values()):
                cell = make_cell(dict(zip(axes, point, strict=True)))
                cells.setdefault(cell.key, cell)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    return sorted(cells.values(), key=_rank(list(cells.values())))


def varying_axes(cells: Iterable[Cell]) -> list[str]:
    """The axes along which cells differ.

    Args:
      cells: of one sweep.

    Returns:
      Names, in the order of the cells' values.
    """
    seen: dict[str, set[str]] = {}
    for cell in cells:
        for axis, value in cell.values.items():
            seen.setdefault(axis, set()).add(str(value))
    return [axis for axis, values in seen.items() if len(values) > 1 or axis == "recipe"]


def _changes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Axes that replace those of the file.

    Raises:
      ConfigError: one has another form, or two are of one key.
    """
    given: dict[str, list[Any]] = {}
    for text in texts:
        key, values = _change(text)
        if key in given:
            both = ",".join([*given[key], *values])
            raise ConfigError(
                f"--axis: expected each key once, got {key} twice; give all its values at once: "
                f"--axis {key}={both}"
            )
        given[key] = values
    return given


def _change(text: str) -> tuple[str, list[Any]]:
    """`KEY=VALUE,VALUE` -> the axis.

    Raises:
      ConfigError: it has another form.
    """
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values:
        raise ConfigError(f"--axis: expected KEY=VALUE,VALUE,…, got {shown(text)}")
    return _axis_name(key.strip()), values.split(",")


def _axis_name(key: str) -> str:
    """The key by which an axis is known: the option's name with underscores."""
    name = key.replace("-", "_")
    return "recipe" if name == "method" else name


def _axes(table: dict[str, Any], inside: str = "") -> dict[str, list[Any]]:
    """A (nested) table as axes; `scale.alpha` may be written as a dotted key.

    Raises:
      ConfigError: an empty list, or a value that no option takes.
    """
    axes: dict[str, list[Any]] = {}
    for key, value in table.items():
        name = inside + _axis_name(key)
        if isinstance(value, dict):
            axes |= _axes(value, f"{name}.")
            continue
        values = value if isinstance(value, list) else [value]
        large = any(isinstance(v, int) and abs(v) >= 2**63 for v in values)
        if not values or large or not all(isinstance(v, str | int | float) for v in values):
            raise ConfigError(f"{name}: expected a value or a list of values, got {shown(value)}")
        axes[name] = values
    return axes


def make_cell(point: dict[str, Any]) -> Cell:
    """A cell from one value per axis.

    Args:
      point: axis -> value, "model" and "corpus" among them.

    Returns:
      The cell; one whose choices do not go together has an `error`.

    Raises:
      ConfigError: an axis that does not exist, or a value that its option does not take.
    """
    labels, plain = {}, {}
    for axis, value in point.items():
        label, is_labelled, rest = str(value).partition("=")
        labelled = axis in LABELLED and bool(is_labelled)
        labels[axis] = label if labelled else value
        plain[axis] = rest if labelled else value
    read = _read(plain)
    names = {field.name for field in dataclasses.fields(Options)}
    options = Options(**{axis: value for axis, value in read.items() if axis in names})
    short = {axis: value for axis, value in read.items() if axis in SHORT}
    settings = [f"{k}={v}" for k, v in read.items() if k not in names and k not in SHORT]
    error, recipe, protocol = "", None, None
    try:
        recipe = recipe_named(options.recipe, short, settings)
        protocol = Protocol(
            kind=options.protocol, window=options.window, prompt_tokens=options.prompt_tokens
        )
        if recipe is not None and recipe.source.reads_corpus and options.calibration is None:
            give = 'give the axis calibration, as in calibration = ["FILE"]'
            raise ConfigError(lacks_corpus(f"recipe {options.recipe}", give))
        if recipe is not None and options.acceptance and options.protocol == "causal":
            check_drafting(1, recipe)
            if options.cache_dtype is not None:
                raise ConfigError(
                    "acceptance is measured with keys and values of the activations' dtype; leave "
                    "out the axis acceptance or cache_dtype"
                )
    except ConfigError as e:
        error = str(e)
    return Cell(_values(labels, options, recipe), options, recipe, protocol, error)


def _read(point: dict[str, Any]) -> dict[str, Any]:
    """The values that this point's recipe reads, each of its axis's type.

    Raises:
      ConfigError: an axis that does not exist or is missing, or a value that it does not take.
    """
    for axis in ("model", "corpus"):
        if axis not in point:
            raise ConfigError(f'the axis {axis} is missing; give it, as in {axis} = ["…"]')
    fields = {f.name for f in dataclasses.fields(Recipe)}
    read = {}
    for axis, value in point.items():
        field, dot, _ = axis.partition(".")
        if axis not in AXES and field not in fields:
            raise ConfigError(
                f"{axis[:80]} is not an axis; expected one of {', '.join(sorted(AXES))}, or a "
                f"field of a recipe, as in {'rounding.damping' if dot else 'scale'}"
            )
        if point.get("recipe") == "none" and axis not in _OF_NONE:
            continue
        if axis in AXES:
            read[axis] = _value(axis, value)
        else:
            read[axis] = str(value).lower() if isinstance(value, bool) else value
    if wrong := misnamed(read.get("recipe", DEFAULT)):
        raise ConfigError(f"recipe: {wrong}")
    return read


def _value(axis: str, value: Any) -> Any:
    """A value of an axis: as TOML gave it, or as a text from the command line.

    Raises:
      ConfigError: the axis does not take it.
    """
    kind, text = AXES[axis], str(value)
    if kind is str:
        return text
    if isinstance(kind, tuple):
        if text not in kind:
            raise ConfigError(f"{axis}: expected one of {', '.join(kind)}, got {shown(value)}")
        return text
    try:
        found = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as e:
        raise ConfigError(f"{axis}: expected {_KINDS[kind]}, got {shown(value)}") from e
    if axis == "seed" and found < 0:
        raise ConfigError(f"seed: expected an integer >= 0, got {shown(value)}")
    return found


def _values(labels: dict[str, Any], options: Options, recipe: Recipe | None) -> dict[str, Any]:
    """What identifies a cell: the given values that are read, and the whole protocol."""
    values = {axis: _number(value) for axis, value in labels.items()}
    values["recipe"] = options.recipe
    for axis in ("protocol", "window", "prompt_tokens"):
        values[axis] = getattr(options, axis)
    if options.protocol == "window":
        del values["prompt_tokens"]
    if not options.acceptance or options.protocol == "window":
        values.pop("acceptance", None)
    if options.recipe == "none":
        values = {k: v for k, v in values.items() if k in _OF_NONE}
    elif recipe is not None:
        if recipe.source.reads_corpus:
            values["calibration_tokens"] = options.calibration_tokens
        else:
            values = {k: v for k, v in values.items() if not k.startswith("calibration")}
    return values


def _number(value: Any) -> Any:
    """A value that came from the command line as a text, as TOML would have given it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.lower() if value.lower() in {"true", "false"} else value)
    except ValueError:
        return value


def _rank(cells: Iterable[Cell]) -> Any:
    """A sort key that keeps each axis's own order of values."""
    seen: dict[str, dict[str, int]] = {}
    for cell in cells:
        for axis, value in cell.values.items():
            seen.setdefault(axis, {}).setdefault(str(value), len(seen[axis]))
    free = [a for a in seen if a not in _ORDER and a not in _LAST]
    axes = [*_ORDER, *free, *_LAST]

    def key(cell: Cell) -> tuple[int, ...]:
        return tuple(seen.get(a, {}).get(str(cell.values.get(a)), -1) for a in axes)

    return key

"""A checkpoint's settings as they are read: used, without effect, or refused."""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from ttq_jax.config import ConfigError
from ttq_jax.errors import shown
from ttq_jax.foreign import named
from ttq_jax.models.known_keys import CHANGES, PATTERNS_WITHOUT_EFFECT, WITHOUT_EFFECT

_REQUIRED: Any = object()

# What float32 holds at full precision.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127
# Lists are made of that many before the weights, which tell the true number, are looked at.
_MOST_LAYERS = 10_000


class Settings:
    """A checkpoint's settings; one that is neither read nor ignored on purpose is an error.

    A setting that the model code does not know may change the model's mathematics, and a wrong
    model still produces fluent text. So nothing is skipped silently. A null is no setting.

    Attributes:
      notes: what was ignored because it was asked for, or read otherwise than written; a sentence
        each. The settings of an object inside, from `inside`, have the same list.
    """

    def __init__(
        self, values: Mapping[str, Any], prefix: str = "", *, ignore_keys: Iterable[str] = ()
    ):
        """Wraps settings.

        Args:
          values: name to value, as in config.json or a GGUF header.
          prefix: put before each name in messages.
          ignore_keys: names, with their prefix, of settings that nobody knows and the user vouches
            for.
        """
        self._values = dict(values)
        self._prefix = prefix
        self._read: set[str] = set()
        self._idle: set[str] = set()
        self._asked = dict.fromkeys(ignore_keys, False)
        self.notes: list[str] = []

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether a setting is there and null, which in some places is not the same as absent."""
        return name in self._values and self._values[name] is None

    def peek(self, name: str) -> Any:
        """A setting's value, None where there is none; it still has to be read or ignored."""
        return self._values.get(name)

    def label(self, name: str) -> str:
        """A setting's name for messages, with its prefix."""
        return self._prefix + name

    def inside(self, name: str, outside: Mapping[str, tuple[str, Any]] | None = None) -> "Settings":
        """The settings of an object; none where there is no such object.

        Args:
          name: of the object.
          outside: what may stand elsewhere instead of in it: by its name in the object, its name
            there and its value there, None if it does not.

        Returns:
          Their union.

        Raises:
          ConfigError: a setting that stands in both has two values.
        """
        values = {key: value for key, value in self.mapping(name).items() if value is not None}
        for key, (other, value) in (outside or {}).items():
            if value is not None and values.setdefault(key, value) != value:
                disagree(self.label(f"{name}.{key}"), values[key], other, value)
        part = Settings(values, self.label(f"{name}."))
        part._asked, part.notes = self._asked, self.notes
        return part

    def override(self, name: str, value: Any) -> None:
        """Sets a value that another place decides."""
        self._values[name] = value

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a setting; a null counts as absent.

        Args:
          name: of the setting.
          default: what absence means; without it absence is an error.

        Returns:
          The value.

        Raises:
          ConfigError: the setting is absent and has no default.
        """
        self._read.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"expected the key {self.label(name)!r}, found none; add it")
        return default

    def _typed(self, name: str, default: Any, fits: Callable[[Any], bool], what: str) -> Any:
        """`take`, with the value (not the default) checked.

        Raises:
          ConfigError: it is absent without default, or does not fit.
        """
        value = self.take(name, default)
        if name in self and not fits(value):
            raise ConfigError(f"{self.label(name)}: expected {what}, got {shown(value)}")
        return value

    def integer(
        self, name: str, default: Any = _REQUIRED, least: int = 1, most: int = 2**31 - 1
    ) -> Any:
        """An integer from `least` to `most`. Other arguments as for `take`."""
        fits = lambda v: type(v) is int and least <= v <= most  # noqa: E731
        return self._typed(name, default, fits, f"an integer from {least} to {most}")

    def layers(self, name: str, default: Any = _REQUIRED) -> Any:
        """A number of layers. Arguments as for `take`."""
        return self.integer(name, default, most=_MOST_LAYERS)

    def number(self, name: str, default: Any = _REQUIRED, zero: bool = False) -> Any:
        """A number above 0 that float32 holds, or 0 if `zero`. Other arguments as for `take`."""
        fits = lambda v: _is_number(v) or (zero and type(v) in {int, float} and v == 0)  # noqa: E731
        value = self._typed(name, default, fits, "a number above 0 that float32 holds")
        return float(value) if name in self else value

    def numbers(self, name: str, default: Any = _REQUIRED) -> Any:
        """A list of numbers above 0, as a tuple. Arguments as for `take`."""
        fits = lambda v: isinstance(v, list | tuple) and bool(v) and all(map(_is_number, v))  # noqa: E731
        value = self._typed(name, default, fits, "a list of numbers above 0 that float32 holds")
        return tuple(map(float, value)) if name in self else value

    def flag(self, name: str, default: bool) -> bool:
        """True or false. Arguments as for `take`."""
        return self._typed(name, default, lambda v: isinstance(v, bool), "true or false")

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; empty where there is none. Arguments as for `take`."""
        return self._typed(name, {}, lambda v: isinstance(v, dict), "an object")

    def ignore(self, *names: str) -> None:
        """Ignores settings that do not change inference."""
        self._idle.update(names)

    def ignore_matching(self, *patterns: str) -> None:
        """Ignores all settings whose names match one of these patterns (fnmatch)."""
        self._idle.update(n for n in self._values if any(fnmatchcase(n, p) for p in patterns))

    def ignore_prefix(self, *prefixes: str) -> None:
        """Ignores all settings whose names start with one of these."""
        self._idle.update(n for n in self._values if n.startswith(prefixes))

    def ignore_outside(self, *prefixes: str) -> None:
        """Ignores all settings whose names start with none of these."""
        self._idle.update(n for n in self._values if not n.startswith(prefixes))

    def require(self, name: str, *allowed: Any) -> None:
        """Accepts a setting only at the values that the model code implements.

        Args:
          name: of the setting; absent or null is accepted.
          *allowed: the values; a list of equal values counts as one of them.

        Raises:
          ConfigError: another value.
        """
        value = self.take(name, None)
        one = value
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            one = value[0]
        # An array of a GGUF header has no truth value when it is compared.
        plain = isinstance(one, bool | int | float | str | list | dict)
        if value is not None and not (plain and one in allowed):
            raise ConfigError(
                f"{self.label(name)} = {shown(value)} is not implemented; expected "
                f"{' or '.join(map(repr, allowed)) or 'no such key'}. Use a checkpoint without it"
            )

    def finish(self) -> None:
        """Checks that every setting was read, is known to change nothing, or is ignored by request.

        Raises:
          ConfigError: naming the ones that were not, or a request to ignore one that counts.
        """
        unknown = []
        for name in sorted(n for n in self._values if n in self):
            label = self.label(name)
            changes = CHANGES.get(name, CHANGES.get(name.partition(".")[2]))
            if name not in self._read | self._idle and changes is not None:
                self.require(name, *changes)
            if label in self._asked:
                self._asked[label] = True
                self._ignore_asked(name, label)
            elif name not in self._read | self._idle:
                unknown.append(label)
        if unknown:
            raise ConfigError(
                f"unknown key{'s' if len(unknown) > 1 else ''} {named(unknown)}: the model code "
                "neither uses nor knowingly ignores it, so its results might be wrong. If it does "
                f"not change inference, pass --ignore-key {named(unknown[:1])} (in Python "
                f"ignore_keys=[{named(unknown[:1])!r}]){' for each' if len(unknown) > 1 else ''}"
            )

    def _ignore_asked(self, name: str, label: str) -> None:
        """Ignores a setting because the user said so.

        Raises:
          ConfigError: the model code knows that it counts.
        """
        if name in self._read:
            raise ConfigError(
                f"--ignore-key {label}: this key counts, so it cannot be ignored. Leave out the "
                "option"
            )
        if name in self._idle:
            self.notes.append(f"--ignore-key {label} has no effect: the key changes nothing anyway")
        else:
            self.notes.append(f"{label} = {shown(self._values[name])} is ignored, as asked")

    def note_unmet(self) -> None:
        """Notes each key that was to be ignored and is not there."""
        for label, met in self._asked.items():
            if not met:
                self.notes.append(f"--ignore-key {label} has no effect: there is no such key")


def disagree(one: str, first: Any, other: str, second: Any) -> NoReturn:
    """Refuses two spellings of one setting that contradict each other.

    Args:
      one: a spelling.
      first: what it says.
      other: another spelling.
      second: what that says.

    Raises:
      ConfigError: always.
    """
    raise ConfigError(
        f"{one} and {other} are two spellings of one setting and disagree: {shown(first)} and "
        f"{shown(second)}. Remove the wrong one"
    )


def _is_number(value: Any) -> bool:
    """Whether it is a number above 0 that float32 holds."""
    return type(value) in {int, float} and _SMALLEST <= value <= _LARGEST


def ignore_common(settings: Settings) -> None:
    """Ignores keys that any config.json may have and that do not change inference.

    Args:
      settings: config.json, whose unknown-key check this prepares.
    """
    settings.ignore(*WITHOUT_EFFECT)
    settings.ignore_matching(*PATTERNS_WITHOUT_EFFECT)
    # Some tools write a window's keys beside the switch that turns it off.
    if settings.peek("use_sliding_window") is False:
        settings.ignore("sliding_window", "max_window_layers")


def text_settings(s: Settings, *beside: str, tied: bool) -> Settings:
    """The text part of a model that also reads pictures, or the settings themselves.

    Args:
      s: config.json.
      *beside: keys that concern the other parts; "vision_config" always does.
      tied: whether the head is tied where the outer settings do not say it. Theirs count, as in
        transformers.

    Returns:
      The settings to read; `finish` is called on both.
    """
    if "text_config" not in s:
        return s
    ignore_common(s)
    s.ignore("vision_config", *beside)
    text = s.inside("text_config")
    text.override("tie_word_embeddings", s.flag("tie_word_embeddings", tied))
    return text

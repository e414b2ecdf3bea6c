"""The base of every error that this package raises on purpose.

Each stage has its own: `ConfigError`, `PromptError`, `CheckpointError`, `CorpusError`, `ChipError`,
`NotFiniteError`. A caller who wants them all catches `ttq_jax.Error`.
"""

import dataclasses
import functools
import numbers
import typing
from typing import Any


class Error(ValueError):
    """Input, a file or a result that cannot be used; the message says what to do."""


class NotFiniteError(Error):
    """A result holds infinities or NaN; the message says where they came up."""


def shown(value: Any) -> str:
    """A value for a message, at most 80 characters of it on one line."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # an integer of thousands of digits; a deep tree
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:79]}…"


def expect(what: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    """Refuses an argument of another type.

    Args:
      what: the argument's name.
      value: what came.
      kind: what is taken. A bool is no int.
      wanted: `kind` in words, and how to make one.

    Raises:
      Error: the value is of another type.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise Error(f"{what}: expected {wanted}, got {type(value).__name__} {shown(value)}")


_KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),  # NumPy's too
    float: (numbers.Real, "a number"),
    str: (str, "a string"),
}


@functools.cache
def _plain_fields(kind: type) -> dict[str, tuple[type, str]]:
    """The fields of a dataclass that hold one plain value, with what is taken."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: _KINDS[hints[name]] for name in names if hints[name] in _KINDS}


def check_fields(value: Any, error: type[Error]) -> None:
    """Refuses a dataclass whose plain fields hold another type than they say.

    Args:
      value: the dataclass, as its `__post_init__` sees it.
      error: what is raised.

    Raises:
      Error: as `error`; a field has another type.
    """
    for name, (kind, wanted) in _plain_fields(type(value)).items():  # type: ignore[arg-type]
        got = getattr(value, name)
        if not isinstance(got, kind) or (isinstance(got, bool) and kind is not bool):
            raise error(
                f"{type(value).__name__}.{name}: expected {wanted}, got {type(got).__name__} "
                f"{shown(got)}"
            )

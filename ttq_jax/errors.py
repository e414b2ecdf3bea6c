"""The base of every error that this package raises on purpose.

Each stage has its own: `ConfigError`, `PromptError`, `CheckpointError`, `CorpusError`, `ChipError`,
`NotFiniteError`. A caller who wants them all catches `ttq_jax.Error`.
"""

from typing import Any


class Error(ValueError):
    """Input, a file or a result that cannot be used; the message says what to do."""


class NotFiniteError(Error):
    """A result holds infinities or NaN; the message says where they came up."""


def shown(value: Any) -> str:
    """A value for a message, at most 80 characters of it on one line."""
    text = " ".join(repr(value).split())
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

"""How a command prints: one JSON object, or a short aligned text."""

import json
import math
import sys
from typing import Any


def _finite(data: Any) -> Any:
    """The same data with null for the numbers that JSON does not have."""
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def write(text: str) -> None:
    """Writes to stdout, at once.

    Args:
      text: with its line ends; stdout can encode it.

    Raises:
      OSError: stdout is full or broken; the error names it.
    """
    try:
        print(text, end="", flush=True)
    except OSError as e:
        raise OSError(e.errno, e.strerror, "standard output") from e


def print_json(data: dict[str, Any]) -> None:
    """Prints one object on one line of stdout.

    Args:
      data: JSON data; infinities and NaN become null.
    """
    encoding = (sys.stdout.encoding or "utf-8").lower()
    plain = encoding not in {"utf-8", "utf8"}
    write(json.dumps(_finite(data), ensure_ascii=plain, allow_nan=False) + "\n")


def print_piece(text: str) -> None:
    """Prints a piece of a text on stdout at once, as far as its encoding can show it.

    Args:
      text: any.
    """
    encoding = sys.stdout.encoding or "utf-8"
    write(text.encode(encoding, "replace").decode(encoding))


def print_text(text: str) -> None:
    """Prints lines on stdout, also where its encoding cannot show every character.

    Args:
      text: without the last line end.
    """
    print_piece(text + "\n")

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


def print_json(data: dict[str, Any]) -> None:
    """Prints one object on one line of stdout.

    Args:
      data: JSON data; infinities and NaN become null.
    """
    print(json.dumps(_finite(data), ensure_ascii=False, allow_nan=False), flush=True)


def print_text(text: str) -> None:
    """Prints lines on stdout, also where its encoding cannot show every character.

    Args:
      text: without the last line end.
    """
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)

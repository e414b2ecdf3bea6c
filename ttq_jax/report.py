"""What a command prints: one JSON object, or a short aligned text. Both come from the same data."""

import json
import math
import os
import platform
import sys
from importlib import metadata
from typing import Any

import jax

from ttq_jax._version import __version__
from ttq_jax.quant.recipe import Recipe


def versions(*compilers: str) -> dict[str, str]:
    """What a number depends on besides its options.

    Args:
      *compilers: packages that had a part in it; they must be installed.

    Returns:
      Version by package.
    """
    found = {"ttq_jax": __version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", *compilers)}


def device() -> str:
    """What computes: jax's name of the first device, with the number of cores if it is a CPU."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return str(first.device_kind)
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return f"cpu, {cores} cores"


def head(model: str, method: str, recipe: Recipe | None, bits: float) -> dict[str, Any]:
    """The fields that every JSON result begins with.

    Args:
      model: its name.
      method: name of the preset.
      recipe: the preset with the options applied; None for "none".
      bits: effective bits per weight.

    Returns:
      JSON data.
    """
    return {
        "model": model,
        "method": method,
        "recipe": None if recipe is None else recipe.describe(),
        "device": device(),
        "versions": versions(),
        "effective_bits": round(bits, 4),
    }


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


def table(rows: list[list[str]], *, left: int = 1, indent: str = "") -> str:
    """Columns aligned: the first `left` to the left, the others to the right.

    Args:
      rows: cells; all rows of one length.
      left: columns of text.
      indent: put before every line.

    Returns:
      The lines.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def megabytes(count: float) -> str:
    """Bytes as "12.3 MB" (10^6 bytes)."""
    return f"{count / 1e6:.1f} MB"


def describe_method(method: str, recipe: Recipe | None, bits: float) -> str:
    """One line for people: method, bits, groups.

    Args:
      method: name of the preset.
      recipe: None for "none".
      bits: effective bits per weight.

    Returns:
      Text.
    """
    if recipe is None:
        return f"none (unquantized, {bits:.2f} bits per weight)"
    grid = recipe.grid
    group = "whole rows" if grid.group_size == -1 else f"group {grid.group_size}"
    rank = f", rank {recipe.low_rank.rank}" if recipe.low_rank.rank else ""
    return (
        f"{method}, {grid.bits} bits, {group}{rank}, {recipe.prefill} prefill "
        f"({bits:.2f} bits per weight, everything counted)"
    )

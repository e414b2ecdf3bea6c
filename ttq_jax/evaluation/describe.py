"""Describes results: device, versions, the recipe in words, tables as text."""

import os
import platform
from importlib import metadata
from typing import Any

import jax

from ttq_jax._version import __version__
from ttq_jax.checkpoint import Model
from ttq_jax.chips.absent import libtpu_version
from ttq_jax.quant.lowrank import LowRankRule
from ttq_jax.quant.recipe import RULE_NAMES, Recipe
from ttq_jax.quant.source import Source


def versions(*compilers: str) -> dict[str, str]:
    """The versions that a number depends on.

    Args:
      *compilers: further packages that it depends on; they must be installed.

    Returns:
      Version by package.
    """
    found = {"ttq_jax": __version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", *compilers):
        found[name] = libtpu_version() if name == "libtpu" else metadata.version(name)
    return found


def device() -> str:
    """The device: jax's name of the first one, with the number of cores if it is a CPU."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return str(first.device_kind)
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return f"cpu, {cores} cores"


def made_by(model: Model) -> dict[str, Any]:
    """What every JSON result depends on: the model's files and dtype, the device, the versions.

    Args:
      model: the unquantized model.

    Returns:
      JSON data.
    """
    return {
        "model": model.name,
        "origin": dict(model.origin),
        "notes": list(model.notes),
        "dtype": model.dtype,
        "device": device(),
        "versions": versions(),
    }


def head(model: Model, method: str, recipe: Recipe | None, bits: float) -> dict[str, Any]:
    """The fields that every JSON result begins with.

    Args:
      model: the unquantized model.
      method: name of the preset, or of the recipe's file.
      recipe: with the options applied; None for "none".
      bits: effective bits per weight.

    Returns:
      JSON data.
    """
    return made_by(model) | {
        "method": method,
        "recipe": None if recipe is None else recipe.describe(),
        "effective_bits": round(bits, 4),
    }


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


def moments_in_short(source: Source) -> str:
    """The source of the moments, in a few words."""
    parts = [source.of]
    if source.prior != "none":
        parts.append(f"{source.prior} prior ({source.prior_tokens:g} tokens)")
    if source.decay:
        parts.append(f"decay {source.decay:g}")
    if source.refresh:
        parts.append(f"refresh {source.refresh}")
    return " + ".join(parts)


def low_rank_in_short(rule: LowRankRule) -> str:
    """The low-rank part, in a few words."""
    parts = []
    if rule.rank:
        parts.append(f"{'weighted ' if rule.weighted else ''}rank {rule.rank}")
    if rule.error_rank:
        parts.append(f"error rank {rule.error_rank}")
    if rule.mean:
        parts.append("mean corrected")
    return " + ".join(parts) or "none"


def describe_grid(recipe: Recipe) -> str:
    """Bits, groups and how they are stored, in a few words."""
    grid = recipe.grid
    parts = [
        f"{grid.bits} bits" + (" and width rules" if recipe.widths else ""),
        "whole rows" if grid.group_size == -1 else f"group {grid.group_size}",
        *(["symmetric"] if grid.symmetric else []),
        *{"coded": ["coded scales"], "coded4": ["scales coded in 4 bits"]}.get(grid.scales, []),
    ]
    return ", ".join(parts)


def describe_bits(bits: float, whole: float | None = None, read: int | None = None) -> str:
    """Stored bits, and what decoding reads, in words.

    Args:
      bits: per weight of the linear layers, everything in them counted.
      whole: per parameter of the whole model, if known.
      read: bytes read per decoded token without the KV cache, if known.

    Returns:
      Text.
    """
    also = "" if whole is None else f", {whole:.2f} over the whole model"
    also += "" if read is None else f", {megabytes(read)} read per token without the KV cache"
    return f"{bits:.2f} bits per weight of the linear layers{also}"


def describe_method(
    method: str, recipe: Recipe | None, bits: float, whole: float | None = None,
    read: int | None = None,
) -> str:  # fmt: skip
    """One line for people: recipe, bits, groups, choices.

    Args:
      method: name of the preset, or of the recipe's file.
      recipe: None for "none".
      bits: effective bits per weight of the linear layers.
      whole: the same per parameter of the whole model, if known.
      read: bytes read per decoded token without the KV cache, if known.

    Returns:
      Text.
    """
    if recipe is None:
        return f"none (unquantized, {describe_bits(bits, whole, read)})"
    parts = [
        method,
        describe_grid(recipe),
        f"moments {moments_in_short(recipe.source)}",
        f"scale {RULE_NAMES[type(recipe.scale)]}",
        f"rounding {RULE_NAMES[type(recipe.rounding)]}",
    ]
    if recipe.low_rank.total:
        parts.append(low_rank_in_short(recipe.low_rank))
    parts.append(f"{recipe.prefill} prefill")
    if recipe.head is not None:
        parts.append(f"head {recipe.head} bits")
    return f"{', '.join(parts)} ({describe_bits(bits, whole, read)})"

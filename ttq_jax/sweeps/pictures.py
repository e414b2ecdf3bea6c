"""The pictures of a report: lines along an axis, and calibration against test domains.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Every line has its own
marker, so that pictures can be read in grey too.
"""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ttq_jax.sweeps.tables import Summary, is_number

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "os^vDPX*"
_DASHES = ("-", "--", "-.", ":")

# Axes whose values are chosen by doubling; others are logarithmic from this ratio on.
_LOG2 = {"group_size", "prompt_tokens", "calibration_tokens", "window"}
_WIDE = 16
# Below this a gap is noise, and the axis linear: it may be zero, or less.
_SMALL = 0.01

_NAMES = {
    "bits": "stored bits per weight, everything counted",
    "group_size": "group size (weights that share a scale)",
    "rank": "rank of the static low-rank part", "prompt_tokens": "prompt length (tokens)",
    "calibration_tokens": "calibration tokens", "window": "window (tokens)",
    "alpha": "α, exponent of the channel scale", "lam": "λ, added to the relative moment",
    "p": "p, exponent of the activation moment",
}  # fmt: skip


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, bbox_inches="tight")
    _pyplot().close(figure)
    return out.getvalue()


def drawable(lines: dict[str, dict[Any, Summary]]) -> bool:
    """Whether any line has two numbers to connect."""
    return any(sum(map(is_number, line)) > 1 for line in lines.values())


def _value(summary: Summary) -> tuple[float, float, float]:
    return summary.gap or (summary.mean, summary.mean, summary.mean)


def draw_lines(
    axis: str, lines: dict[str, dict[Any, Summary]], title: str, flat: dict[str, Summary]
) -> bytes:
    """Quality along an axis of numbers.

    Args:
      axis: its name; along "bits" a point stands at its stored bits, not at its bits per code, so
        that recipes are compared at what they cost.
      lines: label -> value -> summary, all with a gap or none.
      title: what is the same for all.
      flat: label -> summary of those that do not read the axis, with a gap if the lines have one.

    Returns:
      A PNG.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.8))
    ticks: set[float] = set()
    heights, lowest = [], []
    for i, (label, line) in enumerate(lines.items()):
        points = {v: one for v, one in line.items() if is_number(v)}
        x = [one.bits if axis == "bits" else v for v, one in points.items()]
        y = np.array([_value(one) for one in points.values()])
        ticks |= set(x)
        heights += list(y[:, 0])
        lowest += list(y[:, 1])
        spread = np.abs(y[:, 1:] - y[:, :1]).T
        axes.errorbar(
            x, y[:, 0], yerr=spread if spread.any() else None, label=label, capsize=3,
            color=_COLOURS[i % len(_COLOURS)], marker=_MARKERS[i % len(_MARKERS)],
            linestyle=_DASHES[i // len(_COLOURS) % len(_DASHES)],
        )  # fmt: skip
    for i, (label, one) in enumerate(flat.items(), len(lines)):
        height, low, _ = _value(one)
        heights.append(height)
        lowest.append(low)
        axes.axhline(height, label=label, color=_COLOURS[i % len(_COLOURS)], linestyle=":")
    if min(ticks) > 0 and (axis in _LOG2 or max(ticks) >= _WIDE * min(ticks)):
        axes.set_xscale("log", base=2)
    has_gap = next(iter(next(iter(lines.values())).values())).gap is not None
    if max(heights) > 8 * max(min(heights), _SMALL):
        if min(heights) < _SMALL:
            axes.set_yscale("symlog", linthresh=_SMALL, linscale=0.5)
            axes.axhline(0, color="#999999", linewidth=0.8)
            axes.set_ylim(bottom=1.5 * min(*lowest, -_SMALL / 4))
        else:
            axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    if axis != "bits":
        axes.set_xticks(sorted(ticks), [f"{t:g}" for t in sorted(ticks)])
    axes.minorticks_off()
    axes.set_xlabel(_NAMES.get(axis, axis.replace("_", " ")))
    axes.set_ylabel(
        "perplexity over unquantized, minus 1" if has_gap else "perplexity, mean over corpora"
    )
    axes.set_title(title, fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    if len(lines) + len(flat) > 1:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _png(figure)


def draw_domains(
    panels: dict[str, dict[str, list[float | None]]], tested: Sequence[str], what: str
) -> bytes:
    """Calibration domain (rows) against test domain (columns), a panel per recipe.

    Args:
      panels: label -> name of a row -> a value per tested domain, None where there is none.
      tested: the domains that are scored.
      what: what the numbers are.

    Returns:
      A PNG; all panels share one scale.
    """
    plt = _pyplot()
    values = [v for panel in panels.values() for row in panel.values() for v in row if v]
    high = max(values)
    logs = min(values) > 0 and high > 8 * min(values)
    norm = (
        plt.matplotlib.colors.LogNorm(min(values), high)
        if logs
        else plt.matplotlib.colors.Normalize(min(0.0, *values), high)
    )
    most, across = max(map(len, panels.values())), min(len(panels), 3 if len(tested) < 5 else 2)
    down = -(-len(panels) // across)
    figure, places = plt.subplots(
        down, across, squeeze=False, layout="constrained",
        figsize=(1.6 + across * (1.5 + 0.62 * len(tested)), down * (1.8 + 0.42 * most)),
    )  # fmt: skip
    for axes in places.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (label, panel) in zip(places.flat, panels.items(), strict=False):
        grid = np.array([[math.nan if v is None else v for v in row] for row in panel.values()])
        shown = axes.imshow(grid, norm=norm, cmap="cividis", aspect="auto")
        axes.set_xticks(range(len(tested)), tested, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(panel)), list(panel), fontsize=8)
        axes.set_xlabel("scored on")
        axes.set_title(label, fontsize=10)
        best = np.nanmin(grid, axis=0)
        for (i, j), value in np.ndenumerate(grid):
            if not math.isnan(value):
                axes.text(
                    j, i, f"{value:.2g}" if value < 10 else f"{value:.0f}", fontsize=7, ha="center",
                    va="center", color="white" if norm(value) < 0.55 else "black",
                    weight="bold" if value == best[j] else None,
                )  # fmt: skip
    for axes in places[:, 0]:
        axes.set_ylabel("calibrated on")
    figure.colorbar(shown, ax=list(places.flat), label=what, shrink=0.8)
    return _png(figure)

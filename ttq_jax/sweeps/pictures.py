"""The pictures of a report: lines along an axis, and calibration against test domains."""

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ttq_jax.sweeps import words
from ttq_jax.sweeps.looks import FAINT, INK, WIDTH, Drawing, finish, look, pyplot
from ttq_jax.sweeps.tables import Summary, is_number

# Axes whose values are chosen by doubling; others are logarithmic from this ratio on.
_LOG2 = {"group_size", "prompt_tokens", "calibration_tokens", "window"}
_WIDE = 16
# Below this a gap is noise, and the axis linear: it may be zero, or less.
_SMALL = 0.01
_LINE = 62  # characters that fit the width

_NAMES = {
    "bits": "stored bits per weight of the linear layers",
    "group_size": "group size (weights that share a scale)",
    "rank": "rank of the static low-rank part", "prompt_tokens": "prompt length (tokens)",
    "calibration_tokens": "calibration tokens", "window": "window (tokens)",
    "alpha": "α, exponent of the channel scale", "lam": "λ, added to the relative moment",
    "p": "p, exponent of the activation moment",
}  # fmt: skip


def drawable(lines: dict[str, dict[Any, Summary]]) -> bool:
    """Whether any line has two numbers to connect."""
    return any(sum(map(is_number, line)) > 1 for line in lines.values())


def averaged(has_gap: bool, corpora: int) -> str:
    """What a number stands for, and what it is averaged over."""
    over = f"of {corpora} corpora" if corpora > 1 else ""
    if has_gap:
        what = "perplexity increase over the unquantized model"
        return f"{what}, mean {over}" if over else what
    return f"perplexity, geometric mean {over}" if over else "perplexity"


def percent(gap: float, _: Any = None) -> str:
    """A gap on an axis."""
    power = math.log10(abs(gap)) + 2 if gap else 0.0
    return f"$10^{{{power:.0f}}}$ %" if power > 4.5 else f"{100 * gap:g} %"


def _points(found: Sequence[Summary]) -> tuple[np.ndarray, np.ndarray | None]:
    """Heights, and how far the intervals reach below and above; None without intervals."""
    heights = np.array([one.mean if one.gap is None else one.gap for one in found])
    ends = [one.interval for one in found]
    if any(end is None for end in ends):
        return heights, None
    return heights, np.abs(np.array(ends, float).T - heights)


def draw_lines(
    axis: str, lines: dict[str, dict[Any, Summary]], title: str, flat: dict[str, Summary]
) -> Drawing:
    """Quality along an axis of numbers.

    Args:
      axis: its name; along "bits" a point stands at its stored bits, not at its bits per code, so
        that recipes are compared at what they cost.
      lines: label -> value -> summary, all with a gap or none.
      title: what is the same for all.
      flat: label -> summary of those that do not read the axis, with a gap if the lines have one.

    Returns:
      The picture.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(WIDTH, 2.9 + 0.17 * (len(lines) + len(flat))))
    ticks: set[float] = set()
    low, high = math.inf, -math.inf
    smallest, drawn = math.inf, Counter[str]()
    for label, line in lines.items():
        points = {v: one for v, one in line.items() if is_number(v)}
        if not points:
            continue
        x = [one.bits if axis == "bits" else v for v, one in points.items()]
        y, reach = _points(list(points.values()))
        ticks |= set(x)
        smallest, high = min(smallest, y.min()), max(high, y.max())
        low = min(low, (y if reach is None else y - reach[0]).min())
        method = str(next(iter(points.values())).values["recipe"])
        axes.errorbar(
            x, y, yerr=reach, label=label, capsize=2.5, elinewidth=1, **look(method, drawn[method])
        )
        drawn[method] += 1
    for label, one in flat.items():
        y, _ = _points([one])
        smallest, high, low = min(smallest, y[0]), max(high, y[0]), min(low, y[0])
        method = str(one.values["recipe"])
        style = look(method, drawn[method]) | {"marker": "", "linestyle": ":"}
        axes.axhline(y[0], label=label, **style)
        drawn[method] += 1
    corpora = len(next(iter(next(iter(lines.values())).values())).rows)
    has_gap = next(iter(next(iter(lines.values())).values())).gap is not None
    _scale_x(axes, axis, ticks)
    _scale_y(axes, smallest, low, high, has_gap)
    axes.set_xlabel(_NAMES.get(axis, words.axis(axis)))
    axes.set_ylabel("\n".join(textwrap.fill(s, 34) for s in averaged(has_gap, corpora).split(", ")))
    figure.suptitle(textwrap.fill(title, _LINE), fontsize=8.5, x=0.01, ha="left")
    axes.grid(visible=True)
    if len(lines) + len(flat) > 1:
        figure.legend(loc="outside lower left", labelspacing=0.35)
    return finish(figure)


def _scale_x(axes: Any, axis: str, ticks: set[float]) -> None:
    """A logarithm where values double, and a tick at each value that has room."""
    logs = min(ticks) > 0 and (axis in _LOG2 or max(ticks) >= _WIDE * min(ticks))
    if logs:
        axes.set_xscale("log", base=2)
    if axis == "bits":
        return
    span, kept = (lambda t: math.log2(t) if logs else t), list[float]()
    room = (span(max(ticks)) - span(min(ticks))) / 11
    for tick in sorted(ticks):
        if not kept or span(tick) - span(kept[-1]) >= room:
            kept.append(tick)
    axes.set_xticks(kept, [f"{t:g}" for t in kept], rotation=30 if max(kept) >= 10000 else 0)
    axes.minorticks_off()


def _scale_y(axes: Any, smallest: float, low: float, high: float, has_gap: bool) -> None:
    """A logarithm where heights differ much, and ticks that name enough of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    if high > 8 * max(smallest, _SMALL):
        decades = math.log10(high / max(smallest, _SMALL))
        if smallest < _SMALL:
            axes.set_yscale("symlog", linthresh=_SMALL, linscale=0.5)
            axes.axhline(0, color=FAINT, linewidth=0.8)
            axes.set_ylim(bottom=1.5 * min(low, -_SMALL / 4))
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(percent) if has_gap else "{x:g}")


def draw_domains(
    panels: dict[str, dict[str, list[float | None]]], tested: Sequence[str], what: str, title: str
) -> Drawing:
    """Calibration domain (rows) against test domain (columns), a panel per recipe.

    Args:
      panels: label -> name of a row -> a value per tested domain, None where there is none.
      tested: the domains that are scored.
      what: what the numbers are.
      title: what is the same for all.

    Returns:
      The picture; all panels share one scale.
    """
    from matplotlib.ticker import LogLocator

    plt = pyplot()
    values = [v for panel in panels.values() for row in panel.values() for v in row
              if v is not None]  # fmt: skip
    high = max(values)
    logs = min(values) > 0 and high > 8 * min(values)
    colors = plt.matplotlib.colors
    norm = colors.LogNorm(min(values), high) if logs else colors.Normalize(min(0, *values), high)
    heights = [len(panel) for panel in panels.values()]
    figure, places = plt.subplots(
        len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights},
        figsize=(WIDTH, 1.1 + 0.75 * len(panels) + 0.25 * sum(heights)),
    )  # fmt: skip
    for axes, (label, panel) in zip(places.flat, panels.items(), strict=True):
        grid = np.array([[math.nan if v is None else v for v in row] for row in panel.values()])
        shown = axes.imshow(grid, norm=norm, cmap="cividis", aspect="auto")
        axes.set_xticks(range(len(tested)), tested, rotation=30, ha="right",
                        rotation_mode="anchor")  # fmt: skip
        axes.set_yticks(range(len(panel)), list(panel))
        axes.set_title(textwrap.fill(label, _LINE - 16))
        axes.set_ylabel("calibrated on")
        for (i, j), value in np.ndenumerate(grid):
            if not math.isnan(value):
                axes.text(
                    j, i, words.fixed(value, 2 if high < 10 else 1 if high < 100 else 0),
                    fontsize=7.5, ha="center", va="center",
                    color="white" if norm(value) < 0.55 else "black",
                )  # fmt: skip
    places.flat[-1].set_xlabel("scored on")
    figure.suptitle(textwrap.fill(title, _LINE), fontsize=8.5, x=0.01, ha="left", color=INK)
    bar = figure.colorbar(
        shown, ax=list(places.flat), location="bottom", aspect=30, fraction=0.05, pad=0.02
    )
    bar.set_label(textwrap.fill(what, _LINE))
    if logs:
        bar.locator = LogLocator(subs=(1, 2, 5))
        bar.update_ticks()
    bar.ax.minorticks_off()
    bar.ax.xaxis.set_major_formatter("{x:g}")
    return finish(figure)

"""The picture of `query_projection.py`: speed-up over dense against the size of the model."""

from pathlib import Path
from typing import Any

import numpy as np

# Okabe & Ito's colours, which the colour-blind tell apart; every line has a marker too.
_LOOKS = {
    "awq": ("AWQ", {"color": "#CC79A7", "marker": "v", "markersize": 11, "fillstyle": "none"}),
    "ttq r=0": ("TTQ r = 0", {"color": "#E69F00", "marker": "D", "markersize": 5}),
    "ttq r=16": ("TTQ r = 16", {"color": "#D55E00", "marker": "s"}),
    "once": ("TTQ r = 0 and its share of the quantization",
             {"color": "#0072B2", "marker": "o", "linestyle": "--"}),
}  # fmt: skip


def draw(results: list[dict[str, Any]], billions: dict[str, float], path: Path) -> None:
    """A row per result, a column per grid; `billions` of parameters by model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grids = sorted({(r["group_size"], r["bits"]) for one in results for r in one["records"]})
    figure, axes = plt.subplots(
        len(results), len(grids), figsize=(4 * len(grids), 3.3 * len(results) + 0.6),
        squeeze=False, sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for row, result in zip(axes, results, strict=True):
        for axis, (group_size, bits) in zip(row, grids, strict=True):
            records = [r for r in result["records"] if r["group_size"] == group_size]
            panel(axis, billions, [r for r in records if r["bits"] == bits])
            axis.set_title(f"{result['chip']}, {bits} bits, group {group_size}")
        how = "measured" if result["unit"] == "microseconds" else "estimated"
        row[0].set_ylabel(f"speed-up over dense {result['dtype']}\n{how}, rows: {result['m']}")
    for axis in axes[-1]:
        axis.set_xlabel("billions of parameters")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False,
        title=f"a prompt's quantization is shared by {results[0]['answer_tokens']} tokens",
    )  # fmt: skip
    figure.savefig(path, dpi=110)


def panel(axis: Any, billions: dict[str, float], records: list[dict[str, Any]]) -> None:
    """One grid of one result."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    sizes = [billions[r["model"]] for r in records]
    for name, (label, look) in _LOOKS.items():
        found = [r["quantization"] if name == "once" else r["decode"][name] for r in records]
        # None becomes NaN, which leaves a gap.
        speedups = np.array([one["speedup"] for one in found], float)
        ends = np.array([one["speedup_quartiles"] or [np.nan] * 2 for one in found]).T
        axis.errorbar(sizes, speedups, np.abs(ends - speedups), label=label, capsize=2, **look)
    axis.axhline(1, color="black", linewidth=1, label="dense")
    axis.set(xscale="log", yscale="log", xticks=sizes)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6)))
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        one.set_minor_locator(NullLocator())
    axis.grid(visible=True, alpha=0.3)

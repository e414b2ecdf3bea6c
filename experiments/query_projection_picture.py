"""The picture of `query_projection.py`: speed-up over dense against the size of the model."""

from pathlib import Path
from typing import Any

import numpy as np

from ttq_jax.sweeps.looks import INK, look, pyplot, save

# AWQ's points lie on TTQ's: around them they can be seen.
_LOOKS = {
    "awq": ("AWQ", look("awq") | {"markersize": 10, "fillstyle": "none"}),
    "ttq r=0": ("TTQ r = 0", look("ttq")),
    "ttq r=16": ("TTQ r = 16", look("ttq", 1)),
    "once": ("TTQ r = 0 and its share of the quantization", look("ttq", 2)),
}  # fmt: skip


def draw(results: list[dict[str, Any]], billions: dict[str, float], path: Path) -> None:
    """A row per result, a column per grid; `billions` of parameters by model."""
    grids = sorted({(r["group_size"], r["bits"]) for one in results for r in one["records"]})
    figure, axes = pyplot().subplots(
        len(results), len(grids), figsize=(2.7 * len(grids), 2.5 * len(results) + 0.6),
        squeeze=False, sharex=True, sharey=True,
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
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
        title=f"a prompt's quantization is shared by {results[0]['answer_tokens']} tokens",
    )  # fmt: skip
    save(figure, path)


def panel(axis: Any, billions: dict[str, float], records: list[dict[str, Any]]) -> None:
    """One grid of one result."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    sizes = [billions[r["model"]] for r in records]
    for name, (label, style) in _LOOKS.items():
        found = [r["quantization"] if name == "once" else r["decode"][name] for r in records]
        # None becomes NaN, which leaves a gap.
        speedups = np.array([one["speedup"] for one in found], float)
        ends = np.array([one["speedup_quartiles"] or [np.nan] * 2 for one in found]).T
        axis.errorbar(sizes, speedups, np.abs(ends - speedups), label=label, capsize=2, **style)
    axis.axhline(1, color=INK, linewidth=1, label="dense")
    axis.set(xscale="log", yscale="log", xticks=sizes)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6)))
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        one.set_minor_locator(NullLocator())
    axis.grid(visible=True, alpha=0.3)

"""The picture of `quality.py report`: gap against stored bits, a panel per model."""

import textwrap
from pathlib import Path

import numpy as np

from ttq_jax.checkpoint.packaged import CONTENTS
from ttq_jax.sweeps.looks import look, pyplot, save
from ttq_jax.sweeps.pictures import averaged, percent
from ttq_jax.sweeps.words import label, titled


def said(name: str, recipe: dict) -> str:
    """A recipe's name, as in `quality.NAMES`, in words."""
    if name.endswith(".toml"):
        return f"{Path(name).stem}, widths chosen for each layer"
    values = {"recipe": name.split("-")[0], "bits": recipe["grid"]["bits"],
              "group_size": recipe["grid"]["group_size"]}  # fmt: skip
    if recipe["low_rank"]["rank"]:
        values["rank"] = recipe["low_rank"]["rank"]
    if calibration := name.partition("@")[2]:
        values["calibration"] = calibration
    before = recipe["grid"].get("scales", "float") == "float" and values["recipe"] == "best"
    more = ", no prior" * ("-n0" in name) + ", bfloat16 scales" * before
    return label(values, list(values)[1:]) + more


def draw(found: dict[str, dict], path: Path) -> None:
    """A marker per recipe with its name; only recipes that read the prompt with full weights."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, axes = pyplot().subplots(len(found), 1, figsize=(5.2, 3.6 * len(found)), squeeze=False)
    for axis, (model, recipes) in zip(axes.flat, found.items(), strict=True):
        shown = {name: one for name, one in recipes.items() if one["prefill"] == "full"}
        for name, one in shown.items():
            family = name if name.endswith(".toml") else name.split("-")[0]
            style = look(family) | {"linestyle": "", "markersize": 6, "capsize": 2.5}
            value, ends = one["gap"][0], one["interval"]
            reach = None if ends is None else np.abs(np.subtract(ends, 1 + value))[:, None]
            axis.errorbar(one["bits"], value, yerr=reach, **style)
            # They lie a little to the left of their neighbours.
            last = max(o["bits"] for o in shown.values())
            left = family in {"gptq", "best"} or one["bits"] == last
            axis.annotate(
                textwrap.fill(said(name, one["recipe"]), 26), (one["bits"], value),
                xytext=(-7 if left else 7, 0), textcoords="offset points", fontsize=8,
                va="center", ha="right" if left else "left",
            )  # fmt: skip
        one = next(iter(recipes.values()))
        name = titled(*CONTENTS.get(model, (model, "")))
        axis.set_title(f"{name}, causal protocol, {one['windows']} windows of each corpus")
        high = averaged(has_gap=True, corpora=len(one["by_corpus"]))
        axis.set(yscale="log", xlabel="stored bits per weight of the linear layers",
                 ylabel=high.replace(" over", "\nover").replace(", ", ",\n"))  # fmt: skip
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter(FuncFormatter(percent))
        axis.minorticks_off()
        axis.margins(x=0.18, y=0.08)
        axis.grid(visible=True)
    save(figure, path)

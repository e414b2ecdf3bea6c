"""What `learned_recipe.py` learned, beside the closed forms: scores, table and picture."""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from quality import Results, corpus_text, gaps, interval, protocol_data, ratio, spread
from straight_through import START, Setting, Theta, loss_of

import ttq_jax as ttq
from ttq_jax.evaluation.corpora import sha256
from ttq_jax.evaluation.describe import device, table, versions
from ttq_jax.evaluation.perplexity import Protocol, window_nll
from ttq_jax.offline.calibrate import prepare
from ttq_jax.prefill import decoded_shapes
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.grid import Grid
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.scaling import SearchedAlpha
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.sweeps.looks import INK, pyplot, save
from ttq_jax.types import Offline, effective_bits


def closed_forms(grid: Grid) -> dict[str, Recipe | None]:
    """What the learned numbers are measured against, on the same grid."""
    ttq_recipe = Recipe(grid=grid)
    with_ = partial(dataclasses.replace, ttq_recipe)
    return {
        "none": None,
        "ttq": ttq_recipe,
        "ttq, clip search": with_(rounding=ClipSearch()),
        "ttq, searched scale": with_(scale=SearchedAlpha()),
        "ttq, second order": with_(rounding=SecondOrder()),
    }


@dataclasses.dataclass(frozen=True)
class Learned:
    """What `train` wrote."""

    data: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Learned":
        try:
            data = json.loads(path.read_text())
            return cls(data | {"grid": Grid(**data["grid"])})
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as e:
            raise SystemExit(f"{path}: expected a file that train wrote ({e})") from e

    @property
    def name(self) -> str:
        return f"learned on {self.data['corpus']}, {self.data['variant']}"

    @property
    def theta(self) -> Theta:
        found = {k: jnp.asarray(self.data["theta"][k], jnp.float32) for k in _SYMBOLS}
        return Theta(alpha=found["alpha"], log_lam=jnp.log(found["lam"]), clip=found["clip"])

    @property
    def described(self) -> dict[str, Any]:
        """What tells this θ from another, as JSON data."""
        how = {k: self.data[k] for k in ("variant", "corpus", "loss", "steps", "learning_rate")}
        numbers = json.dumps(self.data["theta"], sort_keys=True)
        return {"learned": how, "theta_sha256": hashlib.sha256(numbers.encode()).hexdigest()}


_SYMBOLS = {"alpha": "α", "lam": "λ", "clip": "c"}


def contenders(
    model: ttq.Model, learned: list[Learned], setting: Setting
) -> Iterator[tuple[str, Any, float, Callable[[np.ndarray], float]]]:
    """(name, description, effective bits, nats of a window) of everything that is compared."""
    bits = {}
    for name, recipe in closed_forms(setting.grid).items():
        offline = prepare(model, recipe)
        shapes = decoded_shapes(model.params, model.config, recipe, offline)
        bits[name] = effective_bits(shapes)

        def closed(
            window: np.ndarray, recipe: Recipe | None = recipe, offline: Offline = offline
        ) -> float:
            return window_nll(
                model, window, recipe=recipe, offline=offline, protocol=setting.protocol
            )

        yield name, None if recipe is None else recipe.describe(), bits[name], closed
    for one in learned:
        theta = one.theta

        def ours(window: np.ndarray, theta: Theta = theta) -> float:
            each = loss_of(theta, model.params, jnp.asarray(window), setting=setting, kind="nll")
            return float(each) * setting.protocol.scored

        # θ leaves its trace in scales and zero points alone: as many bits as ttq.
        yield one.name, one.described, bits["ttq"], ours


def score(args: argparse.Namespace) -> None:
    """Scores closed forms and learned numbers on the same windows, one row per text and name."""
    if args.windows < 1:
        raise SystemExit(f"windows: expected at least 1, got {args.windows}")
    learned = [Learned.read(path) for path in args.learned]
    first = learned[0].data
    for one in learned:
        for key in ("model", "grid"):
            if one.data[key] != first[key]:
                raise SystemExit(
                    f"{one.name} has {key} {one.data[key]}, {learned[0].name} has {first[key]}; "
                    "score them apart"
                )
    model = ttq.load(first["model"])
    setting = Setting(
        config=model.config, grid=first["grid"],
        protocol=Protocol(window=args.window, prompt_tokens=args.prompt_tokens),
    )  # fmt: skip
    texts = dict(map(corpus_text, args.corpus))
    windows = {c: ttq.cut_windows(model.tokenizer, t, args.window) for c, t in texts.items()}
    protocol, store = protocol_data(setting.protocol), Results(args.out)
    for name, described, bits, nats in contenders(model, learned, setting):
        for corpus, cut in windows.items():
            at = spread(len(cut), args.windows)
            row = store.read().get((name, corpus), {"nll": []})
            if (row.get("recipe", described), row.get("protocol", protocol)) != (
                described, protocol,
            ):  # fmt: skip
                raise SystemExit(
                    f"{args.out} has {name} on {corpus} by other numbers or another protocol; "
                    "choose another --out"
                )
            missing = cut[at[len(row["nll"]) :]]
            if not len(missing):
                continue
            nll = row["nll"] + [nats(window) for window in missing]
            store.write(store.read() | {(name, corpus): {
                "model": first["model"], "recipe_name": name, "corpus": corpus,
                "corpus_sha256": sha256(texts[corpus]), "protocol": protocol,
                "scored": setting.protocol.scored, "effective_bits": round(bits, 4),
                "recipe": described, "windows": at[: len(nll)], "nll": nll,
                "device": device(), "versions": versions(),
            }})  # fmt: skip
            print(f"{name}, {corpus}: {len(nll)} windows", file=sys.stderr, flush=True)


def report(args: argparse.Namespace) -> None:
    """Prints gap and perplexity by text, then what was learned; draws it."""
    learned = [Learned.read(path) for path in args.learned]
    rows = Results(args.rows).read()
    if not {"none", "ttq"} <= {name for name, _ in rows}:
        raise SystemExit(f"{args.rows}: expected rows that score wrote, none and ttq among them")
    found = gaps(rows)
    corpora, n = list(found["none"]["by_corpus"]), found["none"]["windows"]
    cells = [["", "bits", "mean gap", "over ttq", *corpora]]
    for name, one in found.items():
        means = ["", ""]
        if name != "none":
            means = [interval(one), ratio(one, found["ttq"])]
        each = [
            f"{np.exp(np.mean(rows[name, c]['nll'][:n]) / rows[name, c]['scored']):.2f}"
            + ("" if name == "none" else f" ({one['by_corpus'][c]:.3f})")
            for c in corpora
        ]
        cells.append([name, f"{one['bits']:.2f}", *means, *each])
    first = next(iter(rows.values()))
    p = first["protocol"]
    print(
        f"{first['model']}: perplexity (gap), {n} windows of {p['window']} tokens per text, "
        f"{p['kind']}, prompt {p['prompt_tokens']}\n\n{table(cells)}\n"
    )
    for one in learned:
        print(f"{one.name}: {one.data['steps']} steps\n\n{table(numbers_of(one))}\n")
        curve = one.data["held_out_loss"]
        print("held out:", ", ".join(f"{v:.4f} ({at})" for at, v in curve), "\n")
    if args.picture:
        draw(learned, args.picture)


def numbers_of(learned: Learned) -> list[list[str]]:
    """α, λ and c as cells: the value, or mean and range over the layers."""
    theta = learned.data["theta"]
    rows = [["", *_SYMBOLS.values()]]
    for i in range(len(theta["alpha"])):
        name = theta["projections"][i] if len(theta["alpha"]) > 1 else "all"
        values = [np.array(theta[key][i]) for key in _SYMBOLS]
        rows.append([name, *(
            f"{v.mean():.3f}" + (f" [{v.min():.2f}, {v.max():.2f}]" if len(v) > 1 else "")
            for v in values
        )])  # fmt: skip
    return rows


# Okabe & Ito's colours, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", INK)


def draw(learned: list[Learned], path: Path) -> None:
    """A column per learned θ: its α and c by layer, a line per projection; and the losses."""
    plt = pyplot()
    layers = max(len(v) for one in learned for v in one.data["theta"]["alpha"])
    figure, axes = plt.subplots(
        3, len(learned), figsize=(3.2 * len(learned), 8), squeeze=False, sharex="row",
        sharey="row",
    )  # fmt: skip
    for (alphas, clips, losses), one in zip(axes.T, learned, strict=True):
        theta = one.data["theta"]
        for axis, key in ((alphas, "alpha"), (clips, "clip")):
            axis.axhline(first_value(key), color="#999999", linestyle=":", label="closed form")
            for i, values in enumerate(theta[key]):
                name = theta["projections"][i] if len(theta[key]) > 1 else "all"
                # One number for all layers is a level line across them.
                axis.plot(np.broadcast_to(values, layers), color=_COLOURS[i % len(_COLOURS)],
                          label=name, linewidth=1.3)  # fmt: skip
            axis.set(ylabel=_SYMBOLS[key], xlabel="layer", title=one.name)
        losses.plot(one.data["training_loss"], color="#BBBBBB", label="a window each")
        losses.plot(*zip(*one.data["held_out_loss"], strict=True), color="#0072B2", marker="o",
                    label="held out")  # fmt: skip
        losses.set(xlabel="step", ylabel=f"{one.data['loss']}, nats per token")
    lines = {}
    for axis in axes.flat:
        lines |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)
    save(figure, path)


def first_value(key: str) -> float:
    return {"alpha": START.alpha, "lam": START.lam, "clip": 1.0}[key]

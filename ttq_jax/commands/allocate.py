"""`ttq allocate`: chooses the bits of each projection of each layer, within a budget."""

import argparse
import dataclasses

import numpy as np

from ttq_jax.checkpoint import Model
from ttq_jax.commands.inspect import packed_shapes
from ttq_jax.commands.options import check_file, needs_of, recipe_of
from ttq_jax.commands.output import print_json, print_text
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.corpora import cut_windows, sha256
from ttq_jax.evaluation.describe import made_by, table
from ttq_jax.evaluation.preparation import calibration_text, corpus_text, load_model, windows_read
from ttq_jax.evaluation.progress import Progress
from ttq_jax.offline.allocate import Measured, allocate, measure_widths
from ttq_jax.offline.calibrate import prepare_unpacked
from ttq_jax.partition import on
from ttq_jax.quant.grid import BITS
from ttq_jax.quant.names import quantizes_nothing
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.recipe_text import save_recipe, to_toml
from ttq_jax.quant.tree import check_selection
from ttq_jax.types import QuantizedLinear, effective_bits, kernels


def judged(measured: Measured, recipe: Recipe) -> tuple[float, float]:
    """Size and error of a recipe's widths, over all its projections.

    Args:
      measured: with all of its widths.
      recipe: how wide each projection is.

    Returns:
      (stored bits per weight that is quantized, estimated divergence in nats per token).
    """
    stored, left, weights = 0.0, 0.0, 0
    for name, errors in measured.errors.items():
        for row, grid in zip(errors, recipe.grids(name, len(errors)), strict=True):
            at = measured.widths.index(grid.bits)
            stored, left = stored + measured.bits[name][at], left + row[at]
            weights += measured.weights[name]
    return float(stored / weights), float(left)


def _layers_by_width(measured: Measured, recipe: Recipe) -> list[list[str]]:
    """A table: how many layers of each projection have each width."""
    rows = [["layers at", *(f"{b} bits" for b in measured.widths)]]
    for name, errors in measured.errors.items():
        bits = [grid.bits for grid in recipe.grids(name, len(errors))]
        rows.append([name, *(str(bits.count(b)) for b in measured.widths)])
    return rows


def _checked_widths(given: list[int]) -> tuple[int, ...]:
    """The widths to choose from, ascending.

    Raises:
      ConfigError: fewer than two, or one that does not exist.
    """
    widths = tuple(sorted(set(given)))
    if len(widths) < 2 or not set(widths) <= set(BITS):
        raise ConfigError(
            f"--widths: expected at least two of {', '.join(map(str, BITS))}, got "
            f"{' '.join(map(str, given))}"
        )
    return widths


def sizes(model: Model, recipe: Recipe, widths: tuple[int, ...]) -> tuple[float, float]:
    """What the narrowest and the widest codes need everywhere, found without quantizing.

    Args:
      model: the unquantized model.
      recipe: its groups, zero points and low rank count; its own bits do not.
      widths: to choose from, ascending.

    Returns:
      Stored bits per weight that is quantized.
    """

    def size(bits: int) -> float:
        grid = dataclasses.replace(recipe.grid, bits=bits)
        shapes = packed_shapes(model, dataclasses.replace(recipe, grid=grid, widths=()))
        packed = {
            name: {"kernel": kernel}
            for name, kernel in kernels(shapes["layers"]).items()
            if isinstance(kernel, QuantizedLinear)
        }
        return effective_bits({"layers": packed})

    return size(widths[0]), size(widths[-1])


def _check_budget(budget: float, low: float, high: float, widths: tuple[int, ...]) -> None:
    """Refuses a budget that leaves nothing to choose.

    Raises:
      ConfigError: it does.
    """
    if not low <= budget <= high:
        raise ConfigError(
            f"--budget: expected {low:.3f} to {high:.3f} stored bits per weight, the sizes at "
            f"{widths[0]} and at {widths[-1]} bits everywhere, got {budget:g}"
        )


def run(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq allocate`.

    Args:
      args: its options.
      progress: where to show it.

    Raises:
      ConfigError: an option out of range, a text too short, a recipe that quantizes nothing, or
        a file that cannot be written.
    """
    recipe, widths = recipe_of(args), _checked_widths(args.widths)
    if recipe is None:
        raise ConfigError(quantizes_nothing(args.method, "there are no bits to allocate"))
    if not args.budget > widths[0]:
        raise ConfigError(
            f"--budget: expected more than the {widths[0]} bits of the narrowest codes, to which "
            f"their scales are added, got {args.budget:g}"
        )
    if args.bits is not None:
        progress.note("--bits has no effect: the budget chooses among --widths")
    check_file(args.out)
    with progress.stage(f"reading {args.corpus}"):
        corpus = corpus_text(args.corpus)
    needs = needs_of(args, recipe)
    text = calibration_text(needs, progress)
    model, _ = load_model(
        args.model, args.dtype, progress, args.ignore_key,
        mesh=args.mesh, dense_memory=args.dense_memory,
    )  # fmt: skip
    with on(model.mesh):
        check_selection(model.params, recipe)
        _check_budget(args.budget, *sizes(model, recipe, widths), widths)
    cut = cut_windows(model.tokenizer, corpus, args.window)
    at = np.linspace(0, len(cut) - 1, min(args.max_windows, len(cut))).astype(int)
    with progress.stage("measuring widths") as update:
        offline = prepare_unpacked(model, recipe, windows_read(needs, model, text))
        with on(model.mesh):
            measured = measure_widths(
                model.params, cut[at], recipe, offline, config=model.config,
                prompt_tokens=args.prompt_tokens, widths=widths, progress=update,
            )  # fmt: skip
    made = dataclasses.replace(recipe, widths=allocate(measured, args.budget))
    bits, found = judged(measured, made)
    flat = {b: dataclasses.replace(recipe.grid, bits=b) for b in widths}
    uniform = {
        b: judged(measured, dataclasses.replace(recipe, widths=(), grid=grid))[1]
        for b, grid in flat.items()
    }
    failure = None
    try:
        save_recipe(args.out, made)
    except ConfigError as e:
        failure = e  # what was found is printed first: it took long
    if args.json:
        print_json(made_by(model) | {
            "method": args.method, "recipe": made.describe(),
            "stored_bits": bits, "divergence": found, "uniform_divergence": uniform,
            "corpus": args.corpus, "corpus_sha256": sha256(corpus), "windows": len(at),
            "out": None if failure else args.out,
        })  # fmt: skip
    else:
        print_text(table(_layers_by_width(measured, made)))
        others = ", ".join(f"{value:.4f} at {b} bits everywhere" for b, value in uniform.items())
        print_text(f"\n{bits:.3f} stored bits per quantized weight")
        print_text(f"estimated divergence {found:.4f} nats per token ({others})")
        end = f"saved to {args.out}; use it with --recipe {args.out} and the same model"
        print_text(f"\n{to_toml(made)}" if failure else end)
    if failure:
        raise failure

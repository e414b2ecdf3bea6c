"""`ttq prepare`: computes and saves what a recipe needs before any prompt."""

import argparse
from pathlib import Path

from ttq_jax.checkpoint.store import check_destination, save_offline
from ttq_jax.commands.options import needs_of, recipe_of
from ttq_jax.commands.output import print_json, print_text
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.describe import made_by, megabytes
from ttq_jax.evaluation.preparation import calibration_text, load_model, prepare_offline
from ttq_jax.evaluation.progress import Progress
from ttq_jax.partition import on
from ttq_jax.quant.tree import check_selection
from ttq_jax.types import Offline, kernels, stored_bytes


def parts(offline: Offline) -> dict[str, int]:
    """The bytes of each part that is saved; of a packed tree, its linear layers."""
    packed = None if offline.packed is None else kernels(offline.packed["layers"])
    sizes = {
        "moments": stored_bytes(offline.moments),
        "static factors": stored_bytes(offline.low_rank),
        "quantized weights": stored_bytes(packed),
    }
    return {what: size for what, size in sizes.items() if size}


def run(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq prepare`.

    Args:
      args: its options.
      progress: where to show it.

    Raises:
      ConfigError: a recipe that needs nothing before a prompt.
    """
    recipe = recipe_of(args)
    needs = needs_of(args, recipe)
    if recipe is None or not needs.anything:
        raise ConfigError(
            f"recipe {args.method} needs nothing besides the prompt, so there is nothing to prepare"
        )
    place = Path(args.out).expanduser()
    check_destination(place)
    text = calibration_text(needs, progress)
    model, _ = load_model(
        args.model, args.dtype, progress, args.ignore_key, recipe,
        mesh=args.mesh, dense_memory=args.dense_memory,
    )  # fmt: skip
    with on(model.mesh):
        check_selection(model.params, recipe)
    offline, seconds = prepare_offline(needs, model, text, progress)
    found = parts(offline)
    with progress.stage(f"writing {args.out}"):
        save_offline(place, model, recipe, offline)
    if args.json:
        print_json(made_by(model) | {
            "method": args.method, "recipe": recipe.describe(), "out": args.out, "bytes": found,
            "seconds": round(seconds, 3),
        })  # fmt: skip
        return
    print_text(", ".join(f"{what} {megabytes(size)}" for what, size in found.items()))
    print_text(
        f"saved to {args.out}; use it with --prepared {args.out} and the same model and recipe"
    )

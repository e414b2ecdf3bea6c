"""From options to what the library takes: recipe, model, prompts, calibration."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from ttq_jax.checkpoint import Model, load
from ttq_jax.checkpoint.store import load_offline
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.corpora import calibration_windows, read_corpus, read_file
from ttq_jax.evaluation.progress import Progress
from ttq_jax.offline.calibrate import prepare
from ttq_jax.prompts import PromptError
from ttq_jax.quant.recipe import RULE_NAMES, Recipe, check_clip, preset
from ttq_jax.quant.recipe_text import load_recipe, with_settings
from ttq_jax.quant.scaling import PowerLaw
from ttq_jax.types import Offline, kernels

# Options that are short for a setting.
_SHORT = {
    "bits": "grid.bits",
    "group_size": "grid.group_size",
    "symmetric": "grid.symmetric",
    "zero_point": "grid.zero_point",
    "store_dtype": "grid.store_dtype",
    "rank": "low_rank.rank",
    "prefill": "prefill",
    "select": "select",
}
_LAW = ("alpha", "lam", "p")


def recipe_of(args: argparse.Namespace) -> Recipe | None:
    """The recipe that the options describe: preset or file, then the short options, then --set.

    Args:
      args: with the quantization options.

    Returns:
      The recipe; None for "none", which the short options do not change.

    Raises:
      ConfigError: an option out of range, or one that the recipe does not read.
    """
    name = args.method
    base = load_recipe(name) if name.endswith(".toml") else preset(name)
    law = {k: f"scale.{k}={v!r}" for k in _LAW if (v := getattr(args, k)) is not None}
    if base is None:
        given: dict[str, Any] = {f"--{k}": True for k in law}
        given |= {"--set": args.settings, "--save-recipe": getattr(args, "save_recipe", None)}
        for option, value in given.items():
            if value:
                raise ConfigError(f"recipe {name} quantizes nothing, so {option} has no use")
        return None
    short = [f"{s}={getattr(args, k)}" for k, s in _SHORT.items() if getattr(args, k) is not None]
    if args.clip:
        check_clip(name, base)
        short.append("rounding=clip")
    if getattr(args, "per_prompt", False):
        short.append("batch=per_prompt")
    made = with_settings(base, [*short, *args.settings])
    if not law:
        return made
    if not isinstance(made.scale, PowerLaw):
        scale = RULE_NAMES[type(made.scale)]
        raise ConfigError(
            f"--{next(iter(law))} belongs to a power-law scale, but the scale of recipe {name} is "
            f"{scale}; use a recipe with a power law (ttq), or --set scale=power_law"
        )
    return with_settings(base, [*short, *law.values(), *args.settings])


def load_model(
    name: str, dtype: Literal["float32", "bfloat16"], progress: Progress
) -> tuple[Model, float]:
    """Loads a model, showing how far it is.

    Args:
      name: see `checkpoint.load`.
      dtype: see `checkpoint.load`.
      progress: where to show it.

    Returns:
      The model and the seconds it took.
    """
    start = time.perf_counter()
    with progress.stage(f"loading {name}") as update:
        model = load(name, dtype=dtype, progress=lambda done, total, _: update(done, total))
    return model, time.perf_counter() - start


def check_selection(model: Model, recipe: Recipe | None) -> None:
    """Refuses a recipe that would quantize nothing.

    Args:
      model: the unquantized model.
      recipe: None for not at all.

    Raises:
      ConfigError: no projection of this model is selected.
    """
    names = list(kernels(model.params["layers"]))
    if recipe is not None and not any(map(recipe.selects, names)):
        paths = ", ".join(f"layers/{name}" for name in names)
        raise ConfigError(f"select: {recipe.select!r} matches none of {paths}")


def calibration_text(
    args: argparse.Namespace, recipe: Recipe | None, progress: Progress
) -> str | None:
    """The calibration corpus of a recipe that reads one, before anything slow begins.

    Args:
      args: with the calibration options.
      recipe: None for not at all.
      progress: gets a note if a corpus was given in vain.

    Returns:
      The text; None if the recipe reads none.

    Raises:
      ConfigError: it needs one and none was given.
    """
    prepared = getattr(args, "prepared", None)
    needed = recipe is not None and recipe.source.reads_corpus and not prepared
    if needed and args.calibration is None:
        raise ConfigError(
            f"recipe {args.method} reads a corpus's moments here: give a text (--calibration FILE) "
            "or what ttq prepare saved (--prepared DIR); moments of the prompt alone, as in recipe "
            "ttq, and a prior from the weights or from samples need neither"
        )
    if not needed and args.calibration is not None:
        why = f"{prepared} is used" if prepared else f"recipe {args.method} reads none"
        progress.note(f"the calibration corpus is not read: {why}")
    return read_corpus(args.calibration) if needed else None


def prepare_offline(
    args: argparse.Namespace, model: Model, recipe: Recipe | None, text: str | None,
    progress: Progress,
) -> tuple[Offline, float]:  # fmt: skip
    """What the recipe needs besides the prompt, showing how far it is.

    Args:
      args: with the calibration options.
      model: the unquantized model.
      recipe: None for not at all.
      text: from `calibration_text`.
      progress: where to show it.

    Returns:
      What `generate` takes as `offline`, and the seconds it took.
    """
    start, prepared = time.perf_counter(), getattr(args, "prepared", None)
    if recipe is None:
        if prepared:
            progress.note(f"recipe {args.method} quantizes nothing; {prepared} is not read")
        return Offline(), 0.0
    if prepared:
        with progress.stage(f"loading {prepared}"):
            kept = load_offline(Path(prepared).expanduser(), model, recipe)
        return kept, time.perf_counter() - start
    if not prepares(recipe):
        return prepare(model, recipe), 0.0
    windows = windows_read(args, model, text)
    with progress.stage(f"preparing {args.method}") as update:
        offline = jax.block_until_ready(prepare(model, recipe, windows, update))
    return offline, time.perf_counter() - start


def windows_read(args: argparse.Namespace, model: Model, text: str | None) -> np.ndarray | None:
    """The windows of a calibration text that a recipe's moments come from.

    Args:
      args: with the calibration options.
      model: its tokenizer cuts them, no longer than its context.
      text: from `calibration_text`.

    Returns:
      int32[n, W]; None without a text.
    """
    if text is None:
        return None
    return calibration_windows(
        model.tokenizer, text, tokens=args.calibration_tokens,
        window=min(512, model.config.max_positions),
    )  # fmt: skip


def prepares(recipe: Recipe) -> bool:
    """Whether anything is made ahead of a prompt: a tree, a prior's moments or static factors."""
    source = recipe.source
    return source.of != "prompt" or source.prior != "none" or recipe.low_rank.rank > 0


def _read_prompts(path: str) -> str:
    """The text of a prompts file, "-" being standard input.

    Raises:
      PromptError: it is not UTF-8.
    """
    if path != "-":
        return read_file(Path(path).expanduser())
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise PromptError(f"standard input: expected UTF-8 text, byte {e.start} is not") from e


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The prompts, none empty.

    Args:
      args: with a prompt or the name of a prompts file.

    Returns:
      One text per prompt.

    Raises:
      PromptError: one is empty, or the file cannot be read.
    """
    if args.prompt is not None:
        prompts, where = [args.prompt], "the prompt"
    else:
        where = "standard input" if args.prompts_file == "-" else args.prompts_file
        prompts = _read_prompts(args.prompts_file).removesuffix("\n").split("\n")
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            line = "" if args.prompt is not None else f", line {i + 1}"
            raise PromptError(f"{where}{line}: expected some text, found none")
    return prompts

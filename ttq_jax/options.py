"""From options to what the library takes: recipe, model, prompts, calibration."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax

from ttq_jax.calibrate import prepare
from ttq_jax.checkpoint import Model, load
from ttq_jax.config import ConfigError
from ttq_jax.corpora import calibration_windows, read_corpus, read_file
from ttq_jax.progress import Progress
from ttq_jax.prompts import PromptError
from ttq_jax.quant.recipe import Recipe, preset
from ttq_jax.quant.scaling import PowerLaw
from ttq_jax.types import Offline, kernels


def recipe_of(args: argparse.Namespace, *, batch: str = "pooled") -> Recipe | None:
    """The recipe that the options describe.

    Args:
      args: with the quantization options.
      batch: "pooled" or "per_prompt".

    Returns:
      The recipe; None for method "none".

    Raises:
      ConfigError: an option out of range, or one that the method does not read.
    """
    names = ("zero_point", "store_dtype", "prefill", "select")
    choices: dict[str, Any] = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    choices["batch"] = batch
    law = {k: getattr(args, k) for k in ("alpha", "lam", "p") if getattr(args, k) is not None}
    if law and args.method != "ttq":
        raise ConfigError(f"--{next(iter(law))} belongs to method ttq, not to {args.method}")
    if law:
        choices["scale"] = PowerLaw(**law)
    return preset(
        args.method, bits=args.bits, group_size=args.group_size, rank=args.rank,
        symmetric=args.symmetric, clip=args.clip, **choices,
    )  # fmt: skip


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
    needed = recipe is not None and recipe.moments == "corpus"
    if needed and args.calibration is None:
        raise ConfigError(
            f"method {args.method} needs a calibration corpus: give --calibration FILE, or use "
            "method ttq, which needs none"
        )
    if not needed and args.calibration is not None:
        progress.note(f"method {args.method} reads no calibration corpus; not reading it")
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
    start = time.perf_counter()
    if recipe is None:
        return Offline(), 0.0
    windows = None
    if text is not None:
        windows = calibration_windows(
            model.tokenizer, text, tokens=args.calibration_tokens,
            window=min(512, model.config.max_positions),
        )  # fmt: skip
    if recipe.moments == "prompt" and not recipe.low_rank.rank:
        return prepare(model, recipe), 0.0
    with progress.stage(f"preparing {args.method}") as update:
        offline = jax.block_until_ready(prepare(model, recipe, windows, update))
    return offline, time.perf_counter() - start


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

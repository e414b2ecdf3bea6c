"""From options to what the library takes: the recipe, what it needs, the prompts."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ttq_jax.chat.ask import check_messages
from ttq_jax.chat.render import Messages
from ttq_jax.checkpoint import Model
from ttq_jax.config import ConfigError
from ttq_jax.errors import shown
from ttq_jax.evaluation.corpora import begin_tokens, sha256
from ttq_jax.evaluation.preparation import Needs
from ttq_jax.evaluation.progress import Progress
from ttq_jax.files import check_destination
from ttq_jax.foreign import parse_json
from ttq_jax.processes import expect_same
from ttq_jax.prompts import PromptError
from ttq_jax.quant.names import quantizes_nothing
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.recipe_text import SHORT, recipe_named
from ttq_jax.sweeps.axes import Options
from ttq_jax.text import decode, read_text


def recipe_of(args: argparse.Namespace) -> Recipe | None:
    """The recipe that the options describe: preset or file, then the short options, then --set.

    Args:
      args: with the quantization options.

    Returns:
      The recipe; None for "none", which the short options do not change.

    Raises:
      ConfigError: an option out of range, or one that the recipe does not read.
    """
    short = {key: getattr(args, key, None) for key in SHORT}
    recipe = recipe_named(args.method, short, args.settings)
    if recipe is None and getattr(args, "save_recipe", None):
        raise ConfigError(quantizes_nothing(args.method, "--save-recipe has no effect"))
    expect_same("the recipe", None if recipe is None else recipe.describe())
    return recipe


def check_file(path: str | None) -> None:
    """Refuses, before any work, a file that could not be written after it.

    Args:
      path: of an option; None for none.

    Raises:
      ConfigError: it cannot be written.
    """
    if path is not None:
        try:
            check_destination(path)
        except OSError as e:
            raise ConfigError(f"{path}: cannot be written: {e.strerror}") from e


def cache_in_json(args: argparse.Namespace) -> dict[str, Any]:
    """How prompts were read and kept, where it was asked for.

    Args:
      args: with --prefill-chunk and --cache-dtype.

    Returns:
      JSON data.
    """
    asked = {"prefill_chunk": args.prefill_chunk, "cache_dtype": args.cache_dtype}
    return {name: value for name, value in asked.items() if value}


def note_unused(args: argparse.Namespace, recipe: Recipe | None, progress: Progress) -> None:
    """Notes the options that are given and not needed; those that a recipe cannot take are refused.

    Args:
      args: of `ttq generate` or `ttq perplexity`.
      recipe: from `recipe_of`.
      progress: gets a line for each.
    """
    given = vars(args)
    corpus = recipe is not None and recipe.source.reads_corpus and not given.get("prepared")
    notes = {
        "seed": (given.get("temperature") == 0, "at temperature 0 nothing is drawn"),
        "per_prompt": (given.get("batch_size") == 1, "one prompt has its own weights anyway"),
        "prompt_tokens": (given.get("protocol") == "window", "the whole window makes the weights"),
        "with_baseline": (recipe is None, "the model that is scored is the unquantized one"),
        "calibration_tokens": (not corpus, "no calibration corpus is read"),
    }
    for name, (unused, why) in notes.items():
        value = given.get(name)
        if unused and value not in {None, False, getattr(Options, name, None)}:
            progress.note(f"--{name.replace('_', '-')} has no effect: {why}")


def needs_of(args: argparse.Namespace, recipe: Recipe | None) -> Needs:
    """The sources of what the recipe needs besides the prompt.

    Args:
      args: with the calibration options.
      recipe: from `recipe_of`.

    Returns:
      The recipe with its sources.
    """
    return Needs(
        method=args.method, recipe=recipe, calibration=args.calibration,
        calibration_tokens=args.calibration_tokens, prepared=getattr(args, "prepared", None),
    )  # fmt: skip


def describe_text(
    args: argparse.Namespace, model: Model, corpus: str, calibration: str | None
) -> dict[str, Any]:
    """The texts that a measurement read, as JSON data.

    Args:
      args: with --corpus and the calibration options.
      model: its tokenizer cut the text.
      corpus: the text.
      calibration: the calibration corpus; None if none was read.

    Returns:
      Names, the text's hash, and whether each window begins with a begin-of-text token.
    """
    return {
        "corpus": args.corpus,
        "corpus_sha256": sha256(corpus),
        "bos": bool(begin_tokens(model.tokenizer)),
        "calibration": args.calibration if calibration is not None else None,
        "calibration_tokens": args.calibration_tokens if calibration is not None else None,
    }


def _read_prompts(path: str) -> str:
    """The text of a prompts file, "-" being standard input.

    Raises:
      PromptError: standard input is closed.
    """
    if path != "-":
        # A shell's <(command) is a pipe, which was asked for and will end.
        if Path(path).is_fifo():
            return decode(Path(path).read_bytes(), path, PromptError)
        return read_text(path, PromptError)
    if sys.stdin is None:
        raise PromptError("standard input: expected prompts, but it is closed; give a file")
    return decode(sys.stdin.buffer.read(), "standard input", PromptError)


def prompts_of(args: argparse.Namespace) -> list[Any]:
    """The prompts, none empty.

    Args:
      args: with a prompt or the name of a prompts file.

    Returns:
      One text per prompt; of JSON lines with --chat one list of messages per line.

    Raises:
      PromptError: one is empty or no conversation, or the file cannot be read.
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
    if args.chat and args.prompts_file and args.prompts_file.endswith(".jsonl"):
        return [_conversation(line, f"{where}, line {i + 1}") for i, line in enumerate(prompts)]
    return prompts


def _conversation(line: str, where: str) -> Messages:
    """The messages of one JSON line.

    Raises:
      PromptError: it is no conversation.
    """
    value = parse_json(line, where, PromptError)
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise PromptError(
            f"{where}: expected a list of messages, or an object with such a list as messages, got "
            f"{shown(value)}"
        )
    return check_messages(messages)

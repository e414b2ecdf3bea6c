"""`ttq generate`: continues prompts with weights made for them."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttq_jax.checkpoint import Model
from ttq_jax.checkpoint.store import check_destination, load_conversation, save_conversation
from ttq_jax.commands.options import check_file, needs_of, note_unused, prompts_of, recipe_of
from ttq_jax.commands.output import print_json, print_text
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.describe import describe_method, head
from ttq_jax.evaluation.preparation import calibration_text, load_model, prepare_offline
from ttq_jax.evaluation.progress import Progress
from ttq_jax.evaluation.timings import Timings, time_answers
from ttq_jax.generate import generate
from ttq_jax.prompts import pad_prompts
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.recipe_text import save_recipe
from ttq_jax.quant.tree import check_selection
from ttq_jax.sampling import Sampling
from ttq_jax.types import Generation, Offline


def _print_json(
    args: argparse.Namespace, model: Model, recipe: Recipe | None, made: Generation,
    prompts: Sequence[str], sampling: Sampling, timings: Timings | None,
) -> None:  # fmt: skip
    """One batch's answers, an object each."""
    rows = zip(
        prompts, made.texts, made.tokens, made.prompt_tokens, made.stopped, strict=True
    )  # fmt: skip
    for i, (prompt, text, tokens, length, stopped) in enumerate(rows):
        print_json(
            head(model, args.method, recipe, made.effective_bits)
            | {
                "model_bits": round(made.model_bits, 4),
                "prompt": prompt,
                "text": text,
                "prompt_tokens": length,
                "new_tokens": len(tokens),
                "max_new_tokens": args.max_new_tokens,
                "stopped": stopped,
                "sampling": dataclasses.asdict(sampling),
                "seed": args.seed or 0,
                "batch_size": len(prompts),
                **_experts_in_json(made),
                # Of the batch, so in its first row alone.
                "timings": timings.describe() if timings and not i else None,
            }
        )


def _experts_in_json(made: Generation) -> dict[str, float]:
    """The share of unreached experts, where there are any."""
    share = made.unreached_experts
    return {} if share is None else {"unreached_experts": round(share, 4)}


def _tell(
    args: argparse.Namespace, recipe: Recipe | None, made: Generation, timings: Timings | None,
    progress: Progress,
) -> None:  # fmt: skip
    """What is not the answer, on stderr."""
    new, why = sum(map(len, made.tokens)), ", ".join(sorted(set(made.stopped)))
    progress.note(f"{sum(made.prompt_tokens)} prompt tokens, {new} new; stopped by: {why}")
    bits = made.effective_bits, made.model_bits
    progress.note(describe_method(args.method, recipe, *bits))
    if made.unreached_experts is not None:
        progress.note(
            f"{made.unreached_experts:.0%} of the experts got no token of the prompt and were "
            "quantized by the prior"
        )
    if timings:
        progress.note(timings.in_words())


def _check_conversation(
    args: argparse.Namespace, recipe: Recipe | None, progress: Progress
) -> None:
    """Refuses a conversation whose turns would not remember each other.

    Raises:
      ConfigError: no decay, or several prompts at once.
    """
    decay = 0.0 if recipe is None else recipe.source.decay
    if args.conversation is None:
        if decay:
            progress.note(
                "moments.decay has no effect without --conversation: each prompt is a first turn"
            )
        return
    if not decay:
        raise ConfigError(
            f"--conversation: recipe {args.method} keeps nothing from turn to turn; set the weight "
            "of the earlier turns, above 0 and up to 1, as in --set moments.decay=0.5"
        )
    if args.batch_size != 1:
        raise ConfigError(
            f"--conversation: expected --batch-size 1, one turn at a time, got {args.batch_size}"
        )
    check_destination(Path(args.conversation).expanduser())


def run(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq generate`.

    Args:
      args: its options.
      progress: where to show it.

    Raises:
      ConfigError: an option out of range.
    """
    if args.batch_size < 1 or args.max_new_tokens < 1:
        raise ConfigError(
            "expected --batch-size and --max-new-tokens of at least 1, got "
            f"{args.batch_size} and {args.max_new_tokens}"
        )
    recipe = recipe_of(args)
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    _check_conversation(args, recipe, progress)
    note_unused(args, recipe, progress)
    check_file(args.save_recipe)
    needs = needs_of(args, recipe)
    prompts, text = prompts_of(args), calibration_text(needs, progress)
    model, _ = load_model(args.model, args.dtype, progress)
    check_selection(model.params, recipe)
    # All prompts are checked before the first is answered, so that no run stops half way.
    pad_prompts(
        [model.tokenizer.encode(p) for p in prompts],
        max_positions=model.config.max_positions, max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    if args.save_recipe and recipe is not None:
        save_recipe(args.save_recipe, recipe)
    offline, _ = prepare_offline(needs, model, text, progress)
    place = Path(args.conversation).expanduser() if args.conversation else None
    if place is not None and place.exists() and recipe is not None:
        offline = dataclasses.replace(offline, carried=load_conversation(place, model, recipe))
    make: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens, "sampling": sampling, "seed": args.seed or 0,
    }  # fmt: skip
    with progress.stage("compiling and generating") as update:
        for start in range(0, len(prompts), args.batch_size):
            batch = prompts[start : start + args.batch_size]
            made = generate(
                model, batch, recipe=recipe, offline=offline, batch_size=len(batch), **make
            )

            def timed(batch: list[str] = batch, offline: Offline = offline) -> Timings | None:
                if not args.timings:
                    return None
                named, known = {args.method: recipe}, {args.method: offline}
                return time_answers(model, batch, named, offline=known, **make)[args.method]

            progress.clear()
            if args.json:
                _print_json(args, model, recipe, made, batch, sampling, timed())
            else:
                for prompt, text in zip(batch, made.texts, strict=True):
                    print_text(prompt + (f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text))
                _tell(args, recipe, made, timed(), progress)
            if place is not None and recipe is not None:
                offline = dataclasses.replace(offline, carried=made.moments)
                save_conversation(place, model, recipe, made.moments)
            if len(prompts) > 1:
                update(start + len(batch), len(prompts))

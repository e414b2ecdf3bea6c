"""`ttq generate`: continues prompts with weights made for them."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from ttq_jax.checkpoint.store import check_destination, load_conversation, save_conversation
from ttq_jax.commands.options import check_file, needs_of, prompts_of, recipe_of
from ttq_jax.commands.output import print_json, print_text
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.describe import describe_method, head
from ttq_jax.evaluation.preparation import calibration_text, load_model, prepare_offline
from ttq_jax.evaluation.progress import Progress, clock
from ttq_jax.generate import generate
from ttq_jax.prompts import pad_prompts
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.recipe_text import save_recipe
from ttq_jax.quant.tree import check_selection
from ttq_jax.sampling import Sampling
from ttq_jax.types import Generation


def decode_rate(made: Generation, max_new_tokens: int) -> float | None:
    """Decode steps per second of the decode loop, summed over the prompts.

    The first token comes from prefill; the step that found an end-of-text token counts.

    Args:
      made: from `generate` with `measure`.
      max_new_tokens: what was asked for.

    Returns:
      Tokens per second; None if the loop took no step.
    """
    steps = sum(min(len(row), max_new_tokens - 1) for row in made.tokens)
    seconds = made.seconds.get("decode", 0.0)
    return steps / seconds if steps and seconds > 0 else None


def _print_generation(
    args: argparse.Namespace, recipe: Recipe | None, made: Generation, prompts: Sequence[str],
    before: dict[str, float],
) -> None:  # fmt: skip
    """One batch's answers."""
    rate = decode_rate(made, args.max_new_tokens)
    stages = {k: made.seconds[k] for k in ("compile", "prefill_and_quantize", "decode")}
    seconds = {k: round(v, 4) for k, v in (before | stages).items()}
    rows = zip(prompts, made.texts, made.tokens, made.prompt_tokens, strict=True)
    for prompt, text, tokens, length in rows:
        if args.json:
            print_json(
                head(args.model, args.method, recipe, made.effective_bits)
                | {
                    "prompt": prompt,
                    "text": text,
                    "prompt_tokens": length,
                    "new_tokens": len(tokens),
                    "batch_size": len(prompts),
                    "seed": args.seed,
                    "seconds": seconds,
                    "tokens_per_second": None if rate is None else round(rate, 3),
                }
            )
            continue
        print_text(f"{prompt}\033[1m{text}\033[0m" if sys.stdout.isatty() else prompt + text)
        speed = f", {rate:.1f} tokens/s" if rate else ""
        print_text(f"\n  {length} prompt tokens, {len(tokens)} new{speed}")
    if not args.json:
        times = (f"{k.replace('_', ' ')} {clock(v)}" for k, v in seconds.items())
        print_text(f"  {', '.join(times)}")
        print_text(f"  {describe_method(args.method, recipe, made.effective_bits)}\n")


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
    check_file(args.save_recipe)
    needs = needs_of(args, recipe)
    prompts, text = prompts_of(args), calibration_text(needs, progress)
    model, load_seconds = load_model(args.model, args.dtype, progress)
    check_selection(model.params, recipe)
    # All prompts are checked before the first is answered, so that no run stops half way.
    pad_prompts(
        [model.tokenizer.encode(p) for p in prompts],
        max_positions=model.config.max_positions, max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    if args.save_recipe and recipe is not None:
        save_recipe(args.save_recipe, recipe)
    offline, prepare_seconds = prepare_offline(needs, model, text, progress)
    place = Path(args.conversation).expanduser() if args.conversation else None
    if place is not None and place.exists() and recipe is not None:
        offline = dataclasses.replace(offline, carried=load_conversation(place, model, recipe))
    before = {"load": load_seconds} | ({"prepare": prepare_seconds} if prepare_seconds else {})
    with progress.stage("compiling and generating") as update:
        for start in range(0, len(prompts), args.batch_size):
            batch = prompts[start : start + args.batch_size]
            made = generate(
                model, batch, recipe=recipe, offline=offline, sampling=sampling, seed=args.seed,
                max_new_tokens=args.max_new_tokens, measure=True,
            )  # fmt: skip
            progress.clear()
            _print_generation(args, recipe, made, batch, before)
            if place is not None and recipe is not None:
                offline = dataclasses.replace(offline, carried=made.moments)
                save_conversation(place, model, recipe, made.moments)
            if len(prompts) > 1:
                update(start + len(batch), len(prompts))

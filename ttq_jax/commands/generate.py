"""What `ttq generate` and `ttq perplexity` do, and how a command is chosen."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ttq_jax.checkpoint import CheckpointError, Model
from ttq_jax.checkpoint.store import load_conversation, save_conversation
from ttq_jax.chips.absent import ChipError
from ttq_jax.commands.main import BadInput
from ttq_jax.commands.options import (
    calibration_text,
    check_selection,
    load_model,
    prepare_offline,
    prompts_of,
    recipe_of,
)
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.corpora import CorpusError, begin_tokens, cut_windows, read_corpus, sha256
from ttq_jax.evaluation.describe import describe_method, head, print_json, print_text
from ttq_jax.evaluation.perplexity import Perplexity, Protocol, stream
from ttq_jax.evaluation.progress import Progress, clock
from ttq_jax.generate import generate
from ttq_jax.prompts import PromptError, pad_prompts
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.recipe_text import save_recipe
from ttq_jax.sampling import Sampling
from ttq_jax.types import Generation, Offline


def keep_compiled_programs(directory: Path, progress: Progress) -> None:
    """Turns on jax's persistent compilation cache; a place that cannot be written is only noted.

    Args:
      directory: made if it is not there.
      progress: gets the note.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        progress.note(f"compiled programs are not kept: {directory}: {e.strerror}")
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # A start runs many small programs, each compiled in less than jax's default of a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def decode_rate(made: Generation, max_new_tokens: int) -> float | None:
    """Decode steps per second of the decode loop, summed over the prompts.

    The first token comes from the prompt; the step that found an end-of-text token counts.

    Args:
      made: measured.
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
            progress.note("moments.decay has no use without --conversation: each prompt is a first")
        return
    if not decay:
        raise ConfigError(
            f"--conversation: recipe {args.method} starts afresh at every prompt; say what a turn "
            "still counts at the next one, up to 1: --set moments.decay=0.5"
        )
    if args.batch_size != 1:
        raise ConfigError(
            f"--conversation: expected one turn at a time, got --batch-size {args.batch_size}"
        )


def run_generate(args: argparse.Namespace, progress: Progress) -> None:
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
    prompts, text = prompts_of(args), calibration_text(args, recipe, progress)
    model, load_seconds = load_model(args.model, args.dtype, progress)
    check_selection(model, recipe)
    # All prompts are looked at before the first is answered, so that no output is half a file.
    pad_prompts(
        [model.tokenizer.encode(p) for p in prompts],
        max_positions=model.config.max_positions, max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    if args.save_recipe and recipe is not None:
        save_recipe(args.save_recipe, recipe)
    offline, prepare_seconds = prepare_offline(args, model, recipe, text, progress)
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
            if place is not None and recipe is not None:
                offline = dataclasses.replace(offline, carried=made.moments)
                save_conversation(place, model, recipe, made.moments)
            progress.clear()
            _print_generation(args, recipe, made, batch, before)
            if len(prompts) > 1:
                update(start + len(batch), len(prompts))


def score(
    model: Model, windows: np.ndarray, *, recipe: Recipe | None, offline: Offline,
    protocol: Protocol, text: str, progress: Progress,
) -> Perplexity:  # fmt: skip
    """Perplexity with a progress line.

    Args:
      model: the unquantized model.
      windows: int32[n, W].
      recipe: None for not at all.
      offline: from `prepare`.
      protocol: what is read, what is scored.
      text: what the progress line says.
      progress: where to show it.

    Returns:
      The measurement over all windows.
    """
    with progress.stage(text) as update:
        for running in stream(model, windows, recipe=recipe, offline=offline, protocol=protocol):
            update(running.windows, len(windows), f"perplexity {running.perplexity:.3f}")
    return running


def interval95(nll: Sequence[float], scored: int) -> tuple[float, float] | None:
    """A 95 % interval of a perplexity, taking the windows as independent draws.

    Args:
      nll: per window, nats.
      scored: tokens scored per window.

    Returns:
      (low, high), None for fewer than two windows.
    """
    if len(nll) < 2:
        return None
    means = np.asarray(nll) / scored
    half = 1.96 * float(np.std(means, ddof=1)) / len(nll) ** 0.5
    centre = float(np.mean(means))
    return float(np.exp(centre - half)), float(np.exp(centre + half))


def run_perplexity(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq perplexity`.

    Args:
      args: its options.
      progress: where to show it.
    """
    recipe = recipe_of(args)
    protocol = Protocol(kind=args.protocol, window=args.window, prompt_tokens=args.prompt_tokens)
    with progress.stage(f"reading {args.corpus}"):
        corpus = read_corpus(args.corpus)
    calibration = calibration_text(args, recipe, progress)
    model, _ = load_model(args.model, args.dtype, progress)
    check_selection(model, recipe)
    windows = cut_windows(model.tokenizer, corpus, args.window, max_windows=args.max_windows)
    if args.save_recipe and recipe is not None:
        save_recipe(args.save_recipe, recipe)
    offline, _ = prepare_offline(args, model, recipe, calibration, progress)
    run: Callable[..., Perplexity] = lambda recipe, offline, text: score(  # noqa: E731
        model, windows, recipe=recipe, offline=offline, protocol=protocol, text=text,
        progress=progress,
    )  # fmt: skip
    scored = run(recipe, offline, f"scoring {args.method} ({len(windows)} windows)")
    plain = scored if recipe is None else None
    if args.with_baseline and recipe is not None:
        plain = run(None, Offline(), "scoring unquantized")
    base = plain.perplexity if args.with_baseline and plain else None
    interval = interval95(scored.nll, protocol.scored)
    result = head(args.model, args.method, recipe, scored.effective_bits) | {
        "perplexity": scored.perplexity,
        "unquantized_perplexity": base,
        "interval_95": interval,
        "protocol": protocol.kind,
        "window": protocol.window,
        "prompt_tokens": protocol.prompt_tokens if protocol.kind == "causal" else None,
        "windows": scored.windows,
        "scored_tokens": scored.scored_tokens,
        "seconds": round(scored.seconds, 3),
        "corpus": args.corpus,
        "corpus_sha256": sha256(corpus),
        "bos": bool(begin_tokens(model.tokenizer)),
        "calibration": args.calibration if calibration is not None else None,
        "calibration_tokens": args.calibration_tokens if calibration is not None else None,
    }
    _print_perplexity(args, recipe, result)


def _print_perplexity(
    args: argparse.Namespace, recipe: Recipe | None, result: dict[str, Any]
) -> None:
    if args.json:
        print_json(result)
        return
    low_high = result["interval_95"]
    within = f"  (95 %: {low_high[0]:.3f} to {low_high[1]:.3f})" if low_high else ""
    prompt = result["prompt_tokens"]
    first = f", weights from the first {prompt} tokens of each" if prompt else ""
    print_text(f"perplexity   {result['perplexity']:.3f}{within}")
    if result["unquantized_perplexity"] is not None:
        gap = result["perplexity"] / result["unquantized_perplexity"] - 1
        print_text(f"unquantized  {result['unquantized_perplexity']:.3f}  ({100 * gap:+.1f} %)")
    print_text(f"recipe       {describe_method(args.method, recipe, result['effective_bits'])}")
    print_text(
        f"protocol     {result['protocol']}: {result['windows']} windows of {result['window']} "
        f"tokens{first}; {result['scored_tokens']} tokens scored"
    )
    print_text(f"time         {clock(result['seconds'])} on {result['device']}")


def run(args: argparse.Namespace, cache: Path | None) -> None:
    """Runs one command.

    Args:
      args: from the parser.
      cache: where compiled programs are kept; None for nowhere.

    Raises:
      BadInput: input that cannot be used.
    """
    progress = Progress(enabled=not args.quiet)
    if cache is not None:
        keep_compiled_programs(cache, progress)
    try:
        if args.command == "generate":
            run_generate(args, progress)
        elif args.command == "perplexity":
            run_perplexity(args, progress)
        elif args.command == "prepare":
            from ttq_jax.commands.prepare import run_prepare

            run_prepare(args, progress)
        elif args.command == "allocate":
            from ttq_jax.commands.allocate import run_allocate

            run_allocate(args, progress)
        elif args.command == "sweep":
            from ttq_jax.commands.sweep import run_sweep

            run_sweep(args, progress)
        elif args.command == "report":
            from ttq_jax.commands.report import run_report

            run_report(args, progress)
        elif args.command == "inspect":
            from ttq_jax.commands.inspect import run_inspect

            run_inspect(args, progress)
        elif args.command == "recipes":
            from ttq_jax.commands.recipes import run_recipes

            run_recipes(args)
        elif args.command == "kernels":
            from ttq_jax.commands.kernels import run_kernels

            run_kernels(args, progress)
        elif args.command == "bench":
            from ttq_jax.commands.bench import run_bench

            run_bench(args, progress)
        else:
            from ttq_jax.commands.demo import run_demo

            run_demo(args, progress)
    except (ConfigError, PromptError, CheckpointError, CorpusError, ChipError) as e:
        raise BadInput(str(e)) from e

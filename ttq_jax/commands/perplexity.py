"""`ttq perplexity`: scores a text, window by window."""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from ttq_jax.checkpoint import Model
from ttq_jax.commands.options import (
    cache_in_json,
    check_file,
    describe_text,
    needs_of,
    note_unused,
    recipe_of,
)
from ttq_jax.commands.output import print_json, print_text
from ttq_jax.evaluation.corpora import cut_windows
from ttq_jax.evaluation.describe import describe_method, head
from ttq_jax.evaluation.intervals import TOO_FEW
from ttq_jax.evaluation.perplexity import Perplexity, Protocol, interval95, stream
from ttq_jax.evaluation.preparation import (
    calibration_text,
    corpus_text,
    load_model,
    prepare_offline,
)
from ttq_jax.evaluation.progress import Progress, clock
from ttq_jax.partition import on
from ttq_jax.prefill import check_chunk
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.recipe_text import save_recipe
from ttq_jax.quant.tree import check_selection
from ttq_jax.types import Offline


def score(
    model: Model, windows: np.ndarray, *, recipe: Recipe | None, offline: Offline,
    protocol: Protocol, text: str, progress: Progress, **reading: Any,
) -> Perplexity:  # fmt: skip
    """Perplexity with a progress line.

    Args:
      model: the unquantized model.
      windows: int32[n, W].
      recipe: None for the unquantized model.
      offline: from `prepare`.
      protocol: what is read, what is scored.
      text: of the progress line.
      progress: where to show it.
      **reading: `prefill_chunk` and `cache_dtype` of `evaluation.perplexity.perplexity`.

    Returns:
      The measurement over all windows.
    """
    with progress.stage(text) as update:
        for running in stream(
            model, windows, recipe=recipe, offline=offline, protocol=protocol, **reading
        ):  # fmt: skip
            update(running.windows, len(windows), f"perplexity {running.perplexity:.3f}")
    return running


def run(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq perplexity`.

    Args:
      args: its options.
      progress: where to show it.
    """
    recipe = recipe_of(args)
    check_chunk(args.prefill_chunk, recipe)
    note_unused(args, recipe, progress)
    protocol = Protocol(kind=args.protocol, window=args.window, prompt_tokens=args.prompt_tokens)
    check_file(args.save_recipe)
    with progress.stage(f"reading {args.corpus}"):
        corpus = corpus_text(args.corpus)
    needs = needs_of(args, recipe)
    calibration = calibration_text(needs, progress)
    only = None if args.with_baseline else recipe
    model, _ = load_model(
        args.model, args.dtype, progress, args.ignore_key, only,
        mesh=args.mesh, dense_memory=args.dense_memory,
    )  # fmt: skip
    with on(model.mesh):
        check_selection(model.params, recipe)
    windows = cut_windows(model.tokenizer, corpus, args.window, max_windows=args.max_windows)
    if args.save_recipe and recipe is not None:
        save_recipe(args.save_recipe, recipe)
    offline, _ = prepare_offline(needs, model, calibration, progress)
    scored_by: Callable[..., Perplexity] = lambda recipe, offline, text: score(  # noqa: E731
        model, windows, recipe=recipe, offline=offline, protocol=protocol, text=text,
        progress=progress, prefill_chunk=args.prefill_chunk, cache_dtype=args.cache_dtype,
    )  # fmt: skip
    scored = scored_by(recipe, offline, f"scoring {args.method} ({len(windows)} windows)")
    plain = scored if recipe is None else None
    if args.with_baseline and recipe is not None:
        plain = scored_by(None, Offline(), "scoring unquantized")
    base = plain.perplexity if args.with_baseline and plain else None
    interval = interval95(scored.nll, protocol.scored)
    result = head(model, args.method, recipe, scored.effective_bits) | {
        "model_bits": round(scored.model_bits, 4),
        "bytes_per_token": scored.bytes_per_token,
        "perplexity": scored.perplexity,
        "unquantized_perplexity": base,
        "interval_95": interval,
        "protocol": protocol.kind,
        "window": protocol.window,
        "prompt_tokens": protocol.prompt_tokens if protocol.kind == "causal" else None,
        **cache_in_json(args),
        "windows": scored.windows,
        "scored_tokens": scored.scored_tokens,
        "seconds": round(scored.seconds, 3),
        **describe_text(args, model, corpus, calibration),
    }
    _print_perplexity(args, recipe, result)


def _print_perplexity(
    args: argparse.Namespace, recipe: Recipe | None, result: dict[str, Any]
) -> None:
    if args.json:
        print_json(result)
        return
    low_high = result["interval_95"]
    within = (
        f"(95 %: {low_high[0]:.3f} to {low_high[1]:.3f})"
        if low_high
        else f"(no 95 % interval: {TOO_FEW})"
    )
    prompt = result["prompt_tokens"]
    first = f", weights from the first {prompt} tokens of each" if prompt else ""
    print_text(f"perplexity   {result['perplexity']:.3f}  {within}")
    if result["unquantized_perplexity"] is not None:
        gap = result["perplexity"] / result["unquantized_perplexity"] - 1
        print_text(f"unquantized  {result['unquantized_perplexity']:.3f}  ({100 * gap:+.1f} %)")
    bits = result["effective_bits"], result["model_bits"], result["bytes_per_token"]
    print_text(f"recipe       {describe_method(args.method, recipe, *bits)}")
    print_text(
        f"protocol     {result['protocol']}: {result['windows']} windows of {result['window']} "
        f"tokens{first}; {result['scored_tokens']} tokens scored"
    )
    print_text(f"time         {clock(result['seconds'])} on {result['device']}")

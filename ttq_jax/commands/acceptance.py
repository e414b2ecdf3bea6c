"""`ttq acceptance`: how often quantized weights agree with the unquantized ones on a text."""

import argparse
from typing import Any

from ttq_jax import speculation
from ttq_jax.commands.options import (
    check_file,
    describe_text,
    needs_of,
    note_unused,
    recipe_of,
)
from ttq_jax.commands.output import print_json, print_text
from ttq_jax.evaluation.acceptance import stream
from ttq_jax.evaluation.corpora import cut_windows
from ttq_jax.evaluation.describe import describe_method, head
from ttq_jax.evaluation.intervals import TOO_FEW
from ttq_jax.evaluation.preparation import (
    calibration_text,
    corpus_text,
    load_model,
    prepare_offline,
)
from ttq_jax.evaluation.progress import Progress, clock
from ttq_jax.partition import on
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.recipe_text import save_recipe
from ttq_jax.quant.tree import check_selection

_SAID = {
    "greedy": "of the likeliest tokens are the unquantized model's",
    "sampled": "of the drafts are accepted at temperature 1",
    "divergence": "nats per token, KL(unquantized ‖ quantized)",
}


def run(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq acceptance`.

    Args:
      args: its options.
      progress: where to show it.
    """
    recipe = recipe_of(args)
    speculation.check(1, recipe)
    assert recipe is not None, "refused above"
    note_unused(args, recipe, progress)
    check_file(args.save_recipe)
    with progress.stage(f"reading {args.corpus}"):
        corpus = corpus_text(args.corpus)
    needs = needs_of(args, recipe)
    calibration = calibration_text(needs, progress)
    model, _ = load_model(
        args.model, args.dtype, progress, args.ignore_key,
        mesh=args.mesh, dense_memory=args.dense_memory,
    )  # fmt: skip
    with on(model.mesh):
        check_selection(model.params, recipe)
    windows = cut_windows(model.tokenizer, corpus, args.window, max_windows=args.max_windows)
    if args.save_recipe:
        save_recipe(args.save_recipe, recipe)
    offline, _ = prepare_offline(needs, model, calibration, progress)
    with progress.stage(f"comparing {args.method} ({len(windows)} windows)") as update:
        for found in stream(
            model, windows, recipe=recipe, offline=offline, prompt_tokens=args.prompt_tokens
        ):
            update(len(found.greedy), len(windows), f"greedy {found.describe()['greedy']:.3f}")
    result = head(model, args.method, recipe, found.effective_bits) | {
        "model_bits": round(found.model_bits, 4),
        "bytes_per_token": found.bytes_per_token,
        **found.describe(),
        "window": args.window,
        "prompt_tokens": args.prompt_tokens,
        "seconds": round(found.seconds, 3),
        **describe_text(args, model, corpus, calibration),
    }
    _print(args, recipe, result)


def _print(args: argparse.Namespace, recipe: Recipe, result: dict[str, Any]) -> None:
    if args.json:
        print_json(result)
        return
    for name, said in _SAID.items():
        ends = result[f"{name}_interval_95"]
        within = f"95 %: {ends[0]:.4f} to {ends[1]:.4f}" if ends else f"no interval: {TOO_FEW}"
        print_text(f"{name:12} {result[name]:.4f}  {said} ({within})")
    bits = result["effective_bits"], result["model_bits"], result["bytes_per_token"]
    print_text(f"recipe       {describe_method(args.method, recipe, *bits)}")
    print_text(
        f"protocol     causal: {result['windows']} windows of {result['window']} tokens, weights "
        f"from the first {result['prompt_tokens']}; {result['compared']} tokens compared"
    )
    print_text(f"time         {clock(result['seconds'])} on {result['device']}")

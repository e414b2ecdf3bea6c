"""`ttq kernels`: which implementation serves which projection of a model, and why.

Nothing is compiled or loaded onto a device: the answer is that of `pallas_kernels.choose`, which
also decides while a program is traced.
"""

import argparse
import contextlib
from typing import Any

from pallas_kernels import Problem, Target, choose, current_target
from ttq_jax.chips.absent import CHIPS
from ttq_jax.chips.released import RELEASED, projections, released_config
from ttq_jax.commands.options import recipe_of
from ttq_jax.commands.output import print_json, print_text
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.evaluation.describe import table, versions
from ttq_jax.evaluation.preparation import load_model
from ttq_jax.evaluation.progress import Progress
from ttq_jax.experts import rows_per_block
from ttq_jax.mesh import check_rows, in_shape, parse, undivided
from ttq_jax.models.prompt_attention import KERNELS, refusal
from ttq_jax.partition import SPLITS, count, own_rows, own_shape, shared
from ttq_jax.quant.grid import Nearest
from ttq_jax.quant.head import BLOCK, grid_of
from ttq_jax.quant.names import quantizes_nothing
from ttq_jax.quant.recipe import RULE_NAMES, Recipe, has_kernel
from ttq_jax.quant.scaling import NoScale
from ttq_jax.types import EXPERT_SITES, SITE_OF


def target_of(chip: str | None) -> Target:
    """The target of a chip's name; None is this machine's device."""
    if chip is None:
        return current_target()
    if chip == "cpu":
        return Target(platform="cpu")
    return Target(platform="gpu" if CHIPS[chip].platform == "cuda" else "tpu", chip=chip)


def listing(
    config: ModelConfig, recipe: Recipe, target: Target, *, batch: int, prompt_tokens: int,
    dtype: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per projection and kernel, in the order in which a prompt meets them.

    Args:
      config: the model's; on a mesh (`partition.in_shape`) the rows are of one of its devices.
      recipe: how it is quantized.
      target: what the program runs on.
      batch: prompts read together.
      prompt_tokens: tokens of a prompt, padded.
      dtype: of the activations.

    Returns:
      Rows of projection, kernel, bits, m, k, n, implementation, reason and fallback; the last
      ones are the head's, if the recipe packs it.

    Raises:
      ConfigError: the recipe selects no projection, or its groups do not fit the mesh.
    """
    rows = []
    # A recipe that reads no prompt is packed before it: there is no product beside.
    ahead = recipe.source.of != "prompt"
    pooled = batch if recipe.batch == "pooled" else 1
    pooled = own_rows(pooled)
    rounding = recipe.rounding
    # Empty: a rounding without a kernel.
    shrinks = rounding.shrinks if has_kernel(rounding) else ()
    sizes = projections(config)
    for name in recipe.selected(sizes):
        d_in, d_out = sizes[name]
        routed = config.n_experts and SITE_OF[name] in EXPERT_SITES
        # Experts are dealt out whole.
        split = None if routed else SPLITS[name].here()
        for grid in recipe.grids(name, config.n_layers) if split else ():
            check_rows(name, d_in, grid.group_size)
        d_in, d_out = (d_in, d_out) if routed else own_shape(name, d_in, d_out)
        # Which of the prompt's rows are an expert's is not known when its weight is rounded, and a
        # corrected weight multiplies none.
        alone = ahead or routed or recipe.prefill == "both"
        quantizer, quantizer_rows = ("quantize_pack", 0) if alone else (
            "prefill_quantize", pooled * prompt_tokens,
        )  # fmt: skip
        read = pooled
        if routed:
            read = rows_per_block(pooled * config.experts_per_token, config.n_experts)
        for grid in dict.fromkeys(recipe.grids(name, config.n_layers)):
            group = grid.rows_per_group(d_in)
            for kernel, m in ((quantizer, quantizer_rows), ("packed_matmul", read)):
                quantizes = kernel != "packed_matmul"
                row: dict[str, Any] = {
                    "projection": name, "kernel": kernel, "bits": grid.bits, "m": m,
                    "k": -(-d_in // group) * group, "n": d_out,
                }  # fmt: skip
                if quantizes and not shrinks:
                    reason = f"there is no kernel for {RULE_NAMES[type(rounding)]} rounding"
                    rows.append({
                        **row,
                        "implementation": "xla",
                        "reason": reason,
                        "fallback": True,
                    })
                    continue
                problem = Problem(
                    kernel=kernel, m=m, d_in=d_in, n=d_out, dtype=dtype, **grid.packing(d_in),
                    rank=recipe.low_rank.rank if quantizes else recipe.low_rank.total,
                    shrinks=shrinks if quantizes else (),
                    refits=rounding.refits if quantizes and has_kernel(rounding) else 0,
                    quantized=kernel == "prefill_quantize" and recipe.prefill == "quantized",
                    scaled=not isinstance(recipe.scale, NoScale),
                    row_axes=split.rows if quantizes and split else (),
                )  # fmt: skip
                choice = choose(problem, target)
                rows.append({
                    **row, "implementation": choice.implementation, "reason": choice.reason,
                    "fallback": choice.fallback,
                })  # fmt: skip
    if recipe.head is not None:
        rows += _of_head(config, recipe.head, target, rows=pooled, dtype=dtype)
    return rows


def _of_head(
    config: ModelConfig, bits: int, target: Target, *, rows: int, dtype: str
) -> list[dict[str, Any]]:
    """The table that gives the logits: rounded once per model, multiplied at each token."""
    d_in, packing = config.embed_dim, grid_of(bits).packing(config.embed_dim)
    n = config.vocab_size // count(shared())
    group = packing["group_size"]
    problems = (
        Problem(kernel="quantize_pack", m=0, d_in=d_in, n=min(BLOCK, n), dtype=dtype, **packing,
                shrinks=Nearest.shrinks),
        Problem(kernel="packed_matmul", m=rows, d_in=d_in, n=n, dtype=dtype, **packing,
                out_dtype="float32"),
    )  # fmt: skip
    found = []
    for problem in problems:
        choice = choose(problem, target)
        found.append({
            "projection": "head", "kernel": problem.kernel, "bits": bits, "m": problem.m,
            "k": -(-d_in // group) * group, "n": problem.n,
            "implementation": choice.implementation, "reason": choice.reason,
            "fallback": choice.fallback,
        })  # fmt: skip
    return found


def _of_prompts(
    config: ModelConfig, prompt_tokens: int, dtype: str, target: Target
) -> dict[str, str]:
    """What attends to prompts, and why."""
    if why := refusal(config, prompt_tokens, dtype, target):
        return {"implementation": "xla", "reason": why}
    reason, devices = f"the kernel for {target.chip or target.platform}", count(shared())
    if devices > 1:
        reason += f", {config.n_heads // devices} query heads on each device"
    return {"implementation": KERNELS[target.platform], "reason": reason}


def run(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq kernels`.

    Args:
      args: its options.
      progress: where to show it.

    Raises:
      ConfigError: an option out of range, or a recipe that quantizes nothing.
    """
    recipe = recipe_of(args)
    if recipe is None:
        raise ConfigError(quantizes_nothing(args.method, "it uses no kernel"))
    if args.batch_size < 1 or args.prompt_tokens < 1:
        raise ConfigError(
            "expected --batch-size and --prompt-tokens of at least 1, got "
            f"{args.batch_size} and {args.prompt_tokens}"
        )
    if args.model in RELEASED:
        if args.ignore_key:
            raise ConfigError(
                f"--ignore-key: the sizes of {args.model} are known without its files, so there is "
                "no key to ignore; leave out the option, or give the model's directory or file"
            )
        config = released_config(args.model)
    else:
        # Only its sizes are used, and checkpoints are not loaded as float16.
        config = load_model(args.model, "bfloat16", progress, args.ignore_key)[0].config
    target = target_of(args.chip)
    sizes = None if args.mesh is None else parse(args.mesh)
    if note := undivided(sizes, args.batch_size):
        progress.note(note)
    with contextlib.nullcontext() if sizes is None else in_shape(sizes, config):
        rows = listing(
            config, recipe, target, batch=args.batch_size, prompt_tokens=args.prompt_tokens,
            dtype=args.dtype,
        )  # fmt: skip
        attention = _of_prompts(config, args.prompt_tokens, args.dtype, target)
    place = target.chip or target.platform
    if args.json:
        print_json({
            "model": args.model, "chip": place, "dtype": args.dtype, "recipe": recipe.describe(),
            "versions": versions(), "kernels": rows, **({"mesh": sizes} if sizes else {}),
            "attention": attention,
        })  # fmt: skip
        return
    cells = [["projection", "kernel", "bits", "rows", "shape", "", "why"]]
    cells += [
        [r["projection"], r["kernel"], str(r["bits"]), str(r["m"]), f"{r['k']}x{r['n']}",
         r["implementation"] + (" (fallback)" if r["fallback"] else ""), r["reason"]]
        for r in rows
    ]  # fmt: skip
    if args.mesh is not None:
        place = f"each {place} of a mesh of {args.mesh}"
    text = f"{args.model} on {place}, {args.dtype} activations\n\n{table(cells, left=7)}"
    said = f"{attention['implementation']} ({attention['reason']})"
    text += f"\n\nattention to prompts of {args.prompt_tokens} tokens: {said}"
    if "triton" in {r["implementation"] for r in (*rows, attention)}:
        # Here: Pallas is slow to import.
        from pallas_kernels.gpu.triton import NOTICE

        text += f"\n\n{NOTICE}" if NOTICE else ""
    print_text(text)

"""`ttq inspect`: what is in a model, what would be quantized, sizes before and after.

Nothing is quantized for it: the sizes follow from the shapes.
"""

import argparse
import dataclasses
import math
from functools import partial
from typing import Any

import jax

from ttq_jax.checkpoint import Model
from ttq_jax.checkpoint.packaged import CONTENTS
from ttq_jax.commands.options import recipe_of
from ttq_jax.commands.output import print_json, print_text
from ttq_jax.errors import shown
from ttq_jax.evaluation.describe import describe_method, head, megabytes, table
from ttq_jax.evaluation.preparation import load_model
from ttq_jax.evaluation.progress import Progress
from ttq_jax.models.traffic import bytes_per_token
from ttq_jax.prefill import decoded_shapes
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.tree import check_selection, static_factors
from ttq_jax.sweeps import words
from ttq_jax.types import (
    MixedLinear,
    Offline,
    Params,
    QuantizedLinear,
    effective_bits,
    model_bits,
    stored_bytes,
)


def packed_shapes(model: Model, recipe: Recipe | None) -> Params:
    """The shapes of the tree that is decoded, found without a corpus or a prompt.

    Args:
      model: the unquantized model.
      recipe: None for the unquantized model.

    Returns:
      A tree of `jax.ShapeDtypeStruct`.
    """
    if recipe is not None and recipe.reads_offline:
        # The shapes do not depend on the source of the moments, and the prompt's need no corpus.
        low_rank = dataclasses.replace(recipe.low_rank, weighted=False)
        recipe = dataclasses.replace(recipe, moments="prompt", low_rank=low_rank)
    factors = jax.eval_shape(partial(static_factors, recipe=recipe), model.params)
    return decoded_shapes(model.params, model.config, recipe, Offline(low_rank=factors))


def _paths(tree: Params) -> dict[str, Any]:
    """{"layers/q/kernel": leaf}, a packed weight being one leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedLinear | MixedLinear)
    )
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in flat}


def _form(path: str, leaf: Any) -> tuple[list[int], str]:
    """A parameter's shape, and its dtype; of a packed table the width of its codes."""
    if not isinstance(leaf, QuantizedLinear):
        return list(leaf.shape), str(leaf.dtype)
    shape = [leaf.d_in, leaf.d_out]
    # An embedding is packed by its columns, [D, V], and has a row per token.
    return shape[::-1] if path.startswith("embed/") else shape, f"{leaf.bits} bits"


def parameter_groups(before: Params, after: Params) -> list[dict[str, Any]]:
    """A row per parameter, in the order of the tree.

    Args:
      before: the tree that was loaded, or its shapes; its tables may be packed.
      after: the tree that is decoded, or its shapes.

    Returns:
      Rows of path, shape, dtype, parameters, bytes (as loaded), quantized, stored_bytes and bits
      (stored bits per parameter).
    """
    stored, rows = _paths(after), []
    for path, leaf in _paths(before).items():
        shape, kind = _form(path, leaf)
        count, size = math.prod(shape), stored_bytes(stored[path])
        rows.append({
            "path": path,
            "shape": shape,
            "dtype": kind,
            "parameters": count,
            "bytes": stored_bytes(leaf),
            "quantized": isinstance(stored[path], QuantizedLinear | MixedLinear),
            "stored_bytes": size,
            "bits": round(8 * size / count, 4),
        })
    return rows


def inspect_model(model: Model, recipe: Recipe | None) -> dict[str, Any]:
    """Everything that `ttq inspect` says about a model.

    Args:
      model: the unquantized model; the recipe's tables may be packed already.
      recipe: how it would be quantized; None for the unquantized model.

    Returns:
      JSON data.
    """
    config, after = model.config, packed_shapes(model, recipe)
    rows = parameter_groups(model.params, after)
    tokenizer = model.tokenizer
    return {
        "format": model.format,
        "family": config.family,
        "config": dataclasses.asdict(config),
        "context": config.max_positions,
        "tokenizer": {
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "bos_token": None if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id),
            "adds_bos": bool(tokenizer.encode("", add_bos=True)),
            "eos_ids": list(model.eos_ids),
            "eos_tokens": list(map(tokenizer.token, model.eos_ids)),
        },
        "parameters": sum(r["parameters"] for r in rows),
        "quantized_parameters": sum(r["parameters"] for r in rows if r["quantized"]),
        "bytes": sum(r["bytes"] for r in rows),
        "stored_bytes": sum(r["stored_bytes"] for r in rows),
        "effective_bits": round(effective_bits(after), 4),
        "model_bits": round(model_bits(after), 4),
        "bytes_per_token": bytes_per_token(after, config),
        "groups": rows,
    }


def _token(text: str | None, i: int) -> str:
    """A token and its id."""
    return f"token {i}" if text is None else f"{shown(text)} ({i})"


def _text(name: str, found: dict[str, Any], recipe_line: str) -> str:
    """The same for people."""
    c, t = found["config"], found["tokenizer"]
    title, _ = CONTENTS.get(name, (name, ""))
    begin = [_token(t["bos_token"], t["bos_id"])] if t["adds_bos"] else []
    ends = list(map(_token, t["eos_tokens"], t["eos_ids"]))
    each = f", {c['n_experts']} experts, {c['experts_per_token']} for each token"
    facts = [
        ["model", words.titled(title, found["format"])],
        ["family", found["family"]],
        [
            "layers",
            f"{c['n_layers']} of width {c['d_model']}, feed-forward {c['d_ff']}"
            + (each if c["n_experts"] else ""),
        ],
        ["heads", f"{c['n_heads']} query, {c['n_kv_heads']} key/value, {c['head_dim']} wide"],
        ["context", f"{found['context']} tokens"],
        ["tokenizer", f"{t['vocab_size']} tokens"],
        ["a text begins with", " or ".join(begin) or "no token of its own"],
        ["and ends with", " or ".join(ends) or "none: answers run to their limit"],
        ["parameters", f"{found['parameters']:,} ({found['quantized_parameters']:,} quantized)"],
        ["recipe", recipe_line],
    ]
    rows = [["parameter", "shape", "dtype", "loaded", "quantized", "bits"]]
    for r in found["groups"]:
        shape = "x".join(map(str, r["shape"]))
        packed = megabytes(r["stored_bytes"]) if r["quantized"] else "no"
        bits = f"{r['bits']:.2f}"
        rows.append([r["path"], shape, r["dtype"], megabytes(r["bytes"]), packed, bits])
    rows.append(
        ["total", "", "", megabytes(found["bytes"]), megabytes(found["stored_bytes"]),
         f"{found['model_bits']:.2f}"]
    )  # fmt: skip
    note = f"\n\n{words.spoils(found['format'])}" if found["format"] else ""
    return f"{table(facts, left=2)}{note}\n\n{table(rows, left=3)}"


def run(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq inspect`.

    Args:
      args: its options.
      progress: where to show it.
    """
    recipe = recipe_of(args)
    model, _ = load_model(
        args.model, args.dtype, progress, args.ignore_key, recipe,
        dense_memory=args.dense_memory,
    )  # fmt: skip
    check_selection(model.params, recipe)
    found = inspect_model(model, recipe)
    if args.json:
        print_json(head(model, args.method, recipe, found["effective_bits"]) | found)
    else:
        bits = found["effective_bits"], found["model_bits"], found["bytes_per_token"]
        line = describe_method(args.method, recipe, *bits)
        print_text(_text(args.model, found, line))

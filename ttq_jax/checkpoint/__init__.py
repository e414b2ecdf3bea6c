"""Loading models: Hugging Face directories and hub ids, GGUF files, and packaged aliases.

Every setting and tensor of a checkpoint is used, ignored on purpose, or an error that names it. A
model that is almost right still writes fluent text, and nobody would notice.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from ttq_jax.checkpoint.assemble import Progress
from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.gguf import load_gguf
from ttq_jax.checkpoint.huggingface import load_directory
from ttq_jax.checkpoint.model import Model
from ttq_jax.checkpoint.origin import find, origin
from ttq_jax.checkpoint.packaged import ALIASES
from ttq_jax.checkpoint.placing import Memory, check_memory
from ttq_jax.checkpoint.tokenizer import Tokenizer
from ttq_jax.errors import expect, shown
from ttq_jax.processes import expect_same, several
from ttq_jax.quant.grid import BITS

__all__ = ["ALIASES", "CheckpointError", "Model", "Progress", "Tokenizer", "load"]

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def load(
    model: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    progress: Progress | None = None,
    ignore_keys: Sequence[str] = (),
    head: int | None = None,
    dense_memory: Memory = "device",
    mesh: Mapping[str, int] | None = None,
) -> Model:
    """Loads a model.

    Args:
      model: an alias (`ALIASES`), a .gguf file or any part of a split one, a directory with
        config.json and safetensors, or a Hugging Face hub id "organization/name", with "@revision"
        after it to pin a branch, tag or commit; a path wins over a hub id of the same spelling.
      dtype: of the weights.
      progress: called as progress(done, total, "weights") while weights are read, in elements.
      ignore_keys: settings of the model's files that this package does not know and that you know
        to change nothing, named as in the message that refuses them; each becomes a note.
      head: packs the embedding and the head in this many bits while they are read, 2, 3, 4, 5 or 8,
        for recipes with this `Recipe.head` alone; None loads them as they are, for any recipe.
      dense_memory: "host" keeps the unquantized kernels of the blocks in pinned host memory, and a
        program fetches them layer by layer while it reads a prompt: the device holds the packed
        weights, the tables and the cache. Results are the same. Every further pass over
        unquantized weights fetches them again: each token without a recipe, each refresh, each
        cycle of `speculate`. On a mesh each device's part lies in the memory of its own host.
      mesh: how many devices share the weights and the prompts, as in {"data": 2, "model": 4}, see
        `partition`; None for one device. In a program of several processes it counts the devices
        of all, and each reads its own part.

    Returns:
      The model, its weights on JAX's default device, on the mesh, or as `dense_memory` says.

    Raises:
      CheckpointError: the model cannot be found or served; the message says why and what to do.
      ConfigError: a mesh that does not fit the devices or the model, or other files in another
        process.

    References:
      Formats: huggingface.co/docs/safetensors; github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    if dtype not in _DTYPES:
        raise CheckpointError(f"dtype: expected float32 or bfloat16, got {shown(dtype)}")
    if head is not None and head not in BITS:
        raise CheckpointError(
            f"head: expected one of {', '.join(map(str, BITS))}, or None, got {shown(head)}"
        )
    expect("mesh", mesh, (Mapping, type(None)), 'devices by axis, as in {"data": 2, "model": 4}')
    expect("model", model, (str, Path), "a path, a hub id or an alias")
    check_memory(dense_memory)
    path, keys = find(model), [ignore_keys] if isinstance(ignore_keys, str) else ignore_keys
    if mesh is not None and several():
        expect_same("the model's files", origin(path)["fingerprint"])
    read = load_directory if path.is_dir() else load_gguf
    made = read(
        path, name=str(model), dtype=_DTYPES[dtype], progress=progress, ignore_keys=tuple(keys),
        head=head, mesh=mesh, memory=dense_memory,
    )  # fmt: skip
    return dataclasses.replace(made, origin=origin(path) | {"format": made.format})

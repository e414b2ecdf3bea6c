"""Loads a GGUF file (llama.cpp's format): config, weights and tokenizer from one file."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ttq_jax.checkpoint.assemble import Progress, assemble
from ttq_jax.checkpoint.chat_template import gguf_template
from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.gguf_file import GgufFile, open_gguf
from ttq_jax.checkpoint.gguf_tokenizer import build_tokenizer
from ttq_jax.checkpoint.model import Model
from ttq_jax.checkpoint.placing import Memory
from ttq_jax.config import ConfigError, ModelConfig, Rope
from ttq_jax.errors import shown
from ttq_jax.mesh import make_mesh
from ttq_jax.models.families import FAMILIES
from ttq_jax.models.family import Family, Settings
from ttq_jax.models.rope import stretched
from ttq_jax.models.sizes import gguf_expert_modules

_ROPE_FACTORS = "rope_freqs.weight"
_LONG_ROPE = {"long": "rope_factors_long.weight", "short": "rope_factors_short.weight"}


def _family(file: GgufFile) -> Family:
    """The family of the file's architecture.

    Raises:
      CheckpointError: an architecture that is not supported, or no language model.
    """
    what = file.metadata.get("general.type", "model")
    if not (isinstance(what, str) and what == "model"):
        raise CheckpointError(
            f"{file.label}: expected a model, but its general.type is {shown(what)}. Give the "
            "model's own file; an adapter has to be merged into it first"
        )
    arch = file.metadata.get("general.architecture")
    known = {f.gguf_arch: f for f in FAMILIES.values() if f.gguf_arch}
    if not isinstance(arch, str) or arch not in known:
        raise CheckpointError(
            f"{file.label}: architecture {shown(arch)} is not supported in GGUF files; expected "
            f"one of {', '.join(sorted(known))}"
        )
    return known[arch]


def _llama3_rope(rope: Rope, head_dim: int, factors: np.ndarray) -> Rope:
    """The `llama3` scaling that a file stores as one divisor per frequency.

    Raises:
      ConfigError: the divisors are not those of a released Llama 3.
    """
    plain = rope.inverse_frequencies(head_dim)
    finite = np.isfinite(factors).all() and factors.min() >= 1
    if rope.scaling == "none" and factors.shape == plain.shape and finite:
        scaled = dataclasses.replace(
            rope, scaling="llama3", factor=float(factors.max()), low_freq_factor=1.0,
            high_freq_factor=4.0, original_positions=8192,
        )  # fmt: skip
        if np.allclose(plain / factors, scaled.inverse_frequencies(head_dim), rtol=1e-4, atol=0):
            return scaled
    raise ConfigError(
        f"{_ROPE_FACTORS} is not the rope scaling of Llama 3 (low and high frequency factors 1 and "
        "4, original context 8192). Load the model from a Hugging Face directory instead"
    )


def read_config(
    file: GgufFile, family: Family, ignore_keys: tuple[str, ...] = ()
) -> tuple[ModelConfig, list[str]]:
    """The config that a GGUF header and the presence of some tensors imply.

    Args:
      file: the file.
      family: its family.
      ignore_keys: see `checkpoint.load`.

    Returns:
      The config, and notes.

    Raises:
      ConfigError: a setting that is missing, unknown or not implemented.
    """
    arch = family.gguf_arch
    long_rope = {
        f"{arch}.rope.{kind}_factors": file.read(name, 0, file.shapes[name][0]).tolist()
        for kind, name in _LONG_ROPE.items()
        if name in file.shapes
    }
    settings = Settings(file.metadata | long_rope, ignore_keys=ignore_keys)
    # The tokenizer checks its own keys. All further namespaces say who made the file and how.
    settings.ignore_outside(f"{arch}.")
    settings.require(f"{arch}.attention.causal", True)
    vocab_size = file.shapes.get("token_embd.weight", (0,))[0]
    settings.require(f"{arch}.vocab_size", vocab_size)
    assert family.gguf_config is not None
    tied = "output.weight" not in file.shapes
    config = stretched(family.gguf_config(settings, vocab_size, tied))
    settings.finish()
    if _ROPE_FACTORS in file.shapes:
        assert config.rope is not None
        factors = file.read(_ROPE_FACTORS, 0, file.shapes[_ROPE_FACTORS][0])
        config = dataclasses.replace(
            config, rope=_llama3_rope(config.rope, config.head_dim, factors)
        )
    settings.note_unmet()
    config = dataclasses.replace(
        config,
        qkv_bias="blk.0.attn_q.bias" in file.shapes,
        o_bias="blk.0.attn_output.bias" in file.shapes,
        mlp_bias="blk.0.ffn_up.bias" in file.shapes,
    )
    return config, settings.notes


def load_gguf(
    path: Path, *, name: str, dtype: Any = np.float32, progress: Progress | None = None,
    ignore_keys: tuple[str, ...] = (), head: int | None = None,
    mesh: Mapping[str, int] | None = None, memory: Memory = "device",
) -> Model:  # fmt: skip
    """Loads a GGUF file.

    Args:
      path: of the file, or of any part of a split one.
      name: what to call the model.
      dtype: of the weights, float32 or bfloat16.
      progress: see `assemble.assemble`.
      ignore_keys: see `checkpoint.load`.
      head: see `checkpoint.load`.
      mesh: see `checkpoint.load`.
      memory: see `assemble.assemble`.

    Returns:
      The model.

    Raises:
      CheckpointError: the file cannot be loaded; the message says why.
    """
    with open_gguf(path) as file:
        family = _family(file)
        try:
            config, notes = read_config(file, family, ignore_keys)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error
        devices = None if mesh is None else make_mesh(mesh, config)
        # Merges that are not in the file take seconds on one core; the weights are read meanwhile.
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(
                build_tokenizer, file.metadata, file.label, config.vocab_size, family.end
            )
            experts = gguf_expert_modules(file.shapes) if config.n_experts else {}
            params, tables = assemble(
                config,
                file,
                {**family.gguf_modules, **experts},
                family.gguf_edits,
                ignored=(_ROPE_FACTORS, *_LONG_ROPE.values()),
                dtype=dtype,
                progress=progress,
                head=head,
                mesh=devices,
                memory=memory,
            )
            tokenizer = future.result()
        chat = gguf_template(file.metadata, tokenizer, file.label)
    return Model(
        config, params, tokenizer, name, tokenizer.eos_ids, format=file.quantization,
        notes=(*notes, *tokenizer.notes), chat=chat, tables=tables,
        mesh=devices,
    )  # fmt: skip

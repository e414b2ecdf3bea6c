"""Loads a Hugging Face directory: config.json, safetensors and the tokenizer's files."""

from pathlib import Path
from typing import Any

import numpy as np

from ttq_jax.checkpoint.assemble import Progress, assemble
from ttq_jax.checkpoint.chat_template import read_template
from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.model import FAMILIES, Model
from ttq_jax.checkpoint.safetensors import Safetensors, open_safetensors
from ttq_jax.checkpoint.tokenizer import load_tokenizer
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.errors import shown
from ttq_jax.foreign import COUNT, read_json
from ttq_jax.models.family import Family, Settings

_IDS = (None, COUNT, [COUNT])
# The settings have their own schema, `Settings`, which knows every key.
_ENDS = {"bos_token_id?": _IDS, "eos_token_id?": _IDS}
_CONFIG = _ENDS | {"text_config?": (None, _ENDS)}


def _family(directory: Path, raw: dict[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
      CheckpointError: an architecture that is not supported.
    """
    known = {kind: family for family in FAMILIES for kind in family.hf_types}
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(
            f"{directory}: architecture {shown(kind)} (model_type in config.json) is not "
            f"supported; expected one of {', '.join(sorted(known))}"
        )
    return known[kind]


def read_config(directory: Path) -> tuple[Family, ModelConfig]:
    """Reads a directory's config.json.

    Args:
      directory: with config.json.

    Returns:
      The family and the config.

    Raises:
      CheckpointError: an unknown architecture or key, a missing key, a value not implemented.
    """
    raw = read_json(directory / "config.json", CheckpointError, _CONFIG)
    family = _family(directory, raw)
    settings = Settings(raw)
    try:
        config = family.hf_config(settings)
        settings.finish()
    except ConfigError as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from error
    return family, config


def _as_ids(value: Any) -> tuple[int, ...]:
    """An id, a list of them or null, as a tuple."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _ends(directory: Path) -> tuple[int | None, tuple[int, ...]]:
    """(begin-of-text token, end-of-text tokens); generation_config.json takes precedence."""
    raw = read_json(directory / "config.json", CheckpointError, _CONFIG)
    raw = {**(raw.get("text_config") or {}), **raw}
    path = directory / "generation_config.json"
    generation = read_json(path, CheckpointError, _ENDS) if path.exists() else {}
    bos = _as_ids(generation.get("bos_token_id", raw.get("bos_token_id")))
    eos = generation.get("eos_token_id")
    return (bos[0] if bos else None), _as_ids(raw.get("eos_token_id") if eos is None else eos)


def _modules(family: Family, source: Safetensors) -> dict[str, str]:
    """The family's tensor names with this checkpoint's prefix.

    Raises:
      CheckpointError: there is no embedding under any known name.
    """
    probe = family.hf_modules["embed"] + ".weight"
    prefix = next((p for p in family.hf_prefixes if p + probe in source.shapes), None)
    if prefix is None:
        expected = " or ".join(p + probe for p in family.hf_prefixes)
        raise CheckpointError(
            f"{source.label}: missing tensor {expected}. Check that this is a {family.name} "
            "checkpoint"
        )
    head = next((h for h in family.hf_heads if h + ".weight" in source.shapes), family.hf_heads[0])
    return {k: prefix + v for k, v in family.hf_modules.items()} | {"head": head}


def _check_tied(source: Safetensors, modules: dict[str, str]) -> None:
    """A tied checkpoint may store its head, but it must be the embedding.

    Raises:
      CheckpointError: the head is not the embedding.
    """
    head, table = modules["head"] + ".weight", modules["embed"] + ".weight"
    if head not in source.shapes:
        return
    same = source.shapes[head] == source.shapes[table]
    for start in range(0, source.shapes[head][0] if same else 0, 1024):
        stop = min(start + 1024, source.shapes[head][0])
        if not np.array_equal(source.read(head, start, stop), source.read(table, start, stop)):
            same = False
            break
    if not same:
        raise CheckpointError(
            f"{source.label}: tie_word_embeddings is true, but {head} differs from {table}; "
            "set it to false if the head has weights of its own"
        )


def load_directory(
    directory: Path, *, name: str, dtype: Any = np.float32, progress: Progress | None = None
) -> Model:
    """Loads a Hugging Face directory.

    Args:
      directory: with config.json, *.safetensors and tokenizer files.
      name: what to call the model.
      dtype: of the weights, float32 or bfloat16.
      progress: see `assemble.assemble`.

    Returns:
      The model.

    Raises:
      CheckpointError: the directory cannot be loaded; the message says why.
    """
    family, config = read_config(directory)
    bos_id, eos_ids = _ends(directory)
    tokenizer = load_tokenizer(directory, bos_id=bos_id, eos_ids=eos_ids)
    with open_safetensors(directory) as source:
        modules = _modules(family, source)
        ignored = family.hf_ignored
        if config.tie_embeddings:
            _check_tied(source, modules)
            ignored = (*ignored, modules["head"] + ".weight")
        params = assemble(
            config, source, modules, family.hf_edits, ignored=ignored, dtype=dtype,
            progress=progress,
        )  # fmt: skip
    chat = read_template(directory, tokenizer)
    return Model(config, params, tokenizer, name, eos_ids, chat=chat)

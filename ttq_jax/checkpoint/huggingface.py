"""Loads a Hugging Face directory: config.json, safetensors and the tokenizer's files."""

import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from ttq_jax.checkpoint.assemble import Progress, assemble
from ttq_jax.checkpoint.chat_template import read_template
from ttq_jax.checkpoint.ends import read_optional
from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.hf_tokenizer import load_tokenizer
from ttq_jax.checkpoint.model import Model
from ttq_jax.checkpoint.placing import Memory
from ttq_jax.checkpoint.safetensors import Safetensors, open_safetensors
from ttq_jax.checkpoint.unservable import check_unquantized, check_whole_model
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.errors import shown
from ttq_jax.foreign import COUNT, named, read_json
from ttq_jax.mesh import make_mesh
from ttq_jax.models.families import FAMILIES
from ttq_jax.models.family import DERIVED, Family, Settings
from ttq_jax.models.rope import stretched
from ttq_jax.models.sizes import HF_EXPERTS

_IDS = (None, COUNT, [COUNT])
# The settings have their own schema, `Settings`, which knows every key.
_ENDS = {"bos_token_id?": _IDS, "eos_token_id?": _IDS}
_CONFIG = _ENDS | {"text_config?": (None, _ENDS)}


def _family(directory: Path, raw: dict[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
      CheckpointError: an architecture that is not supported.
    """
    known = {kind: family for family in FAMILIES.values() for kind in family.hf_types}
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(
            f"{directory}: architecture {shown(kind)} (model_type in config.json) is not "
            f"supported; expected one of {', '.join(sorted(known))}"
        )
    return known[kind]


def read_config(
    directory: Path, ignore_keys: tuple[str, ...] = ()
) -> tuple[Family, ModelConfig, list[str]]:
    """Reads a directory's config.json.

    Args:
      directory: with config.json.
      ignore_keys: see `checkpoint.load`.

    Returns:
      The family, the config, and notes.

    Raises:
      CheckpointError: an unknown architecture or key, a missing key, a value not implemented.
    """
    check_whole_model(directory)
    raw = read_json(directory / "config.json", CheckpointError, _CONFIG)
    check_unquantized(directory, raw)
    family = _family(directory, raw)
    settings = Settings(raw, ignore_keys=ignore_keys)
    settings.ignore("quantization_config", "quantization")
    try:
        config = stretched(family.hf_config(settings))
        settings.finish()
    except ConfigError as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from error
    settings.note_unmet()
    return family, config, settings.notes


def _as_ids(value: Any) -> tuple[int, ...]:
    """An id, a list of them or null, as a tuple."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _ends(directory: Path) -> tuple[dict[str, int], tuple[int, ...], list[str]]:
    """(begin-of-text token by file, all end-of-text tokens, notes) of the configuration files."""
    raw = read_json(directory / "config.json", CheckpointError, _CONFIG)
    path = directory / "generation_config.json"
    generation, notes = read_optional(path, _ENDS)
    files = {
        path.name: generation, "config.json": raw,
        "text_config of config.json": raw.get("text_config") or {},
    }  # fmt: skip
    begins = {name: _as_ids(one.get("bos_token_id"))[:1] for name, one in files.items()}
    ends = tuple(i for one in files.values() for i in _as_ids(one.get("eos_token_id")))
    return {name: ids[0] for name, ids in begins.items() if ids}, ends, notes


def _modules(family: Family, source: Safetensors) -> dict[str, str]:
    """The family's tensor names with this checkpoint's prefix.

    Raises:
      CheckpointError: neither the embedding nor a head that may be tied to it is there.
    """
    probe = family.hf_modules["embed"] + ".weight"
    head = next((h for h in family.hf_heads if h + ".weight" in source.shapes), None)
    probes = [probe] if head is None else [probe, _first(family.hf_modules["layers.o"])]
    prefix = next(
        (p for one in probes for p in family.hf_prefixes if p + one in source.shapes), None
    )
    if prefix is None:
        expected = " or ".join(p + probe for p in family.hf_prefixes)
        raise CheckpointError(
            f"{source.label}: missing tensor {expected}. Check that this is a {family.name} "
            "checkpoint"
        )
    modules = {**family.hf_modules, **(HF_EXPERTS if source.experts else {})}
    named = {k: prefix + v for k, v in modules.items()}
    return named | {"head": head or family.hf_heads[0]}


def _first(module: str) -> str:
    """The name of a module's weight in the first layer."""
    return module.replace("{i}", "0") + ".weight"


def _equal(source: Safetensors, one: str, other: str) -> bool:
    """Whether two tensors are the same."""
    if source.shapes[one] != source.shapes[other]:
        return False
    rows = source.shapes[one][0]
    return all(
        np.array_equal(source.read(one, at, at + step), source.read(other, at, at + step))
        for at in range(0, rows, 1024)
        for step in [min(1024, rows - at)]
    )


def _tied(
    config: ModelConfig, source: Safetensors, modules: dict[str, str]
) -> tuple[ModelConfig, dict[str, str], list[str]]:
    """Ties head and embedding as the tensors say, which is what transformers does.

    Returns:
      The config, the names, and notes where config.json says otherwise.
    """
    head, table = (f"{modules[name]}.weight" for name in ("head", "embed"))
    if config.tie_embeddings and table not in source.shapes:
        return config, modules | {"embed": modules["head"]}, []
    if config.tie_embeddings and head in source.shapes and not _equal(source, head, table):
        note = f"tie_word_embeddings is true, but {head} differs from {table}: both are used"
        return dataclasses.replace(config, tie_embeddings=False), modules, [note]
    if not config.tie_embeddings and head not in source.shapes:
        note = f"tie_word_embeddings is false, but there is no {head}: {table} serves as head"
        return dataclasses.replace(config, tie_embeddings=True), modules, [note]
    return config, modules, []


def load_directory(
    directory: Path, *, name: str, dtype: Any = np.float32, progress: Progress | None = None,
    ignore_keys: tuple[str, ...] = (), head: int | None = None,
    mesh: Mapping[str, int] | None = None, memory: Memory = "device",
) -> Model:  # fmt: skip
    """Loads a Hugging Face directory.

    Args:
      directory: with config.json, *.safetensors and tokenizer files.
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
      CheckpointError: the directory cannot be loaded; the message says why.
    """
    family, config, notes = read_config(directory, ignore_keys)
    begins, ends, damaged = _ends(directory)
    tokenizer = load_tokenizer(
        directory, rows=config.vocab_size, begins=begins, ends=ends, default_end=family.end
    )
    with open_safetensors(directory, (*family.hf_ignored, *DERIVED)) as source:
        if config.n_experts:
            source.split_experts(config.n_experts)
        config, modules, read_so = _tied(config, source, _modules(family, source))
        devices = None if mesh is None else make_mesh(mesh, config)
        table = modules["head"] + ".weight"
        params, tables = assemble(
            config, source, modules, family.hf_edits, dtype=dtype, progress=progress, head=head,
            ignored=(table,) if config.tie_embeddings else (), mesh=devices, memory=memory,
        )  # fmt: skip
    chat, untold = read_template(directory, tokenizer)
    parts = [
        n for n in sorted(source.left_out) if any(fnmatchcase(n, p) for p in family.hf_ignored)
    ]
    if parts:
        notes += [f"only the text model is read; left out: {named(parts)}"]
    notes = [*notes, *damaged, *source.notes, *read_so, *tokenizer.notes, *untold]
    return Model(
        config, params, tokenizer, name, tokenizer.eos_ids, notes=tuple(notes), chat=chat,
        tables=tables, mesh=devices,
    )  # fmt: skip

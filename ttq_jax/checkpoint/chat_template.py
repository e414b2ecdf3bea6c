"""The chat template of a checkpoint: a Jinja text that makes one prompt of messages.

It stays as it is written here. `ttq_jax.chat` renders it, in a process of its own.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttq_jax.checkpoint.ends import read_optional
from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.tokenizer import Tokenizer
from ttq_jax.errors import shown
from ttq_jax.foreign import is_file, named, read_bytes, read_json

# The longest published template has 30 kB.
_BYTES = 2**20
_NAMED = [{"name": str, "template": str}]
_TEMPLATES = {"chat_template?": (None, str, _NAMED, {"*": str})}
_GGUF = "tokenizer.chat_template"


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Attributes:
      text: in Jinja.
      tokens: the texts of special tokens that it may use, by the names that it knows them by.
    """

    text: str
    tokens: Mapping[str, str]


def _default(value: Any, where: str) -> str | None:
    """The template to chat with, of one or of several that have names.

    Raises:
      CheckpointError: none of them is named "default".
    """
    if isinstance(value, list):
        value = {one["name"]: one["template"] for one in value}
    if not isinstance(value, dict):
        return value or None
    if value and "default" not in value:
        raise CheckpointError(
            f"{where}: expected a chat template named default, found {named(value)}. Rename the "
            "one to chat with"
        )
    return value.get("default")


def _tokens(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name: those of the settings, else the ones that begin and end a text."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
    found = {name: tokenizer.token(i) for name, i in ids.items() if i is not None}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return {name: text for name, text in found.items() if text is not None}


def read_template(directory: Path, tokenizer: Tokenizer) -> tuple[ChatTemplate | None, list[str]]:
    """The chat template of a Hugging Face directory.

    A file of its own wins over tokenizer_config.json, as in transformers.

    Args:
      directory: with the tokenizer's files.
      tokenizer: of the same directory.

    Returns:
      The template, None if there is none; and a note for a damaged chat_template.json.

    Raises:
      CheckpointError: a file is damaged, or holds only templates for something else than chat.
    """
    alone, notes = read_optional(directory / "chat_template.json", _TEMPLATES)
    # A damaged one is told of where the tokenizer is read.
    named_tokens, _ = read_optional(directory / "special_tokens_map.json", {})
    path = directory / "tokenizer_config.json"
    own = read_json(path, CheckpointError, _TEMPLATES) if is_file(path) else {}
    settings = alone | named_tokens | own
    text = _default(own.get("chat_template"), str(path))
    text = text or _default(alone.get("chat_template"), str(directory / "chat_template.json"))
    path = directory / "chat_template.jinja"
    if path.exists():
        raw_text = read_bytes(path, CheckpointError, _BYTES)
        try:
            text = raw_text.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{path}: expected UTF-8 text. Download it again") from e
    return (ChatTemplate(text, _tokens(tokenizer, settings)) if text else None), notes


def gguf_template(meta: Mapping[str, Any], tokenizer: Tokenizer, label: str) -> ChatTemplate | None:
    """The chat template in a GGUF header.

    Args:
      meta: the header.
      tokenizer: of the same file.
      label: the file, for messages.

    Returns:
      The template; None if there is none.

    Raises:
      CheckpointError: it is no text.
    """
    text = meta.get(_GGUF)
    if text is not None and not isinstance(text, str):
        raise CheckpointError(
            f"{label}: {_GGUF}: expected a text, got {shown(text)}. The file is damaged; download "
            "it again"
        )
    return ChatTemplate(text, _tokens(tokenizer, {})) if text else None

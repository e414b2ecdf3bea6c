"""Which tokens begin and end a text: up to four files of a checkpoint say so, and they disagree.

Every end that one of them names is an end: an answer that stops early shows it, one that does not
stop says nonsense. A text has one begin, and the tokenizer's is the one that prompts get.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.errors import shown
from ttq_jax.foreign import Schema, read_json


def read_optional(path: Path, schema: Schema) -> tuple[dict[str, Any], list[str]]:
    """A JSON file that a model can do without.

    Args:
      path: of the file.
      schema: see `ttq_jax.foreign`.

    Returns:
      Its content, {} if there is none or it is damaged; and a note in the latter case.
    """
    if not path.exists():
        return {}, []
    try:
        return read_json(path, CheckpointError, schema), []
    except CheckpointError as error:
        return {}, [f"{path.name} is left out: {str(error).removeprefix(f'{path}: ')}"]


def settled_begin(
    own: int | None, named: Mapping[str, int], backend: Any
) -> tuple[int | None, list[str]]:
    """The token that begins a text.

    Args:
      own: the tokenizer's, None if it names none.
      named: those of other files by the files' names, the one to prefer first.
      backend: the tokenizer.

    Returns:
      The id, None for none; and a note where the files disagree.
    """
    begin = own if own is not None else next(iter(named.values()), None)
    others = [f"{file} names {_told(backend, i)}" for file, i in named.items() if i != begin]
    if begin is None or not others:
        return begin, []
    taken = f"{_told(backend, begin)} is taken as the begin of a text"
    why = "which is what the tokenizer names" if own is not None else f"as {next(iter(named))} says"
    return begin, [f"{taken}, {why}, though {' and '.join(others)}"]


def settled_ends(
    named: Iterable[int], backend: Any, *, rows: int | None, default: int | None
) -> tuple[tuple[int, ...], list[str]]:
    """The tokens that end a text.

    Args:
      named: all that any file names.
      backend: the tokenizer.
      rows: of the model's embedding, None if not known.
      default: the family's, for files that name none; None if it has none.

    Returns:
      The ids, and notes.
    """
    ends, notes = tuple(dict.fromkeys(named)), []
    beyond = [i for i in ends if rows is not None and i >= rows and backend.id_to_token(i)]
    if beyond:
        told = ", ".join(_told(backend, i) for i in beyond)
        notes = [f"no answer ends with {told}: the embedding has {rows} rows and none for it"]
        ends = tuple(i for i in ends if i not in beyond)
    if ends:
        return ends, notes
    added = backend.get_added_tokens_decoder()
    if default is not None and default in added and added[default].special:
        told = _told(backend, default)
        return (default,), [*notes, f"no file names the end of a text; {told} is taken as usual"]
    return (), [*notes, "no file names a token that ends a text: answers run to their limit"]


def _told(backend: Any, i: int) -> str:
    """A token for a message."""
    token = backend.id_to_token(i)
    return f"token {i}" if token is None else f"{shown(token)} ({i})"

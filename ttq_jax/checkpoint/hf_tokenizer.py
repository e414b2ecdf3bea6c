"""The tokenizer of a Hugging Face directory."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ttq_jax.checkpoint.ends import read_optional, settled_begin, settled_ends
from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.sentencepiece_file import PieceTokenizer, content
from ttq_jax.checkpoint.tokenizer import Tokenizer, refused
from ttq_jax.errors import shown
from ttq_jax.foreign import COUNT, check, is_file, parse_json, read_bytes, read_json

if TYPE_CHECKING:
    import tokenizers

# The largest published tokenizer.json has 33 MB.
_BYTES = 2**26
# Each replacement may follow from the one before. Published ones make a text twice as long.
_MOST_GROWTH = 10_000
_FILE = {
    "model": {"vocab": ({"*": COUNT}, list)},
    "added_tokens?": (None, [{"id": COUNT, "content": str}]),
}
_TOKEN = (None, str, {"content": str})
_NAMED = {"bos_token?": _TOKEN, "eos_token?": _TOKEN}
_SETTINGS = _NAMED | {"add_bos_token?": (None, bool), "add_eos_token?": (None, bool)}


def _leading_special(backend: "tokenizers.Tokenizer") -> int | None:
    """The token that the tokenizer's own post-processor puts before a text, if any."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    return full[0] if full and bare and full[0] != bare[0] else None


def _growth(steps: Any) -> int:
    """How many times longer a text may become in the steps of a normalizer or decoder."""
    inside = steps.values() if isinstance(steps, dict) else steps if isinstance(steps, list) else ()
    here = steps.get("content") if isinstance(steps, dict) else None
    own = 1 + len(here) if isinstance(here, str) else 1
    return own * math.prod(map(_growth, inside))


def _fast_backend(path: Path) -> "tokenizers.Tokenizer":
    """The tokenizer of a tokenizer.json.

    Raises:
      CheckpointError: it cannot be read, or gives one id to two tokens or two ids to one.
    """
    import tokenizers

    raw = read_bytes(path, CheckpointError, _BYTES)
    data = parse_json(raw, str(path), CheckpointError)
    check(data, _FILE, str(path), CheckpointError)
    if max(_growth(data.get(key)) for key in ("normalizer", "decoder")) > _MOST_GROWTH:
        raise CheckpointError(
            f"{path}: its normalizer or decoder may make a text more than {_MOST_GROWTH} times as "
            "long. Download it again"
        )
    vocab = data["model"]["vocab"]
    if isinstance(vocab, dict) and len(set(vocab.values())) < len(vocab):
        raise CheckpointError(f"{path}: two tokens have the same id. Download it again")
    with refused(f"{path}: cannot be read"):
        backend = tokenizers.Tokenizer.from_str(raw.decode("utf-8-sig"))
    # The author's training script may have left truncation or padding on.
    backend.no_truncation()
    backend.no_padding()
    # The library counts on where a written id does not follow from the vocabulary.
    for token in data.get("added_tokens") or ():
        found = backend.token_to_id(token["content"])
        if found != token["id"]:
            raise CheckpointError(
                f"{path}: the added token {shown(token['content'])} has id {token['id']}, but by "
                f"the vocabulary it is {found}. Download it again"
            )
    return backend


def _hub_backend(directory: Path) -> "tokenizers.Tokenizer":
    """The tokenizer of a directory without tokenizer.json, by way of transformers.

    Raises:
      CheckpointError: there is none, or transformers cannot build it.
    """
    names = ("tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any(is_file(directory / name) for name in names):
        raise CheckpointError(
            f"{directory}: expected tokenizer.json (or {' or '.join(names)}), found none. Copy the "
            "model's tokenizer files there"
        )
    import transformers  # takes seconds to import; most directories do without

    with refused(f"{directory}: has no tokenizer.json, and transformers cannot build one"):
        slow = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        return slow.backend_tokenizer


def load_tokenizer(
    directory: Path, *, rows: int, begins: Mapping[str, int] = MappingProxyType({}),
    ends: Iterable[int] = (), default_end: int | None = None,
) -> Tokenizer:  # fmt: skip
    """The tokenizer of a Hugging Face directory.

    Whether prompts start with a begin-of-text token follows `add_bos_token` of
    tokenizer_config.json, and where that is silent the tokenizer's post-processor.

    Args:
      directory: with tokenizer.json, or the files of an older tokenizer.
      rows: of the model's embedding.
      begins: the begin-of-text token by each configuration file that names one.
      ends: the end-of-text tokens by them.
      default_end: the family's end-of-text token, for files that name none.

    Returns:
      The tokenizer.

    Raises:
      CheckpointError: there is none, or it is unreadable.
    """
    path = directory / "tokenizer_config.json"
    settings = read_json(path, CheckpointError, _SETTINGS) if path.exists() else {}
    adds = settings.get("add_bos_token")
    own: dict[str, int | None] = {"bos": None, "eos": None}
    backend: Any
    if (directory / "tokenizer.json").exists():
        backend = _fast_backend(directory / "tokenizer.json")
    elif is_file(directory / "tokenizer.model"):
        backend = PieceTokenizer(directory, settings)
        # Such prompts begin with it, as in transformers, unless the settings say otherwise.
        adds, own = adds is not False, dict(backend.ids)
    else:
        backend = _hub_backend(directory)
    more, notes = read_optional(directory / "special_tokens_map.json", _NAMED)
    for name in own:
        texts = (content(one.get(f"{name}_token")) for one in (settings, more))
        text = next(filter(None, texts), None)
        own[name] = backend.token_to_id(text or "") if text else own[name]
    with refused(f"{directory}: its tokenizer cannot read a text"):
        leading = _leading_special(backend)
    if adds is None:
        adds, own["bos"] = leading is not None, own["bos"] if leading is None else leading
    if settings.get("add_eos_token"):
        notes.append("add_eos_token is true, but no end-of-text token is put behind a prompt")
    begin, told = settled_begin(own["bos"], begins, backend)
    named = (*ends, *([] if own["eos"] is None else [own["eos"]]))
    eos_ids, told_too = settled_ends(named, backend, rows=rows, default=default_end)
    return Tokenizer(
        backend, bos_id=begin, adds_bos=bool(adds), eos_ids=eos_ids, rows=rows,
        notes=(*notes, *told, *told_too),
    )  # fmt: skip

"""SentencePiece's own file, `tokenizer.model`, which Llama 1 and 2 were published with.

It holds pieces with scores, from which the merges follow as in a GGUF header. What SentencePiece
does not know is in JSON files beside it: tokens that were added later, and which ones are special.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.gguf_tokenizer import (
    BYTE,
    CONTROL,
    JOINS,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    implied_merges,
)
from ttq_jax.checkpoint.tokenizer import refused
from ttq_jax.errors import shown
from ttq_jax.foreign import COUNT, check, read_bytes, read_json

if TYPE_CHECKING:
    import tokenizers

# The largest published one has 5 MB and 262144 pieces; llama.cpp's longest token has 1024 letters.
_BYTES, _MOST, _LONGEST = 2**26, 2**21, 1024
_BPE = 2
_ALL_BYTES = {f"<0x{i:02X}>" for i in range(256)}
_KINDS = {1: "Unigram", 3: "words", 4: "characters"}

_FLAGS = ("lstrip", "rstrip", "single_word", "special")
_ADDED = {"content": str} | {f"{flag}?": (None, bool) for flag in _FLAGS}
_NAMES = tuple(f"{one}_token" for one in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_TOKEN = (None, str, {"content": str})
_NAMED = {f"{name}?": _TOKEN for name in _NAMES} | {"additional_special_tokens?": (None, [_TOKEN])}
_SETTINGS = _NAMED | {
    "added_tokens_decoder?": (None, {"*": _ADDED}), "legacy?": (None, bool),
    "add_prefix_space?": (None, bool),
}  # fmt: skip


def content(token: Any) -> str | None:
    """The text of a special token in a JSON file: a string, or an object with one."""
    return token.get("content") if isinstance(token, dict) else token


def read_model(path: Path) -> Any:
    """Reads a `tokenizer.model`.

    Args:
      path: of the file.

    Returns:
      SentencePiece's `ModelProto`.

    Raises:
      CheckpointError: it is none, or asks for what is not implemented.
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    raw = read_bytes(path, CheckpointError, _BYTES)
    with refused(f"{path}: no SentencePiece model"):
        model = import_protobuf().ModelProto.FromString(raw)
        pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    texts = {text for text, _, _ in pieces}
    # protobuf leaves what is no UTF-8 as bytes.
    fit = 1 <= len(pieces) <= _MOST and all(
        isinstance(text, str) and 0 < len(text) <= _LONGEST and "\0" not in text for text in texts
    )
    once = len(texts) == len(pieces) and [k for _, _, k in pieces].count(UNKNOWN) == 1
    in_bytes = {text for text, _, kind in pieces if kind == BYTE}
    complete = in_bytes == (_ALL_BYTES if trainer.byte_fallback else set())
    if not (fit and once and complete and all(math.isfinite(score) for _, score, _ in pieces)):
        raise CheckpointError(
            f"{path}: expected 1 to {_MOST} pieces of 1 to {_LONGEST} letters, each once and with "
            "a finite score, one of them unknown, and all 256 bytes or none. The file is damaged; "
            "download it again"
        )
    kind = trainer.model_type
    for asked, what in (
        (kind != _BPE, f"a vocabulary of {_KINDS.get(kind, kind)}, not of BPE"),
        (bool(normalizer.precompiled_charsmap), "a character map"),
        (not normalizer.escape_whitespaces, "spaces that are kept as such"),
        (trainer.treat_whitespace_as_suffix, "spaces at the ends of words"),
    ):
        if asked:
            raise CheckpointError(
                f"{path}: asks for {what}, which is not implemented. Make a tokenizer.json of it, "
                "with AutoTokenizer and save_pretrained of transformers"
            )
    return model


def _add_tokens(
    backend: "tokenizers.Tokenizer", directory: Path, settings: Mapping[str, Any]
) -> None:
    """Adds what the JSON files list, at the ids that they give.

    Raises:
      CheckpointError: an id that is not the next one, or another token's.
    """
    from tokenizers import AddedToken

    listed: dict[int, dict[str, Any]] = {}
    path = directory / "added_tokens.json"
    if path.exists():
        plain = read_json(path, CheckpointError, {"*": COUNT})
        listed = {i: {"content": token} for token, i in plain.items()}
    for key, token in (settings.get("added_tokens_decoder") or {}).items():
        if not re.fullmatch(r"\d{1,9}", key, re.ASCII):
            raise CheckpointError(
                f"{directory / 'tokenizer_config.json'}: added_tokens_decoder: expected ids of "
                f"tokens, got {shown(key)}"
            )
        listed[int(key)] = token
    path = directory / "special_tokens_map.json"
    more = read_json(path, CheckpointError, _NAMED) if path.exists() else {}
    special: dict[str, None] = {}
    for said in (settings, more):
        names = [*map(said.get, _NAMES), *(said.get("additional_special_tokens") or ())]
        special |= dict.fromkeys(text for text in map(content, names) if text)
    for i, token in sorted(listed.items()):
        flags = {flag: bool(token.get(flag)) for flag in _FLAGS}
        flags["special"] |= token["content"] in special
        backend.add_tokens([AddedToken(token["content"], normalized=False, **flags)])
        found = backend.token_to_id(token["content"])
        if found != i:
            raise CheckpointError(
                f"{directory}: the added token {shown(token['content'])} has id {i}, but by the "
                f"vocabulary it is {found}. Download its tokenizer again"
            )
    already = {token["content"] for token in listed.values()}
    rest = [AddedToken(text, normalized=False) for text in special if text not in already]
    backend.add_special_tokens(rest)


@dataclasses.dataclass(frozen=True)
class FromModel:
    """What a directory with a `tokenizer.model` gives.

    Attributes:
      backend: the tokenizer.
      leading_space: whether a text that begins with no added token is to be read with a space
        before it; the backend does not add it.
      ids: the tokens that begin ("bos") and end ("eos") a text by that file, or None.
      notes: where its ids may be others than SentencePiece's.
    """

    backend: "tokenizers.Tokenizer"
    leading_space: bool
    ids: Mapping[str, int | None]
    notes: tuple[str, ...]


def from_model(directory: Path, settings: Mapping[str, Any]) -> FromModel:
    """The tokenizer of a directory with a `tokenizer.model`.

    Args:
      directory: with that file, and maybe added_tokens.json and special_tokens_map.json.
      settings: its tokenizer_config.json.

    Returns:
      See the class.

    Raises:
      CheckpointError: a file that cannot be read, or asks for what is not implemented.
    """
    from tokenizers import AddedToken, Regex, decoders, pre_tokenizers

    check(settings, _SETTINGS, str(directory / "tokenizer_config.json"), CheckpointError)
    path = directory / "tokenizer.model"
    proto = read_model(path)
    of_kind: dict[int, list[str]] = collections.defaultdict(list)
    for piece in proto.pieces:
        of_kind[piece.type].append(piece.piece)
    prefix = settings.get("add_prefix_space")
    prefix = proto.normalizer_spec.add_dummy_prefix if prefix is None else prefix
    # Behind a special token, too, unless the directory says that it is without this old slip.
    everywhere = prefix and settings.get("legacy") is not False
    with refused(f"{path}: its vocabulary is inconsistent"):
        backend, tied = _merging(proto, whole=bool(of_kind[USER_DEFINED]))
    backend.normalizer = _normalizer(proto, directory, prefix=prefix, everywhere=everywhere)
    if of_kind[USER_DEFINED]:
        # Such pieces are cut out of the text before anything is merged, the longest first.
        longest = sorted(of_kind[USER_DEFINED], key=len, reverse=True)
        cut = Regex("|".join(map(re.escape, longest)))
        backend.pre_tokenizer = pre_tokenizers.Split(cut, "isolated")
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in of_kind[CONTROL]])
    _add_tokens(backend, directory, settings)
    named = {"bos": proto.trainer_spec.bos_id, "eos": proto.trainer_spec.eos_id}
    ids = {name: i if 0 <= i < len(proto.pieces) else None for name, i in named.items()}
    notes = (
        f"tokenizer.model has {tied} pieces of equal scores; where two of them overlap in a text, "
        "SentencePiece takes the left one and this package the first of the file, so that some "
        "token ids may be others than the model was trained with",
    )  # fmt: skip
    return FromModel(backend, bool(prefix and not everywhere), ids, notes if tied else ())


def _merging(proto: Any, *, whole: bool) -> tuple["tokenizers.Tokenizer", int]:
    """The bare tokenizer, and how many pieces that text is merged into have another's score."""
    from tokenizers import Tokenizer, models

    joined = {piece.piece: piece.score for piece in proto.pieces if piece.type in JOINS}
    unknown = [piece.piece for piece in proto.pieces if piece.type == UNKNOWN]
    model = models.BPE(
        {piece.piece: i for i, piece in enumerate(proto.pieces)},
        implied_merges(joined, sorted(joined, key=lambda text: -joined[text])),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
        ignore_merges=whole,
    )
    normal = [p.score for p in proto.pieces if p.type == NORMAL and len(p.piece) > 1]
    return Tokenizer(model), len(normal) - len(set(normal))


def _normalizer(
    proto: Any, directory: Path, *, prefix: bool, everywhere: bool
) -> "tokenizers.normalizers.Normalizer":
    """What is done to a text, or to a stretch of it between added tokens, before it is cut.

    Raises:
      CheckpointError: a combination that is not implemented.
    """
    from tokenizers import Regex, normalizers

    changes: list[tuple[Any, str]] = [(" ", "▁")]
    if proto.normalizer_spec.remove_extra_whitespaces:
        if prefix and not everywhere:
            raise CheckpointError(
                f"{directory}: legacy = false beside a tokenizer.model that removes whitespace is "
                "not implemented. Take it out of tokenizer_config.json"
            )
        runs = [(Regex(r"\A +"), ""), (Regex(" {2,}"), " ")]
        changes = [*runs, *changes, (Regex(r"▁+\z"), "")]
    steps: list[Any] = [normalizers.Replace(found, new) for found, new in changes]
    return normalizers.Sequence([*steps, normalizers.Prepend("▁")] if everywhere else steps)

"""Directories with SentencePiece's own file, `tokenizer.model`, which Llama 1 and 2 came with.

SentencePiece reads it, so that the ids are its own: a conversion to merges cannot order pieces of
equal scores as it does, and extended vocabularies have thousands of them. What SentencePiece does
not know is in JSON files beside it: tokens that were added later, and which ones are special.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.tokenizer import refused
from ttq_jax.errors import shown
from ttq_jax.foreign import COUNT, check, read_bytes, read_json

if TYPE_CHECKING:
    import tokenizers

# The largest published one has 5 MB.
_BYTES = 2**26
_CONTROL = 3
_SPACES = re.compile(r"\s*")
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


def _read(path: Path) -> Any:
    """A file's `ModelProto`.

    Raises:
      CheckpointError: it is none, or asks for what is not implemented.
    """
    from sentencepiece import sentencepiece_model_pb2 as messages

    raw = read_bytes(path, CheckpointError, _BYTES)
    with refused(f"{path}: no SentencePiece model"):
        model = messages.ModelProto.FromString(raw)  # type: ignore[attr-defined]
        sound = all(math.isfinite(piece.score) and piece.piece.encode() for piece in model.pieces)
    if not sound:
        raise CheckpointError(
            f"{path}: expected pieces with a text and a finite score. The file is damaged; "
            "download it again"
        )
    if (
        not model.normalizer_spec.escape_whitespaces
        or model.trainer_spec.treat_whitespace_as_suffix
    ):
        raise CheckpointError(
            f"{path}: asks for spaces that are kept as such, or at the ends of words, which is not "
            "implemented. Make a tokenizer.json of it, with AutoTokenizer and save_pretrained of "
            "transformers"
        )
    return model


def _listed(directory: Path, settings: Mapping[str, Any]) -> tuple[dict[int, Any], list[str]]:
    """(tokens with their flags by id, the texts of special tokens) of the JSON files.

    Raises:
      CheckpointError: a file that is damaged.
    """
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
    special: list[str] = []
    for said in (settings, more):
        named = [*map(said.get, _NAMES), *(said.get("additional_special_tokens") or ())]
        special += [text for text in map(content, named) if text and text not in special]
    return listed, special


class PieceTokenizer:
    """What `Tokenizer` needs of a `tokenizers.Tokenizer`, for a directory with a tokenizer.model.

    Attributes:
      ids: the tokens that begin ("bos") and end ("eos") a text by that file, or None.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]):
        """Reads the files.

        Args:
          directory: with tokenizer.model, and maybe added_tokens.json and special_tokens_map.json.
          settings: its tokenizer_config.json.

        Raises:
          CheckpointError: a file that cannot be read, or asks for what is not implemented.
        """
        from sentencepiece import SentencePieceProcessor
        from tokenizers import decoders

        check(settings, _SETTINGS, str(directory / "tokenizer_config.json"), CheckpointError)
        path = directory / "tokenizer.model"
        proto = _read(path)
        prefix = settings.get("add_prefix_space")
        prefix = proto.normalizer_spec.add_dummy_prefix if prefix is None else prefix
        # Behind a special token, too, unless the directory says that it is without this old slip.
        everywhere = prefix and settings.get("legacy") is not False
        self._readers = []
        for spaced in (prefix, everywhere):
            proto.normalizer_spec.add_dummy_prefix = spaced
            with refused(f"{path}: SentencePiece cannot read it"):
                self._readers.append(SentencePieceProcessor(model_proto=proto.SerializeToString()))
        self._tokens = [piece.piece for piece in proto.pieces]
        self._vocab = {token: i for i, token in enumerate(self._tokens)}
        ends = {"bos": proto.trainer_spec.bos_id, "eos": proto.trainer_spec.eos_id}
        self.ids = {k: i if 0 <= i < len(self._tokens) else None for k, i in ends.items()}
        undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        self._decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
        self._added: dict[int, tokenizers.AddedToken] = {}
        for piece in proto.pieces:
            if piece.type == _CONTROL:
                self._add(piece.piece, {"special": True})
        listed, special = _listed(directory, settings)
        for i, token in sorted(listed.items()):
            text = token["content"]
            self._add(text, token | {"special": token.get("special") or text in special})
            if self._vocab[text] != i:
                raise CheckpointError(
                    f"{directory}: the added token {shown(text)} has id {i}, but by the vocabulary "
                    f"it is {self._vocab[text]}. Download its tokenizer again"
                )
        already = {token["content"] for token in listed.values()}
        for text in special:
            if text not in already:
                self._add(text, {"special": True})
        self._cut = re.compile("|".join(map(self._pattern, self._longest_first())) or r"(?!)")

    def _add(self, text: str, flags: Mapping[str, Any]) -> None:
        """Adds a token, behind the others if it is new."""
        from tokenizers import AddedToken

        i = self._vocab.setdefault(text, len(self._tokens))
        if i == len(self._tokens):
            self._tokens.append(text)
        kept = {flag: bool(flags.get(flag)) for flag in _FLAGS}
        self._added[i] = AddedToken(text, normalized=False, **kept)

    def _longest_first(self) -> "list[tokenizers.AddedToken]":
        """The added tokens in the order in which they are looked for."""
        found = [token for token in self._added.values() if token.content]
        return sorted(found, key=lambda token: -len(token.content))

    @staticmethod
    def _pattern(token: "tokenizers.AddedToken") -> str:
        """What an added token matches in a text."""
        text = re.escape(token.content)
        return rf"(?<!\w){text}(?!\w)" if token.single_word else text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """Token ids of a text, as the attribute `ids` of what is returned."""
        ids: list[int] = []
        at = 0
        for found in self._cut.finditer(text):
            i, stretch = self._vocab[found[0]], text[at : found.start()]
            token = self._added[i]
            ids += self._stretch(stretch.rstrip() if token.lstrip else stretch, first=not at)
            ids.append(i)
            behind = _SPACES.match(text, found.end()) if token.rstrip else None
            at = behind.end() if behind else found.end()
        return SimpleNamespace(ids=ids + self._stretch(text[at:], first=not at))

    def _stretch(self, text: str, *, first: bool) -> list[int]:
        """Ids of a text without added tokens."""
        return self._readers[0 if first else 1].encode(text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        hidden = {i for i, token in self._added.items() if token.special and skip_special_tokens}
        known = (i for i in ids if i not in hidden and 0 <= i < len(self._tokens))
        return self._decoder.decode([self._tokens[i] for i in known])

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, None if there is no such token."""
        return self._vocab.get(token)

    def id_to_token(self, i: int) -> str | None:
        """The token of an id, None for an id without one."""
        return self._tokens[i] if 0 <= i < len(self._tokens) else None

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """The tokens and their ids; without the added ones, those of SentencePiece's file."""
        size = len(self._tokens) if with_added_tokens else self._readers[0].vocab_size()
        return {token: i for i, token in enumerate(self._tokens[:size])}

    def get_added_tokens_decoder(self) -> "dict[int, tokenizers.AddedToken]":
        """The tokens that are matched whole, by id."""
        return self._added

"""The tokenizer inside a GGUF file, built from its vocabulary and merges.

Two kinds occur: "gpt2", byte-level BPE with its merges written out, and "llama", SentencePiece
BPE, whose merges follow from the vocabulary: any two tokens merge if their union is a token, the
better-ranked union first.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ttq_jax.checkpoint.ends import settled_ends
from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.tokenizer import Tokenizer, refused
from ttq_jax.errors import shown

if TYPE_CHECKING:
    import tokenizers

_KEY = "tokenizer.ggml."
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

# How text is cut before merging, one entry per way a vocabulary was trained.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
_PRE_TOKENIZERS = ("smollm", "gpt-2", "default", "qwen2", "llama-bpe", "llama3", "llama-v3")

# Key -> the type of its value, as the header's reader gives it; "i", "f" and "ids" are arrays.
_TYPES: dict[str, Any] = {
    "model": str, "pre": str, "tokens": list, "merges": list, "token_type": "i", "scores": "f",
    "bos_token_id": int, "eos_token_id": int, "eot_token_id": int, "eom_token_id": int,
    "eos_token_ids": "ids", "unknown_token_id": int,
    "add_bos_token": bool, "add_eos_token": bool, "add_space_prefix": bool,
    "remove_extra_whitespaces": bool,
}  # fmt: skip
_WORDS = {
    str: "a string", list: "strings", int: "the id of a token", bool: "true or false",
    "ids": "ids of tokens", "i": "an integer for each token", "f": "a finite number for each token",
}  # fmt: skip
# Merges that follow from a token take time that grows with the square of its length.
_LONGEST = 1024

_NOT_IMPLEMENTED = {
    "add_eos_token": "an end-of-text token after every prompt",
    "remove_extra_whitespaces": "removing whitespace",
    "precompiled_charsmap": "a character map",
}


def _pre_tokenizer(name: str) -> "tokenizers.pre_tokenizers.PreTokenizer":
    """The pre-tokenizer of a byte-level vocabulary."""
    from tokenizers import Regex, pre_tokenizers

    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("gpt-2", "default"):
        return whole
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    split = Regex(_QWEN2 if name == "qwen2" else _LLAMA3)
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(split, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])


def _byte_level(meta: Mapping[str, Any], label: str) -> "tokenizers.Tokenizer":
    """A "gpt2" tokenizer.

    Raises:
      CheckpointError: a pre-tokenizer that is not implemented, or inconsistent lists.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    pre = meta.get(_KEY + "pre")
    if pre not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{label}: {_KEY}pre = {shown(pre)} is not implemented; expected one of "
            f"{', '.join(_PRE_TOKENIZERS)}. Load the model from a Hugging Face directory instead"
        )
    if _KEY + "merges" not in meta:
        raise CheckpointError(f"{label}: expected {_KEY}merges, found none; convert it again")
    vocab = {token: i for i, token in enumerate(meta[_KEY + "tokens"])}
    _check_distinct(vocab, meta[_KEY + "tokens"], label)
    merges = [tuple(m.split(" ", 1)) for m in meta[_KEY + "merges"]]
    llama3 = pre in ("llama-bpe", "llama3", "llama-v3")
    with refused(f"{label}: its vocabulary and merges disagree"):
        backend = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=llama3))
    backend.pre_tokenizer = _pre_tokenizer(pre)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _fits(value: Any, kind: Any, tokens: int) -> bool:
    """Whether a value of the header is of its kind, and as long as the list of tokens."""
    if kind is list:
        texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
        return texts and all(len(one) <= _LONGEST for one in value)
    if kind == "ids":
        integers = isinstance(value, np.ndarray) and value.dtype.kind in "iu"
        return integers and all(0 <= i < tokens for i in value.tolist())
    if isinstance(kind, str):
        array = isinstance(value, np.ndarray) and value.shape == (tokens,)
        number = array and value.dtype.kind in ("iu" if kind == "i" else "iuf")
        return number and bool(np.isfinite(value).all())
    return type(value) is kind and (kind is not int or 0 <= value < tokens)


def _check_types(meta: Mapping[str, Any], label: str) -> None:
    """Checks every value that is used.

    Raises:
      CheckpointError: one is of another type or length, or an id is no token's.
    """
    tokens = meta[_KEY + "tokens"]
    count = len(tokens) if isinstance(tokens, list) else 0
    for key, kind in _TYPES.items():
        value = meta.get(_KEY + key)
        if value is not None and not _fits(value, kind, count):
            what = f"{_WORDS[kind]} of at most {_LONGEST}" if kind is list else _WORDS[kind]
            raise CheckpointError(
                f"{label}: {_KEY}{key}: expected {what}, got {shown(value)}. The file is damaged; "
                "download it again"
            )


def _check_distinct(vocab: Collection[str], tokens: Collection[str], label: str) -> None:
    """Checks that no token has two ids.

    Raises:
      CheckpointError: one has.
    """
    if len(vocab) < len(tokens):
        raise CheckpointError(
            f"{label}: a token is in the vocabulary twice. The file is damaged; download it again"
        )


def _implied_merges(vocab: Collection[str], ranked: Iterable[str]) -> list[tuple[str, str]]:
    """All pairs of tokens whose union is a token.

    Args:
      vocab: the tokens that take part.
      ranked: the same tokens, best first.

    Returns:
      The pairs, best union first, and of one union the pair with the longest left part first.
    """
    return [
        (token[:i], token[i:])
        for token in ranked
        for i in range(len(token) - 1, 0, -1)
        if token[:i] in vocab and token[i:] in vocab
    ]


def _sentencepiece(meta: Mapping[str, Any], label: str) -> "tokenizers.Tokenizer":
    """A "llama" tokenizer.

    Raises:
      CheckpointError: an inconsistent vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, types = meta[_KEY + "tokens"], meta[_KEY + "token_type"]
    scores, gemma = meta[_KEY + "scores"], meta.get("general.architecture") == "gemma3"
    # Files spell runs of spaces as such; after normalization they are runs of "▁".
    tokens = ["▁" * len(t) if " " in t and not t.strip() else t for t in tokens]
    vocab = {token: i for i, token in enumerate(tokens)}
    _check_distinct(vocab, tokens, label)
    joins = {_NORMAL, _USER_DEFINED, _UNUSED}
    mergeable = {
        t: i for (t, i), k in zip(vocab.items(), types.tolist(), strict=True) if k in joins
    }
    # Gemma's scores do not follow its merge order; its token order does.
    ranked = list(mergeable) if gemma else sorted(mergeable, key=lambda t: -scores[mergeable[t]])
    unknown = meta.get(_KEY + "unknown_token_id")
    with refused(f"{label}: its vocabulary is inconsistent"):
        model = models.BPE(
            vocab,
            _implied_merges(mergeable, ranked),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    backend = Tokenizer(model)
    prefix = bool(meta.get(_KEY + "add_space_prefix", True))
    replace = normalizers.Replace(" ", "▁")
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(steps)
    return backend


def _add_special(backend: "tokenizers.Tokenizer", meta: Mapping[str, Any]) -> None:
    """Control tokens and user-defined ones are matched whole; only the former are hidden."""
    from tokenizers import AddedToken

    tokens, types = meta[_KEY + "tokens"], meta.get(_KEY + "token_type")
    if types is None:
        return
    whole: dict[int, list[AddedToken]] = {_CONTROL: [], _USER_DEFINED: []}
    for token, kind in zip(tokens, types.tolist(), strict=True):
        if kind in whole and backend.token_to_id(token) is not None:
            whole[kind].append(AddedToken(token, normalized=False, special=kind == _CONTROL))
    backend.add_special_tokens(whole[_CONTROL])
    backend.add_tokens(whole[_USER_DEFINED])


def build_tokenizer(
    meta: Mapping[str, Any], label: str, rows: int | None = None, default_end: int | None = None
) -> Tokenizer:
    """The tokenizer that a GGUF header describes.

    Args:
      meta: the header.
      label: the file, for messages.
      rows: of the model's embedding, None if not known.
      default_end: the family's end-of-text token, for a header that names none.

    Returns:
      The tokenizer; its `eos_ids` are the header's ends of a text, a turn and a message.

    Raises:
      CheckpointError: a kind of tokenizer that is not implemented, or an inconsistent header.
    """
    kind = meta.get(_KEY + "model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if not isinstance(kind, str) or kind not in builders:
        raise CheckpointError(
            f"{label}: {_KEY}model = {shown(kind)} is not implemented; expected "
            f"{' or '.join(builders)}. Load the model from a Hugging Face directory instead"
        )
    needed = ("tokens", "token_type", "scores") if kind == "llama" else ("tokens",)
    for key in needed:
        if _KEY + key not in meta:
            raise CheckpointError(f"{label}: expected {_KEY}{key}, found none; convert it again")
    _check_types(meta, label)
    for key, what in _NOT_IMPLEMENTED.items():
        value = meta.get(_KEY + key)
        if value is not None and value is not False:
            raise CheckpointError(
                f"{label}: {_KEY}{key} asks for {what}, which is not implemented. Load the model "
                "from a Hugging Face directory instead"
            )
    backend = builders[kind](meta, label)
    _add_special(backend, meta)
    eos = [meta.get(f"{_KEY}{name}_token_id") for name in ("eos", "eot", "eom")]
    named = [*(i for i in eos if i is not None), *map(int, meta.get(_KEY + "eos_token_ids", ()))]
    eos_ids, notes = settled_ends(named, backend, rows=rows, default=default_end)
    # llama.cpp's defaults where the header is silent.
    implied = kind == "llama" or meta.get(_KEY + "pre") in ("llama-bpe", "llama3", "llama-v3")
    begin = meta.get(_KEY + "bos_token_id")
    if begin is None and kind == "llama" and meta[_KEY + "token_type"][1:2].tolist() == [_CONTROL]:
        begin = 1
    return Tokenizer(
        backend,
        bos_id=begin,
        adds_bos=bool(meta.get(_KEY + "add_bos_token", implied)),
        eos_ids=eos_ids,
        notes=tuple(notes),
        vocab_size=len(meta[_KEY + "tokens"]),
        rows=rows,
    )

"""Text to token ids and back, for every form in which checkpoints store their tokenizer."""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.errors import shown
from ttq_jax.foreign import COUNT, check, is_file, parse_json, read_bytes, read_json, why

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
_SETTINGS = {
    "bos_token?": (None, str, {"content": str}), "add_bos_token?": (None, bool),
}  # fmt: skip


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Turns whatever the tokenizers library raises into one error.

    Args:
      what: the file and what is wrong with it, if anything is.

    Yields:
      Nothing.

    Raises:
      CheckpointError: the library could not do it.
    """
    try:
        yield
    except BaseException as error:
        # A panic of its Rust code is no `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what} ({why(error)}). Download it again") from error


class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
      bos_id: the begin-of-text token, or None.
      adds_bos: whether this checkpoint's prompts start with it.
      eos_ids: tokens that end a text.
      vocab_size: one more than the largest token id.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        bos_id: int | None,
        adds_bos: bool,
        eos_ids: Iterable[int] = (),
        vocab_size: int | None = None,
    ):
        """Wraps a fast tokenizer.

        Args:
          backend: does the work; its post-processor is not used.
          bos_id: the begin-of-text token, or None.
          adds_bos: whether prompts start with it.
          eos_ids: tokens that end a text.
          vocab_size: one more than the largest token id; None to find out.
        """
        self._backend = backend
        self.bos_id = bos_id
        self.adds_bos = adds_bos and bos_id is not None
        self.eos_ids = tuple(eos_ids)
        if vocab_size is None:
            vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.vocab_size = vocab_size

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognized.

        Args:
          text: any text.
          add_bos: start with the begin-of-text token, if this checkpoint's prompts do.

        Returns:
          The ids.
        """
        with refused(f"the model's tokenizer cannot read {shown(text)}"):
            ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos and self.adds_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens.

        Args:
          ids: token ids.

        Returns:
          The text; ids that end inside a character end it with the replacement character.
        """
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def token(self, i: int) -> str | None:
        """A token as it is written in a text or a template; None if there is no such token."""
        return self._backend.id_to_token(i)

    def is_special(self, i: int) -> bool:
        """Whether a token is a mark, such as the end of a turn, and no part of a text."""
        added = self._backend.get_added_tokens_decoder().get(i)
        return added is not None and added.special

    def continuation(self, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
        """The text that new tokens add to a prompt, without special tokens.

        It is the text of all tokens minus the text of the prompt: decoders of the SentencePiece
        kind drop the first space of a text, so that new tokens by themselves lose theirs.

        Args:
          prompt_ids: token ids.
          new_ids: what follows them.

        Returns:
          The text. Where the new tokens change the end of the prompt's text, because they complete
          a character that began there, it starts with the first character that differs.
        """
        before, whole = self.decode(prompt_ids), self.decode([*prompt_ids, *new_ids])
        pairs = zip(before, whole, strict=False)
        kept = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], pairs))
        # While a run of byte tokens ends inside a character, byte fallback spoils all of it, the
        # prompt's characters too: a replacement character for each of their bytes.
        spoiled = len(before[kept:].encode())
        return whole[kept:].removeprefix("\ufffd" * spoiled)


def _content(token: Any) -> str | None:
    """The text of a special token in tokenizer_config.json: a string, or an object with one."""
    return token.get("content") if isinstance(token, dict) else token


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
    directory: Path, *, bos_id: int | None = None, eos_ids: Iterable[int] = ()
) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    Whether prompts start with a begin-of-text token follows `add_bos_token` of
    tokenizer_config.json, and where that is silent the tokenizer's post-processor.

    Args:
      directory: with tokenizer.json, or the files of an older tokenizer.
      bos_id: the begin-of-text token by config.json.
      eos_ids: the end-of-text tokens.

    Returns:
      The tokenizer.

    Raises:
      CheckpointError: there is none, or it is unreadable.
    """
    path = directory / "tokenizer.json"
    backend = _fast_backend(path) if path.exists() else _hub_backend(directory)
    # A tokenizer.json may ask for truncation or padding, as its author's training script left it.
    backend.no_truncation()
    backend.no_padding()
    settings_path = directory / "tokenizer_config.json"
    absent = not settings_path.exists()
    settings = {} if absent else read_json(settings_path, CheckpointError, _SETTINGS)
    name = _content(settings.get("bos_token"))
    named = backend.token_to_id(name) if name else None
    with refused(f"{directory}: its tokenizer cannot read a text"):
        leading = _leading_special(backend)
    adds = settings.get("add_bos_token")
    if adds is None:
        adds, named = leading is not None, leading if leading is not None else named
    return Tokenizer(
        backend, bos_id=bos_id if named is None else named, adds_bos=bool(adds), eos_ids=eos_ids
    )

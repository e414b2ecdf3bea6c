"""Text to token ids and back, for every form in which checkpoints store their tokenizer."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.errors import shown
from ttq_jax.foreign import why
from ttq_jax.prompts import check_ids


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
      rows: of the model's embedding, None if not known; a text may not contain a token beyond.
      notes: what its files left open, see `Model.notes`.
    """

    def __init__(
        self,
        backend: Any,
        *,
        bos_id: int | None,
        adds_bos: bool,
        eos_ids: Iterable[int] = (),
        vocab_size: int | None = None,
        rows: int | None = None,
        notes: tuple[str, ...] = (),
    ):
        """Wraps a fast tokenizer.

        Args:
          backend: does the work: a `tokenizers.Tokenizer`, of which the post-processor is not used,
            or what has its methods.
          bos_id: the begin-of-text token, or None.
          adds_bos: whether prompts start with it.
          eos_ids: tokens that end a text.
          vocab_size: one more than the largest token id; None to find out.
          rows: see the attribute.
          notes: see the attribute.
        """
        self._backend = backend
        self.bos_id = bos_id
        self.adds_bos = adds_bos and bos_id is not None
        self.eos_ids = tuple(eos_ids)
        if vocab_size is None:
            vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.vocab_size, self.rows, self.notes = vocab_size, rows, notes

    @property
    def ordinary_size(self) -> int:
        """One more than the largest id of a token that a text need not spell out to contain."""
        apart = self._backend.get_added_tokens_decoder()
        vocab = self._backend.get_vocab(with_added_tokens=False)
        return max((i for i in vocab.values() if i not in apart), default=-1) + 1

    def token(self, i: int) -> str | None:
        """The token of an id, as the vocabulary spells it; None for an id without one."""
        return self._backend.id_to_token(i) if 0 <= i < self.vocab_size else None

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognized.

        Args:
          text: any text.
          add_bos: start with the begin-of-text token, if this checkpoint's prompts do; a text that
            begins with it, as a rendered template may, gets no second one.

        Returns:
          The ids.

        Raises:
          PromptError: the text contains a token that the model has no row for.
        """
        with refused(f"the model's tokenizer cannot read {shown(text)}"):
            ids = self._backend.encode(text, add_special_tokens=False).ids
        if self.rows is not None and max(ids, default=0) >= self.rows:
            check_ids(ids, self.rows, self, f"the text {shown(text)}")
        begun = ids[:1] == [self.bos_id]
        if add_bos and self.adds_bos and self.bos_id is not None and not begun:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens.

        Args:
          ids: token ids.

        Returns:
          The text; ids that end inside a character end it with the replacement character.
        """
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

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

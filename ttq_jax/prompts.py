"""Stage 1: text -> a padded batch of tokens.

Lengths are rounded up to a few buckets, so that one compiled program serves every prompt of its
bucket.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from ttq_jax.errors import Error, shown
from ttq_jax.partition import put
from ttq_jax.types import Prompts

SMALLEST_BUCKET = 32


class PromptError(Error):
    """A prompt that cannot be used; the message says what to change."""


def token_ids(ids: np.ndarray | Array) -> np.ndarray:
    """Token ids as int32 in the host's memory, whichever integers came.

    Args:
      ids: from a user.

    Returns:
      The same numbers, to be moved to the device by `jax.device_put`: transfers are explicit, so
      that `jax.transfer_guard("disallow")` finds only mistakes.

    Raises:
      PromptError: not integers.
    """
    ids = np.asarray(jax.device_get(ids))
    if not np.issubdtype(ids.dtype, np.integer):
        raise PromptError(
            f"token ids: expected integers, got {ids.dtype}; pass what a tokenizer or cut_windows "
            "returned"
        )
    return ids.astype(np.int32)


def check_ids(ids: Any, vocab_size: int, tokenizer: Any, what: str) -> None:
    """Refuses ids that the model has no row for: XLA would silently read another one.

    Args:
      ids: token ids of any shape.
      vocab_size: of the model that reads them: rows of its embedding.
      tokenizer: its tokenizer, for the message; None if not at hand.
      what: whose ids they are, for the message.

    Raises:
      PromptError: an id without a row; the message names the token, if the tokenizer has one.
    """
    flat = np.asarray(ids).reshape(-1)
    wrong = flat[(flat < 0) | (flat >= vocab_size)]
    if not wrong.size:
        return
    i = int(wrong[0])
    token = None if tokenizer is None else tokenizer.token(i)
    if token is not None:
        raise PromptError(
            f"{what}: the model cannot read the token {shown(token)}, id {i}: its embedding has "
            f"{vocab_size} rows and none for it. Leave it out"
        )
    raise PromptError(
        f"{what}: expected token ids from 0 to {vocab_size - 1}, got {i}; cut the text with this "
        "model's tokenizer"
    )


def check_windows(windows: Any, vocab_size: int, tokenizer: Any = None) -> np.ndarray:
    """Windows of text, as int32[n, W] in the host's memory.

    Args:
      windows: from a user; see `cut_windows`.
      vocab_size: of the model that reads them.
      tokenizer: see `check_ids`.

    Returns:
      See `token_ids`.

    Raises:
      PromptError: not a matrix of token ids, or an id that the model does not have.
    """
    ids = token_ids(windows)
    if ids.ndim != 2:
        raise PromptError(
            f"windows: expected token ids of shape [windows, tokens], got {list(ids.shape)}; one "
            "window is window[None]"
        )
    check_ids(ids, vocab_size, tokenizer, "windows")
    return ids


def bucket(n: int, *, smallest: int = SMALLEST_BUCKET) -> int:
    """The padded length for n tokens: the next power of two, at least `smallest`.

    Args:
      n: tokens, >= 1.
      smallest: the shortest bucket.

    Returns:
      A length >= n.
    """
    return max(smallest, 1 << (n - 1).bit_length())


def pad_prompts(
    rows: Sequence[Sequence[int]],
    *,
    max_positions: int,
    max_new_tokens: int = 0,
    pad_id: int = 0,
    smallest: int = SMALLEST_BUCKET,
) -> Prompts:
    """Right-pads tokenized prompts to the bucket of the longest.

    Args:
      rows: token ids, one sequence per prompt.
      max_positions: the model's context, tokens.
      max_new_tokens: tokens of it to keep free for the answer.
      pad_id: any token id; it has no effect.
      smallest: the shortest bucket.

    Returns:
      The batch.

    Raises:
      PromptError: no prompt, an empty one, or one that does not fit the context.
    """
    if not rows:
        raise PromptError("expected at least one prompt, got none")
    for i, row in enumerate(rows):
        if not len(row):
            raise PromptError(
                f"prompt {i + 1} of {len(rows)} is empty: expected at least one token; "
                "give it some text"
            )
        if len(row) + max_new_tokens > max_positions:
            raise PromptError(
                f"prompt {i + 1} has {len(row)} tokens and asks for {max_new_tokens} more, but the "
                f"model's context is {max_positions} tokens; shorten the prompt or ask for fewer"
            )
    length = bucket(max(map(len, rows)), smallest=smallest)
    tokens = np.full((len(rows), length), pad_id, np.int32)
    valid = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        valid[i, : len(row)] = True
    return put(Prompts(tokens, valid), batch=True)

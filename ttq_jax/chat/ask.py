"""Stage 1 with roles: prompts, or messages through the chat template, as token ids."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ttq_jax.chat.render import Messages, Renderer
from ttq_jax.checkpoint import Model
from ttq_jax.checkpoint.chat_template import ChatTemplate
from ttq_jax.errors import expect, shown
from ttq_jax.prompts import PromptError

_PROMPTS = '["The sky is"]'
_MESSAGE = '{"role": "user", "content": "Hello"}'
# A conversation that shows how the template ends the assistant's turn.
_SAID = "So it is."
_PROBE = [{"role": "user", "content": "Yes?"}, {"role": "assistant", "content": _SAID}]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a model is to read.

    Attributes:
      texts: the prompts: as they came, or as the chat template made them.
      rows: their token ids.
      eos_ids: tokens that end an answer.
    """

    texts: list[str]
    rows: list[list[int]]
    eos_ids: tuple[int, ...]

    def part(self, start: int, stop: int) -> "Asked":
        """The prompts from `start` up to `stop`, which is left out."""
        return dataclasses.replace(self, texts=self.texts[start:stop], rows=self.rows[start:stop])


def check_messages(value: Any) -> Messages:
    """One conversation as a list of messages.

    Args:
      value: from a user: messages, or a text, which is one message of the user's.

    Returns:
      The messages.

    Raises:
      PromptError: it is something else, or ends with an answer.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    listed = list(value) if isinstance(value, Sequence) else []
    for one in listed:
        texts = isinstance(one, Mapping) and all(isinstance(v, str) for v in one.values())
        if not texts or set(one) != {"role", "content"}:
            raise PromptError(
                f"a message: expected a role and a content, both texts, as in {_MESSAGE}, got "
                f"{shown(one)}"
            )
    if not listed or listed[-1]["role"] == "assistant":
        last = shown(value) if not listed else "an assistant's message at the end"
        raise PromptError(
            f"a conversation: expected messages of which the last one is to be answered, got {last}"
        )
    return [dict(one) for one in listed]


def _listed(value: Any, chat: bool) -> list[Any]:
    """A list of prompts, or of conversations. A string would be taken letter by letter.

    Raises:
      PromptError: none, or no list.
    """
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if not listed or not (chat or all(isinstance(text, str) for text in listed)):
        what, example = ("conversations", f"[[{_MESSAGE}]]") if chat else ("prompts", _PROMPTS)
        raise PromptError(
            f"texts: expected a list of {what}, as in {example}, got {type(value).__name__} "
            f"{shown(value)}"
        )
    return listed


def _end_of_turn(model: Model, whole: str | PromptError) -> tuple[int, ...]:
    """The special token that the template writes after an assistant's message, if it is one."""
    if isinstance(whole, PromptError):
        return ()
    rest = whole.rpartition(_SAID)[2].strip()
    first = model.tokenizer.encode(rest, add_bos=False)[:1] if rest else []
    return tuple(i for i in first if model.tokenizer.is_special(i))


def template_of(model: Model) -> ChatTemplate:
    """The chat template of a model that is to have one.

    Args:
      model: for a chat.

    Returns:
      It.

    Raises:
      PromptError: there is none.
    """
    if model.chat is None:
        raise PromptError(
            f"{model.name}: has no chat template, so that its messages have no form: expected one "
            "in tokenizer_config.json, in chat_template.jinja or in the GGUF file. Leave out chat, "
            "or use an instruct model"
        )
    return model.chat


def ask(model: Model, texts: Any, *, chat: bool = False, render: Renderer | None = None) -> Asked:
    """Prompts as token ids.

    Args:
      model: its tokenizer and chat template are used.
      texts: a list of texts; with `chat`, each may be a list of messages too. What this function
        returned is returned again.
      chat: render the chat template. It writes the begin-of-text token itself, if it wants one.
      render: an open renderer, for callers that ask often.

    Returns:
      The prompts, and what ends their answers: with `chat` also the token that the template
      writes after an assistant's message.

    Raises:
      PromptError: no list of prompts, or messages that the template refuses.
    """
    expect("model", model, Model, "a model, from load()")
    if isinstance(texts, Asked):
        return texts
    tokenizer, listed = model.tokenizer, _listed(texts, chat)
    if not chat:
        return Asked(listed, [tokenizer.encode(text) for text in listed], model.eos_ids)
    template = template_of(model)
    jobs = [*((check_messages(one), True) for one in listed), (_PROBE, False)]
    with contextlib.nullcontext(render) if render else Renderer() as opened:
        *made, shape = opened(template, jobs)
    for one in made:
        if isinstance(one, PromptError):
            raise one
    rendered = [one for one in made if isinstance(one, str)]
    rows = [tokenizer.encode(text, add_bos=False) for text in rendered]
    ends = tuple(dict.fromkeys((*model.eos_ids, *_end_of_turn(model, shape))))
    return Asked(rendered, rows, ends)

"""A conversation that `ttq generate` or `ttq chat` goes on with: messages and moments."""

import dataclasses
from pathlib import Path

from ttq_jax.chat.render import Messages
from ttq_jax.checkpoint import Model
from ttq_jax.checkpoint.store import load_conversation, load_messages, save_conversation
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.progress import Progress
from ttq_jax.generation import Generation
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import Moments, Offline


def begin(messages: Messages, system: str | None) -> Messages:
    """Messages with the system's before them.

    Args:
      messages: of a conversation; may be none.
      system: its text; None for none.

    Returns:
      All messages.

    Raises:
      ConfigError: they begin with another text of the system's.
    """
    if system is None:
        return messages
    first = {"role": "system", "content": system}
    if messages and messages[0]["role"] == "system":
        if messages[0] != first:
            raise ConfigError(
                "--system: the conversation begins with another system message; leave out --system"
            )
        return messages
    return [first, *messages]


@dataclasses.dataclass
class Conversation:
    """A conversation.

    Attributes:
      model: with which it is held.
      place: the directory that keeps it; None for none.
      messages: so far, the last one an answer; [] for turns without roles.
      moments: of the turns so far, for a recipe with a decay.
    """

    model: Model
    place: Path | None = None
    messages: Messages = dataclasses.field(default_factory=list)
    moments: dict[str, Moments] = dataclasses.field(default_factory=dict)

    def load(self, recipe: Recipe | None, chat: bool, progress: Progress) -> None:
        """Takes up what the directory keeps, if there is one.

        Args:
          recipe: of the next turn.
          chat: whether the turns are messages.
          progress: gets a note if something kept is not used.

        Raises:
          ConfigError: it keeps messages, but the next turn is none.
        """
        if self.place is None or not self.place.exists():
            return
        self.messages = load_messages(self.place, self.model)
        if self.messages and not chat:
            raise ConfigError(
                f"--conversation: {self.place} keeps messages; add --chat, or choose another "
                "directory"
            )
        if recipe is not None and recipe.source.decay:
            self.moments = load_conversation(self.place, self.model, recipe)
        elif chat:
            progress.note("moments of earlier turns are not used: the recipe's decay is 0")

    def turn(self, text: str, system: str | None) -> Messages:
        """All messages, with a question of the user's as the last one."""
        return [*begin(self.messages, system), {"role": "user", "content": text}]

    def offline(self, offline: Offline) -> Offline:
        """What was prepared, with the moments of the earlier turns."""
        return dataclasses.replace(offline, carried=self.moments) if self.moments else offline

    def add(self, recipe: Recipe | None, made: Generation, messages: Messages) -> None:
        """Adds a turn and saves it.

        Args:
          recipe: of this turn.
          made: its answer.
          messages: from `turn`; none for a turn without roles.
        """
        self.moments = made.moments
        if messages:
            self.messages = [*messages, {"role": "assistant", "content": made.texts[0]}]
        if self.place is not None:
            save_conversation(self.place, self.model, recipe, self.moments, self.messages)

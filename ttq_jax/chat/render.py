"""Renders chat templates by transformers, in a process that a bad template may take down."""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ttq_jax.chat import worker
from ttq_jax.checkpoint.chat_template import ChatTemplate
from ttq_jax.foreign import why
from ttq_jax.prompts import PromptError

Messages = list[dict[str, str]]


class Renderer:
    """Renders while it is open; the process starts at its first call."""

    def __init__(self):
        """Starts nothing yet."""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _answer(self, line: str) -> str:
        """The process's answer, "" if it is dead."""
        if self._process is None:
            # -P: no module of the working directory or beside the file is imported by it. A group
            # of its own: a terminal's Ctrl-C is not for it.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(worker.__file__))], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
                text=True, encoding="utf-8",
            )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        # The process ends itself when it computes for too long, not when it waits for ever.
        patience = threading.Timer(worker.PATIENCE, self._process.kill)
        patience.start()
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except BrokenPipeError:
            return ""
        finally:
            patience.cancel()

    def _ended(self) -> str:
        """Why the process is dead."""
        assert self._process is not None
        code = self._process.wait()
        self.__exit__(None, None, None)
        if code > 0:
            return "transformers cannot be used; install ttq-jax again, with its dependencies"
        return (
            f"it takes more than {worker.SECONDS} seconds of computing, too much memory, or more "
            f"than {worker.PATIENCE} seconds. Use the template of the model's authors, or leave "
            "out chat"
        )

    def __call__(
        self, template: ChatTemplate, conversations: Sequence[tuple[Messages, bool]]
    ) -> list[str | PromptError]:
        """Renders conversations.

        Args:
          template: of the model.
          conversations: messages, and whether the assistant's answer is to follow.

        Returns:
          Per conversation its text, or what the template has against it.

        Raises:
          PromptError: the template takes too long, or too much memory.
        """
        asked = {
            "template": template.text, "tokens": dict(template.tokens),
            "conversations": [list(one) for one in conversations],
        }  # fmt: skip
        answer = self._answer(json.dumps(asked))
        if not answer.endswith("\n"):
            raise PromptError(f"the model's chat template could not be rendered: {self._ended()}")
        return [
            one["text"]
            if "text" in one
            else PromptError(f"the model's chat template refuses the messages: {_said(one)}")
            for one in json.loads(answer)
        ]


def _said(one: dict[str, str]) -> str:
    """A template's complaint, on one line, without what would steer a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in why(ValueError(one["error"])))

"""`ttq chat`: a session at the terminal, or a script of lines on standard input.

The model is loaded once, and a program is compiled once for each length bucket of the conversation.
Lines are edited by GNU readline, which Python brings and every shell user knows; its history lasts
as long as the session, so that no question is left on the disk.
"""

import argparse
import contextlib
import dataclasses
import itertools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ttq_jax import speculation
from ttq_jax.chat.ask import ask, template_of
from ttq_jax.chat.render import Renderer
from ttq_jax.checkpoint import Model
from ttq_jax.checkpoint.store import check_destination
from ttq_jax.commands.conversation import Conversation, begin
from ttq_jax.commands.interrupts import interruptible, tell
from ttq_jax.commands.options import needs_of, note_unused, recipe_of
from ttq_jax.commands.output import print_piece, print_text
from ttq_jax.config import ConfigError
from ttq_jax.errors import Error, shown
from ttq_jax.evaluation.describe import describe_method
from ttq_jax.evaluation.preparation import calibration_text, load_model, prepare_offline
from ttq_jax.evaluation.progress import Progress, clock
from ttq_jax.generation import Generation
from ttq_jax.partition import on
from ttq_jax.prefill import check_chunk
from ttq_jax.prompts import PromptError, bucket
from ttq_jax.quant.names import misnamed
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.recipe_text import recipe_named
from ttq_jax.quant.tree import check_selection
from ttq_jax.sampling import Sampling
from ttq_jax.stream import Stream, stream
from ttq_jax.types import Offline

# The shortest bucket: the first turns of a conversation are served by one program.
_ROOM = 256

_HELP = """\
/recipe NAME  answer with another recipe from now on, such as best, or with a FILE.toml
/stats        show the sizes and times of the last answer
/reset        forget the conversation
/help         show this
/quit         end the session, as Ctrl-D does
Ctrl-C stops an answer. A message that begins with a slash is written with a space before it."""


@dataclasses.dataclass
class _Answer:
    """What /stats tells of an answer."""

    made: Generation
    first_token: float
    compiled: bool

    def lines(self) -> list[str]:
        """For people."""
        new, after = len(self.made.tokens[0]), self.made.seconds - self.first_token
        said = f"first token after {clock(self.first_token)}"
        if self.compiled:
            said += f", all of them after {clock(self.made.seconds)}, compiling included"
        elif new > 1:
            said += f", then {(new - 1) / after:.3g} tokens/s (one run)"
        return [
            f"{self.made.prompt_tokens[0]} tokens read, {new} new; stopped by: "
            f"{self.made.stopped[0]}",
            said,
            *(drafts.in_words() for drafts in self.made.drafts),
            *([self.made.draft_costs.in_words()] if self.made.draft_costs else []),
        ]


class _Session:
    """The state of a session, and what its commands do."""

    def __init__(
        self, args: argparse.Namespace, progress: Progress, recipe: Recipe | None, model: Model,
        offline: Offline, render: Renderer,
    ):  # fmt: skip
        self.args, self.progress, self.model, self.render = args, progress, model, render
        self.method, self.recipe, self.offline = args.method, recipe, offline
        place = Path(args.conversation).expanduser() if args.conversation else None
        self.talk = Conversation(model, place)
        self.last: _Answer | None = None
        self.seen: set[tuple[Recipe | None, int]] = set()
        self.how: dict[str, Any] = {
            "max_new_tokens": args.max_new_tokens, "seed": args.seed or 0,
            "sampling": sampling_of(args), "speculate": args.speculate,
            "prefill_chunk": args.prefill_chunk, "cache_dtype": args.cache_dtype,
        }  # fmt: skip

    def line(self, text: str) -> bool:
        """Does what a line says; returns whether the session goes on.

        Raises:
          PromptError: an unknown command.
        """
        if not text.startswith("/"):
            self.answer(text.removeprefix(" ") if text.startswith(" /") else text)
            return True
        name, _, rest = text[1:].strip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "recipe": self.change, "stats": self.stats, "reset": self.reset,
            "help": lambda _: print_text(_HELP),
        }  # fmt: skip
        if name == "quit":
            return False
        if name not in commands:
            raise PromptError(f"/{shown(name)[1:-1]}: no such command; /help lists them")
        commands[name](rest.strip())
        return True

    def answer(self, text: str) -> None:
        """Answers a message while it is decoded.

        Raises:
          PromptError: the context is full.
        """
        messages = self.talk.turn(text, self.args.system)
        halt = threading.Event()

        def stop() -> None:
            halt.set()
            self.progress.note("stopping; Ctrl-C again ends the session")

        made, compiles = interruptible(lambda: self._decode(messages, halt), stop)
        self.last = _Answer(made.generation, made.first_token, compiles)
        self.talk.add(self.recipe, self.last.made, messages)

    def _decode(self, messages: Any, halt: threading.Event) -> tuple[Stream, bool]:
        """Prints an answer piece by piece, until its end or until it is told to stop.

        Raises:
          PromptError: the context is full.
        """
        asked = ask(self.model, [messages], chat=True, render=self.render)
        length, context = len(asked.rows[0]), self.model.config.max_positions
        if length + self.args.max_new_tokens > context:
            raise PromptError(
                f"the conversation is full: it has {length} tokens with this message, an answer "
                f"may take {self.args.max_new_tokens}, and the model's context is {context}; "
                "/reset begins a new one, and --max-new-tokens asks for shorter answers"
            )
        program = self.recipe, bucket(length, smallest=_ROOM)
        compiles = program not in self.seen
        show = (
            self.progress.stage("compiling and reading") if compiles else contextlib.nullcontext()
        )
        with show:
            made = stream(
                self.model, asked, recipe=self.recipe, offline=self.talk.offline(self.offline),
                smallest=_ROOM, **self.how,
            )  # fmt: skip
            # The second piece comes from the other of the two programs.
            first = list(itertools.islice(made, 1 + compiles))
        self.seen.add(program)
        for piece in itertools.chain(first, made):
            print_piece(piece)
            if halt.is_set():
                break
        print_piece("\n")
        return made, compiles

    def change(self, name: str) -> None:
        """/recipe.

        Raises:
          ConfigError: no such recipe, or one that cannot be used here.
        """
        if not name or (wrong := misnamed(name)):
            raise ConfigError(
                f"/recipe: {wrong if name else 'expected a name, as in /recipe best'}"
            )
        recipe = recipe_named(name, {}, [])
        speculation.check(self.args.speculate, recipe)
        check_chunk(self.args.prefill_chunk, recipe)
        with on(self.model.mesh):
            check_selection(self.model.params, recipe)
        needs = dataclasses.replace(needs_of(self.args, recipe), method=name)
        text = calibration_text(needs, self.progress)
        self.offline, _ = interruptible(
            lambda: prepare_offline(needs, self.model, text, self.progress)
        )
        self.method, self.recipe = name, recipe
        if self.talk.moments:
            self.talk.moments = {}
            self.progress.note("the moments of earlier turns are forgotten; the messages are kept")

    def stats(self, _: str) -> None:
        """/stats."""
        if self.last is None:
            print_text("nothing was answered yet")
            return
        made = self.last.made
        bits = made.effective_bits, made.model_bits, made.bytes_per_token
        context = self.model.config.max_positions
        used = self.last.made.prompt_tokens[0] + len(self.last.made.tokens[0])
        for line in (
            describe_method(self.method, self.recipe, *bits),
            f"{len(self.talk.messages)} messages, {used} of {context} tokens",
            *self.last.lines(),
        ):
            print_text(line)

    def reset(self, _: str) -> None:
        """/reset."""
        self.talk.messages, self.talk.moments, self.last = [], {}, None
        self.progress.note("a new conversation begins")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """How tokens are chosen.

    Args:
      args: with the sampling options.

    Returns:
      The sampling.
    """
    return Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)


def _read(prompt: str) -> str | None:
    """The next line; None at the end.

    Raises:
      PromptError: it is not UTF-8.
    """
    try:
        return input(prompt)
    except EOFError:
        return None
    except UnicodeDecodeError as e:
        raise PromptError("standard input: expected UTF-8 text; convert it") from e


def _talk(session: _Session) -> None:
    """Reads and answers lines to the end.

    Raises:
      Error: a line of a script cannot be done; at a terminal the next one may be.
      KeyboardInterrupt: Ctrl-C while a script has no line to be done.
    """
    alone = not (sys.stdin.isatty() and sys.stdout.isatty())
    if not alone:
        with contextlib.suppress(ImportError):  # some Pythons are built without it
            import readline  # noqa: F401
        session.progress.note("/help lists the commands; Ctrl-D ends the session")
    while True:
        try:
            text = _read("" if alone else "> ")
            if text is None:
                break
            if text.strip() and not session.line(text):
                return
        except KeyboardInterrupt:
            if alone:
                raise
            print_piece("\n")
            session.progress.note("/quit or Ctrl-D ends the session")
        except Error as e:
            if alone:
                raise
            tell(f"ttq: {' '.join(str(e).split())}")
    if not alone:
        print_piece("\n")


def run(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq chat`.

    Args:
      args: its options.
      progress: where to show it.

    Raises:
      ConfigError: an option out of range.
      PromptError: the model has no chat template, or standard input is closed.
    """
    if args.max_new_tokens < 1:
        raise ConfigError(f"expected --max-new-tokens of at least 1, got {args.max_new_tokens}")
    if sys.stdin is None:
        raise PromptError("standard input: expected messages, but it is closed")
    recipe = recipe_of(args)
    sampling_of(args)
    speculation.check(args.speculate, recipe)
    check_chunk(args.prefill_chunk, recipe)
    note_unused(args, recipe, progress)
    if args.conversation:
        check_destination(Path(args.conversation).expanduser())
    needs = needs_of(args, recipe)
    text = calibration_text(needs, progress)

    def load() -> tuple[Model, Offline]:
        model, _ = load_model(
            args.model, args.dtype, progress, args.ignore_key,
            mesh=args.mesh, dense_memory=args.dense_memory,
        )  # fmt: skip
        template_of(model)
        with on(model.mesh):
            check_selection(model.params, recipe)
        return model, prepare_offline(needs, model, text, progress)[0]

    model, offline = interruptible(load)
    with Renderer() as render:
        session = _Session(args, progress, recipe, model, offline, render)
        session.talk.load(recipe, True, progress)
        begin(session.talk.messages, args.system)
        if session.talk.messages:
            progress.note(f"{len(session.talk.messages)} messages were said before")
        _talk(session)

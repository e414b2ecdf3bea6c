"""The command line: exit codes, and how a command ends.

The options are in `parsers`; each command is the `run` of the file of its name. jax is imported
only after the options are read.

Exit codes: 0; 1 for a mistake in this package; 2 for input or surroundings that cannot be used (one
line on stderr says why and what to change); 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP;
141 when the reader of stdout is gone. No exception leaves `main`: `--debug` shows its trace.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from ttq_jax.commands.failures import UNUSABLE, explain
from ttq_jax.commands.interrupts import Stopped, interruptible, tell, tell_stopped
from ttq_jax.commands.output import write


def _run(args: argparse.Namespace) -> None:
    """Runs one command."""
    from ttq_jax.commands.compiled import cache_directory, keep_compiled_programs
    from ttq_jax.commands.platform import choose_platform
    from ttq_jax.commands.processes import begin_together, join
    from ttq_jax.evaluation.progress import Progress

    processes = getattr(args, "processes", None)
    join(processes, getattr(args, "mesh", None))
    choose_platform()
    if processes:
        begin_together(args)
    progress = Progress(enabled=not args.quiet)
    if not args.no_compilation_cache:
        keep_compiled_programs(cache_directory(args.cache_dir), progress)
    importlib.import_module(f"ttq_jax.commands.{args.command}").run(args, progress)


def _part(code: int) -> None:
    """Lets a failed command of several processes end."""
    if "jax" in sys.modules:
        from ttq_jax.commands.processes import end_failed

        end_failed(code)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end a command as Ctrl-C does, unless the caller handles them."""

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    main_thread = threading.current_thread() is threading.main_thread()
    # nohup has SIGHUP ignored.
    changed = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if main_thread and signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in changed:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _open_streams() -> None:
    """Gives 0, 1 and 2 to the null device where they are closed.

    Else the next file that is opened gets such a number, and libraries write their messages there.

    Raises:
      OSError: stdout is closed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        raise OSError("standard output: it is closed; redirect it to a file or to /dev/null")


def _flushed(stream: object) -> None:
    """Flushes stdout or stderr; what it refuses is dropped, as Python tries again when it exits."""
    try:
        stream.flush()  # type: ignore[attr-defined]
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]


def _command(words: Sequence[str]) -> int:
    """Reads the arguments and runs the command; returns the exit code.

    Raises:
      OSError: an argument is not UTF-8, or a result cannot be written.
    """
    _open_streams()
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as e:
            raise OSError(f"expected arguments in UTF-8, got {word!a}") from e
    try:
        if words[:1] == ["lm-eval"]:
            # lm_eval has a parser of its own, and runs in the main thread.
            from ttq_jax.commands import lm_eval

            lm_eval.run([word for word in words[1:] if word != "--debug"])
        else:
            from ttq_jax.commands.parsers import build_parser

            args = build_parser().parse_args(words)
            # A chat reads lines in the main thread, and runs only what takes long in another one.
            _run(args) if args.command == "chat" else interruptible(lambda: _run(args))
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else UNUSABLE if e.code else 0
        if isinstance(e.code, str):
            tell(e.code)
    write("")  # what others printed
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments without the program's name; None takes the process's.

    Returns:
      The exit code; see the module's docstring.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        with _signals():
            return _command(words)
    except (KeyboardInterrupt, Stopped) as e:
        code = tell_stopped(e)
        _part(code)
        return code
    except BrokenPipeError:
        return 141
    except BaseException as e:
        if "--debug" in words:
            with contextlib.suppress(OSError, ValueError):
                traceback.print_exception(e)
        code, text = explain(e)
        tell(f"ttq: error: {text}")
        _part(code)
        return code
    finally:
        _flushed(sys.stdout)
        _flushed(sys.stderr)

"""The command line: exit codes, and how a command ends.

The options are in `parsers`; each command is the `run` of the file of its name. jax is imported
only after the options are read.

Exit codes: 0; 2 for input that cannot be used (one line on stderr says why and what to change);
130 after Ctrl-C; 141 when the reader of stdout is gone.
"""

import argparse
import importlib
import os
import sys
import threading
from collections.abc import Sequence

from ttq_jax.commands.parsers import build_parser


class BadInput(Exception):
    """Input that cannot be used; its message is all that the user sees."""


def _run(args: argparse.Namespace) -> None:
    """Runs one command.

    Raises:
      BadInput: input that cannot be used.
    """
    from ttq_jax.commands.compiled import cache_directory, keep_compiled_programs
    from ttq_jax.errors import Error
    from ttq_jax.evaluation.progress import Progress

    progress = Progress(enabled=not args.quiet)
    if not args.no_compilation_cache:
        keep_compiled_programs(cache_directory(args.cache_dir), progress)
    try:
        importlib.import_module(f"ttq_jax.commands.{args.command}").run(args, progress)
    except Error as e:
        raise BadInput(str(e)) from e


def _interruptible(args: argparse.Namespace) -> None:
    """Runs the command in another thread: only the main thread can receive Ctrl-C.

    Compiling and decoding are single calls into XLA, which would delay it for many seconds.

    Raises:
      KeyboardInterrupt: Ctrl-C, when the command had just ended.
    """
    failure: list[BaseException] = []
    # Not Thread.join: interrupted, it forgets that the thread still runs (bpo-45274).
    ended = threading.Event()

    def work() -> None:
        try:
            _run(args)
        except BaseException as e:
            failure.append(e)
        finally:
            ended.set()

    threading.Thread(target=work, daemon=True).start()
    try:
        ended.wait()
    except KeyboardInterrupt:
        print("\nttq: interrupted", file=sys.stderr, flush=True)
        # XLA cannot be asked to stop, and a normal exit would wait for it or crash in it.
        if not ended.is_set():
            os._exit(130)
        raise
    if failure:
        raise failure[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments without the program's name; None takes the process's.

    Returns:
      The exit code; see the module's docstring.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["lm-eval"]:
        # lm_eval has a parser of its own, and runs in the main thread.
        from ttq_jax.commands import lm_eval

        return lm_eval.run(words[1:])
    try:
        args = build_parser().parse_args(words)
    except SystemExit as e:
        return int(e.code or 0)
    try:
        _interruptible(args)
        sys.stdout.flush()
    except BadInput as e:
        print(f"ttq: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it something that accepts.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0

"""The command line: exit codes, and how a command ends.

What can be said is in `parsers`; what the commands do is in `commands` (generate, perplexity),
`prepare_command`, `allocate_command`, `recipes_command`, `inspection`, `kernel_list`,
`bench_command` and `demo`. Nothing here imports jax before the options are understood.

Exit codes: 0; 2 for input that cannot be used (one line on stderr says why and what to change);
130 after Ctrl-C; 141 when the reader of stdout is gone.
"""

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from ttq_jax.commands.parsers import build_parser


class BadInput(Exception):
    """Input that cannot be used; its text is all that the user sees."""


def cache_directory(chosen: str | None) -> Path:
    """Where compiled programs are kept.

    Args:
      chosen: by an option, or None.

    Returns:
      The directory, which need not exist yet.
    """
    if chosen:
        return Path(chosen).expanduser()
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ttq_jax" / "xla"


def _run(args: argparse.Namespace) -> None:

    commands.run(args, None if args.no_compilation_cache else cache_directory(args.cache_dir))


def _interruptible(args: argparse.Namespace) -> None:
    """Runs the command beside the main thread, which alone can receive Ctrl-C.

    Compiling and decoding are single calls into XLA that would hold it back for many seconds.

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
    try:
        args = build_parser().parse_args(argv)
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

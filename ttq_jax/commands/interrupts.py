"""Ctrl-C and the other signals that end a command, while XLA computes."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from ttq_jax.files import abandon


class Stopped(BaseException):
    """A signal that ends the process; its number is the argument."""


def tell(text: str) -> None:
    """Prints a line on stderr, if there is one that takes it.

    Args:
      text: without its line end.
    """
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def tell_stopped(e: KeyboardInterrupt | Stopped) -> int:
    """Says that a signal ended the command.

    Args:
      e: what it raised.

    Returns:
      The exit code.
    """
    number = signal.SIGINT if isinstance(e, KeyboardInterrupt) else signal.Signals(e.args[0])
    tell("\nttq: interrupted" if number == signal.SIGINT else f"\nttq: ended by {number.name}")
    return 128 + number


def interruptible(work: Callable[[], Any], stop: Callable[[], None] | None = None) -> Any:
    """Runs work in another thread: only the main thread can receive Ctrl-C.

    Compiling and decoding are single calls into XLA, which would delay it for many seconds.

    Args:
      work: to do.
      stop: called at the first Ctrl-C, to ask the work to end soon. Without it, and at the second
        one, the process ends.

    Returns:
      What the work returns.

    Raises:
      KeyboardInterrupt: Ctrl-C, when the work had just ended.
      Stopped: another signal, likewise.
    """
    out: list[Any] = []
    failure: list[BaseException] = []
    # Not Thread.join: interrupted, it forgets that the thread still runs (bpo-45274).
    ended = threading.Event()

    def run() -> None:
        try:
            out.append(work())
        except BaseException as e:
            failure.append(e)
        finally:
            ended.set()

    threading.Thread(target=run, daemon=True).start()
    asked = False
    while True:
        try:
            if asked and stop is not None:
                # Forgotten first: a second Ctrl-C may come while it speaks.
                ask, stop = stop, None
                ask()
            ended.wait()
            break
        except (KeyboardInterrupt, Stopped) as e:
            if isinstance(e, KeyboardInterrupt) and stop is not None:
                asked = True
                continue
            if ended.is_set():
                raise
            # A second Ctrl-C would stop the tidying up.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            code = tell_stopped(e)
            abandon()
            # XLA cannot be asked to stop, and a normal exit would wait for it or crash in it.
            os._exit(code)
    if failure:
        raise failure[0]
    return out[0]

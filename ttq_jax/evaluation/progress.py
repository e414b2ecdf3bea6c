"""The progress of a command and the time left, on stderr.

On a terminal one line is redrawn; in a log file a stage gets a line when it begins, when it ends,
and every ten seconds in between.
"""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator

_REDRAW = 0.25
_LOG_EVERY = 10.0


def clock(seconds: float) -> str:
    """A duration for people: "3.2 s" or "4:05"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _write(text: str) -> None:
    """Writes to stderr; one that is closed or full does not stop the work."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end="", file=sys.stderr, flush=True)


class _Stage:
    """How far one stage is."""

    def __init__(self, text: str):
        self.text = text
        self.start = time.perf_counter()
        self.first: tuple[float, float] | None = None
        self.done, self.total, self.note = 0.0, 0.0, ""

    def update(self, done: float, total: float, note: str = "") -> None:
        self.done, self.total, self.note = done, total, note
        if self.first is None:
            self.first = done, time.perf_counter()

    def left(self) -> str:
        """The time left, at the pace since the first report; before that it compiled."""
        if self.first is None or self.done <= self.first[0]:
            return ""
        pace = (time.perf_counter() - self.first[1]) / (self.done - self.first[0])
        return f", {clock(pace * (self.total - self.done))} left"

    def line(self) -> str:
        elapsed = clock(time.perf_counter() - self.start)
        # All that is counted is done, but the stage goes on: the time left is unknown.
        if not 0 < self.done < self.total:
            return f"{self.text} … {elapsed}"
        share = f"{100 * self.done / self.total:.0f} %"
        note = f", {self.note}" if self.note else ""
        return f"{self.text} … {share}{note}, {elapsed}{self.left()}"


class Progress:
    """Progress lines of one command.

    Attributes:
      enabled: False prints nothing.
    """

    def __init__(self, *, enabled: bool = True):
        self.enabled = enabled
        self._lock = threading.Lock()
        self._width = 0

    @property
    def redraws(self) -> bool:
        """Whether stderr is a terminal, so that a line can be redrawn."""
        return self.enabled and sys.stderr.isatty()

    def note(self, text: str) -> None:
        """Prints one line of its own.

        Args:
          text: without a line end.
        """
        if self.enabled:
            with self._lock:
                _write(f"{self._clear()}ttq: {text}\n")

    def clear(self) -> None:
        """Removes the line being redrawn, so that something else can be printed."""
        with self._lock:
            _write(self._clear())

    def _clear(self) -> str:
        blank, self._width = " " * self._width, 0
        return f"\r{blank}\r" if blank else ""

    def _draw(self, line: str) -> None:
        # A line that wraps could not be redrawn.
        line = line[: shutil.get_terminal_size().columns - 1]
        with self._lock:
            padded = line.ljust(self._width)
            self._width = len(line)
            _write(f"\r{padded}")

    @contextlib.contextmanager
    def stage(self, text: str) -> Iterator[Callable[..., None]]:
        """Shows a long step and the time it takes.

        Args:
          text: what is done, as in "loading smollm2".

        Yields:
          update(done, total, note=""): for a stage that knows how far it is.
        """
        stage, finished = _Stage(text), threading.Event()

        def tick() -> None:
            while not finished.wait(_REDRAW if self.redraws else _LOG_EVERY):
                if self.redraws:
                    self._draw(f"ttq: {stage.line()}")
                else:
                    self.note(stage.line())

        ticker = threading.Thread(target=tick, daemon=True)
        if self.redraws:
            self._draw(f"ttq: {text} …")
        else:
            self.note(f"{text} …")
        if self.enabled:
            ticker.start()
        try:
            yield stage.update
        except BaseException:
            self._stop(ticker, finished)
            self.clear()
            raise
        self._stop(ticker, finished)
        took = clock(time.perf_counter() - stage.start)
        self.note(f"{text}: {took}{', ' + stage.note if stage.note else ''}")

    def _stop(self, ticker: threading.Thread, finished: threading.Event) -> None:
        finished.set()
        if self.enabled:
            ticker.join()

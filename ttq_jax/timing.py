"""How long jax spent compiling, as jax itself reports it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax


class CompileTime:
    """Sum of jax's compilation events.

    Attributes:
      seconds: tracing, lowering and compiling (or reading the compilation cache) so far; 0 if
        every program was there already.
    """

    def __init__(self):
        self.seconds = 0.0

    def __call__(self, event: str, duration_secs: float, **_: Any) -> None:
        """Takes an event from `jax.monitoring`."""
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs


@contextmanager
def compile_time() -> Iterator[CompileTime]:
    """Counts compilation inside the block.

    Yields:
      The counter, final when the block ends.
    """
    counter = CompileTime()
    jax.monitoring.register_event_duration_secs_listener(counter)
    try:
        yield counter
    finally:
        jax.monitoring.unregister_event_duration_listener(counter)

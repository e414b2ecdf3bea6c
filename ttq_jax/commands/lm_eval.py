"""`ttq lm-eval`: EleutherAI's own command line, with "ttq" among its models."""

import logging
import sys
from collections.abc import Sequence

from ttq_jax.commands.compiled import cache_directory, keep_compiled_programs
from ttq_jax.commands.platform import choose_platform
from ttq_jax.evaluation.harness import model_class
from ttq_jax.evaluation.progress import Progress


class _Unsaved(logging.Handler):
    """Keeps the errors of results that lm_eval could not write: it only warns of them."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.errors: list[BaseException | None] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("Could not save"):
            self.errors.append(sys.exc_info()[1])


def run(words: Sequence[str]) -> None:
    """Runs lm_eval's command line.

    Args:
      words: its arguments.

    Raises:
      OSError: its results are printed, but could not be written.
    """
    choose_platform()
    model_class()
    from lm_eval.__main__ import cli_evaluate

    keep_compiled_programs(cache_directory(None), Progress())
    sys.argv = ["ttq lm-eval", *words]  # lm_eval reads no other arguments
    tracker, unsaved = logging.getLogger("lm_eval.loggers.evaluation_tracker"), _Unsaved()
    tracker.addHandler(unsaved)
    try:
        cli_evaluate()
    finally:
        tracker.removeHandler(unsaved)
    for e in unsaved.errors:
        raise OSError(f"lm_eval could not save its results: {e}") from e

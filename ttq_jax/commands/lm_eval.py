"""`ttq lm-eval`: EleutherAI's own command line, with "ttq" among its models."""

import logging
import sys
import traceback
from collections.abc import Sequence

from ttq_jax.commands.compiled import cache_directory, keep_compiled_programs
from ttq_jax.commands.platform import choose_platform
from ttq_jax.config import ConfigError
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


def _raised_within_lm_eval(e: Exception) -> bool:
    """Whether lm_eval itself raised it, as for a task that it does not know."""
    *_, (frame, _) = traceback.walk_tb(e.__traceback__)
    return frame.f_globals.get("__name__", "").split(".")[0] == "lm_eval"


def run(words: Sequence[str]) -> None:
    """Runs lm_eval's command line.

    Args:
      words: its arguments.

    Raises:
      ConfigError: lm_eval cannot use its arguments.
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
    except Exception as e:
        if _raised_within_lm_eval(e):
            raise ConfigError(f"lm_eval: {type(e).__name__}: {e}") from e
        raise
    finally:
        tracker.removeHandler(unsaved)
    for cause in unsaved.errors:
        raise OSError(f"lm_eval could not save its results: {cause}") from cause

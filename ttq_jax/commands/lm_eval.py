"""`ttq lm-eval`: EleutherAI's own command line, with "ttq" among its models."""

import sys
from collections.abc import Sequence

from ttq_jax.checkpoint import CheckpointError
from ttq_jax.commands.compiled import cache_directory, keep_compiled_programs
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.corpora import CorpusError
from ttq_jax.evaluation.harness import MissingExtra, model_class
from ttq_jax.evaluation.progress import Progress
from ttq_jax.prompts import PromptError


def run(words: Sequence[str]) -> int:
    """Runs lm_eval's command line.

    Args:
      words: its arguments.

    Returns:
      The exit code: 0; 2 for input that cannot be used, with one line that says why; 130 after
      Ctrl-C.
    """
    try:
        model_class()
        from lm_eval.__main__ import cli_evaluate

        keep_compiled_programs(cache_directory(None), Progress())
        sys.argv = ["ttq lm-eval", *words]  # lm_eval reads no other arguments
        cli_evaluate()
    except (MissingExtra, ConfigError, PromptError, CheckpointError, CorpusError) as e:
        print(f"ttq: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

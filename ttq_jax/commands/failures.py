"""What went wrong, in one line: the input, the machine, or a mistake of ours."""

import sys

from ttq_jax.errors import Error

UNUSABLE, MISTAKE = 2, 1
"""Exit codes: of input or surroundings that cannot be used; of a mistake in this package."""

_SMALLER = "use a smaller model, window or batch, or --dtype bfloat16"


def _is_ours(e: BaseException) -> bool:
    """Whether this package raised it on purpose; what was not imported was not raised."""
    harness = sys.modules.get("ttq_jax.evaluation.harness")
    return isinstance(e, Error) or (harness is not None and isinstance(e, harness.MissingExtra))


def _of_jax(e: BaseException) -> str:
    """What an error of jax's means that comes from the machine; "" for any other."""
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(e, RuntimeError | AssertionError):
        return ""
    if isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(e):
        return f"the device is out of memory ({str(e).splitlines()[0]}); {_SMALLER}"
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as none:
        asked = jax.config.jax_platforms
        return f"jax finds no device of JAX_PLATFORMS={asked}; set another, or unset it ({none})"
    return ""


def explain(e: BaseException) -> tuple[int, str]:
    """The exit code of an exception, and what to tell.

    Args:
      e: what ended a command.

    Returns:
      (Exit code, one line).
    """
    code = UNUSABLE
    if _is_ours(e):
        text = str(e)
    elif isinstance(e, OSError):
        why = e.strerror or str(e) or type(e).__name__
        text = f"{e.filename}: {why}" if e.filename else why
    elif isinstance(e, MemoryError):
        text = f"out of memory{f' ({e})' if str(e) else ''}; {_SMALLER}"
    elif isinstance(e, RecursionError):
        text = f"something is nested too deeply to be read ({e}); --debug shows what"
    elif isinstance(e, ImportError):
        text = f"the installation is incomplete ({e}); install ttq-jax again, with its dependencies"
    elif not (text := _of_jax(e)):
        code = MISTAKE
        text = (
            f"{type(e).__name__}: {e}; this is a mistake in ttq-jax: please report it, with what "
            "the same command shows with --debug"
        )
    return code, " ".join(text.split())

"""The recipes' names, for whoever must know them before jax is imported."""

import difflib

METHODS = ("none", "rtn", "hqq", "awq", "gptq", "paper", "ttq", "fast", "best")
DEFAULT = "fast"


def misnamed(name: str) -> str:
    """What is wrong with a recipe's name.

    Args:
      name: of a preset, or of a file.

    Returns:
      What was expected, "" if nothing is wrong.
    """
    if name in METHODS or name.endswith(".toml"):
        return ""
    close = difflib.get_close_matches(name, METHODS, 1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"expected one of {', '.join(METHODS)}, or a FILE.toml, got {name!r}{meant}"

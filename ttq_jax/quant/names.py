"""Names of recipes and of their choices, and messages; imports no jax, so that it loads at once."""

import difflib

from ttq_jax.errors import shown

METHODS = ("none", "rtn", "hqq", "awq", "gptq", "paper", "ttq", "fast", "best")
DEFAULT = "fast"
PREFILLS = ("full", "quantized", "both")


def misnamed(name: str) -> str:
    """The error message for a recipe's name.

    Args:
      name: of a preset, or of a file.

    Returns:
      What was expected and what came; "" if the name is valid.
    """
    if name in METHODS or name.endswith(".toml"):
        return ""
    close = difflib.get_close_matches(name, METHODS, 1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"expected one of {', '.join(METHODS)}, or a FILE.toml, got {shown(name)}{meant}"


def quantizes_nothing(name: str, so: str) -> str:
    """The error message for a use that needs a recipe which quantizes.

    Args:
      name: of the recipe, which does not.
      so: what follows, as in "it uses no kernel".

    Returns:
      One line.
    """
    return f"recipe {name} quantizes nothing, so {so}; choose another recipe"


def lacks_corpus(recipe: str, give: str) -> str:
    """The error message for a recipe that needs a calibration corpus and got none.

    Args:
      recipe: what to call it, as in "recipe awq".
      give: how to give a corpus, as in "pass --calibration FILE".

    Returns:
      One line.
    """
    return (
        f"{recipe} needs a calibration corpus, but none was given; {give}, or choose a recipe that "
        "needs none, such as ttq"
    )

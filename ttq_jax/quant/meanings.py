"""What each setting of a recipe means, taken from the docstring that defines it."""

import dataclasses
import inspect
import re
import textwrap

from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.widths import Width

_ENTRY = re.compile(r"^  (\w+): (.*(?:\n    .*)*)", re.MULTILINE)
_TABLE = re.compile(r"\[+(\w+)\]+")


def meanings(rule: type) -> dict[str, str]:
    """The attributes that a class's docstring explains.

    Args:
      rule: a dataclass with a section "Attributes:".

    Returns:
      Meaning by name, in one line each; {} if Python runs without docstrings.
    """
    _, _, section = (inspect.getdoc(rule) or "").partition("Attributes:\n")
    section = section.partition("\n\n")[0]
    return {name: " ".join(text.split()) for name, text in _ENTRY.findall(section)}


def explained(toml: str, recipe: Recipe) -> str:
    """A recipe's TOML with the meaning of each setting as a comment above it.

    Args:
      toml: from `to_toml`.
      recipe: the same one.

    Returns:
      TOML of the same recipe.
    """
    owners = {f.name: type(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}
    owners["widths"] = Width
    known, out = meanings(Recipe), []
    for line in toml.splitlines():
        if table := _TABLE.fullmatch(line):
            known = meanings(owners[table[1]])
        if text := known.get(line.partition(" = ")[0]):
            out += textwrap.wrap(text, 96, initial_indent="# ", subsequent_indent="#   ")
        out.append(line)
    return "\n".join(out) + "\n"

"""`ttq recipes`: the presets in a table, or one recipe as a file to be edited."""

import argparse

from ttq_jax.commands.output import print_json, print_text
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.describe import low_rank_in_short, moments_in_short, table
from ttq_jax.evaluation.progress import Progress
from ttq_jax.quant.meanings import explained
from ttq_jax.quant.names import quantizes_nothing
from ttq_jax.quant.presets import PRESETS, preset
from ttq_jax.quant.recipe import RULE_NAMES, Recipe
from ttq_jax.quant.recipe_text import load_recipe, to_toml, with_settings

_HINT = """\
--recipe NAME uses a recipe. ttq recipes NAME > my.toml writes it with all its settings; edit the
file and use it with --recipe my.toml. --set AXIS.KEY=VALUE changes one setting, as in
--set rounding.damping=0.1.\
"""


def _choices(recipe: Recipe | None) -> list[str]:
    """The four choices in short."""
    if recipe is None:
        return ["-"] * 4
    return [
        moments_in_short(recipe.source),
        RULE_NAMES[type(recipe.scale)],
        RULE_NAMES[type(recipe.rounding)],
        low_rank_in_short(recipe.low_rank),
    ]


def listing() -> str:
    """The presets for people: what each is, then what each chooses."""
    what = [["recipe", "what it is", "cost", "when to use it"]]
    chosen = [["recipe", "moments", "scale", "rounding", "low rank"]]
    for name, one in PRESETS.items():
        what.append([name, one.about, one.cost, one.use])
        chosen.append([name, *_choices(one.recipe)])
    return f"{table(what, left=4)}\n\n{table(chosen, left=5)}\n\n{_HINT}"


def run(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq recipes`.

    Args:
      args: its options.
      progress: not needed.

    Raises:
      ConfigError: an unreadable file, a recipe that quantizes nothing, or settings for none.
    """
    name = args.recipe
    if name is None:
        if args.settings:
            raise ConfigError("--set: expected a recipe to change, got none; add its NAME")
        if args.json:
            for key, one in PRESETS.items():
                data = None if one.recipe is None else one.recipe.describe()
                print_json({
                    "name": key, "about": one.about, "cost": one.cost, "use": one.use,
                    "recipe": data,
                })  # fmt: skip
        else:
            print_text(listing())
        return
    recipe = load_recipe(name) if name.endswith(".toml") else preset(name)
    if recipe is None:
        raise ConfigError(quantizes_nothing(name, "there is nothing to print"))
    recipe = with_settings(recipe, args.settings)
    if args.json:
        print_json({"name": name, "recipe": recipe.describe()})
    else:
        print_text(explained(to_toml(recipe), recipe).removesuffix("\n"))

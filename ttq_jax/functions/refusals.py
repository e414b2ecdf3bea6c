"""What is refused before a function is traced: trees, recipes and priors that cannot be served."""

import warnings
from typing import Any

import jax

from ttq_jax.config import ConfigError
from ttq_jax.errors import expect, shown
from ttq_jax.functions.packed import is_packed
from ttq_jax.functions.sites import Observed, Operand
from ttq_jax.functions.trace import FunctionError
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import Moments


def dense_only(params: Any) -> Any:
    """Refuses a tree that is packed already.

    Raises:
      FunctionError: it is.
    """
    if any(map(is_packed, jax.tree.leaves(params, is_leaf=is_packed))):
        raise FunctionError(
            "params: expected dense parameters, got packed ones; pass the tree that was read, or "
            "run the function with ttq.run(fn)"
        )
    return params


def priors_of(recipe: Recipe, prior: Observed | None) -> dict[Operand, Moments]:
    """A prior's moments by operand.

    Raises:
      ConfigError: the recipe needs one and there is none, or the other way round.
    """
    needed = recipe.source.prior == "corpus"
    if needed != (prior is not None):
        raise ConfigError(
            f"prior: the recipe's moments.prior is {recipe.source.prior!r}, but prior is "
            f"{'missing; pass what observe gave on a corpus' if needed else 'given; leave it out'}"
        )
    sites = () if prior is None else prior.sites
    return {operand: site.moments for site in sites for operand in site.operands}


def served(recipe: Recipe) -> Recipe:
    """Refuses what only our own decoder serves.

    Raises:
      ConfigError: the recipe says so.
    """
    expect("recipe", recipe, Recipe, "a Recipe, such as preset('ttq')")
    source = recipe.source
    if source.prior in {"weights", "samples"}:
        raise ConfigError(
            f"moments.prior = {source.prior!r} is estimated from the norms of ttq-jax's own decoder"
            "; for a function of yours choose a corpus or none: preset(…, moments='prompt')"
        )
    others = {
        "prefill": (recipe.prefill, "full", "a function's own weights read the prompt"),
        "batch": (recipe.batch, "pooled", "for a tree for each prompt use jax.vmap"),
        "widths": (recipe.widths, (), "quantize parts of the tree with recipes of their own"),
        "select": (recipe.select, "layers/.*", "pass select to read or observe"),
        "moments.decay": (source.decay, 0.0, "add what observe returns, scaled"),
        "moments.refresh": (source.refresh, 0, "observe the steps, and quantize again"),
    }
    for name, (value, wanted, instead) in others.items():
        if value != wanted:
            raise ConfigError(
                f"{name} = {shown(value)} is for ttq-jax's own decoder: for a function of yours "
                f"expected {shown(wanted)}; {instead}"
            )
    return recipe


def check_groups(recipe: Recipe, leaves: dict[str, Any], operands: set[Operand]) -> None:
    """Refuses groups that fit no kernel, and warns of `head`, which packs no function's tables.

    Raises:
      ConfigError: groups are wider than every input.
    """
    widest = max((operand.d_in for operand in operands), default=0)
    if recipe.grid.group_size > -(-widest // 8) * 8:
        raise ConfigError(
            f"group size: expected at most {widest}, the widest input of the packed parameters, "
            f"got {recipe.grid.group_size}; -1 gives one group per column"
        )
    if recipe.head is None:
        return
    packed = {operand.path for operand in operands}
    left = [k for k, leaf in leaves.items() if k not in packed and getattr(leaf, "ndim", 0) > 1]
    warnings.warn(
        f"head = {recipe.head} packs the vocabulary's tables of ttq-jax's own decoder; of this "
        f"function stay dense: {', '.join(left[:5]) or 'none'}; set head=None to say so",
        stacklevel=3,
    )

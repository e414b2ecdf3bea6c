"""The static low-rank part of a function's parameters: made once, for many prompts.

It is of the weights alone, so that its singular value decompositions need no prompt. Our own
decoder's are `quant.tree.static_factors`.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
from flax import struct

from ttq_jax.config import ConfigError
from ttq_jax.errors import expect
from ttq_jax.functions.packed import each_matrix
from ttq_jax.functions.plan import plan_of, traced_call
from ttq_jax.functions.refusals import dense_only, priors_of, served
from ttq_jax.functions.sites import Observed, Operand
from ttq_jax.functions.trace import FunctionError
from ttq_jax.quant.lowrank import truncated_svd
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import LowRank, Moments


@struct.dataclass
class StaticFactors:
    """Static low-rank parts of a function's parameters; a pytree, an argument of a jitted program.

    Attributes:
      factors: float32, one for each operand, with a leading axis for each "at" among its steps, and
        one for experts.
      operands: how the parameters are read.
      rank: of the recipe that they were made for.
      weighted: whether a prior weighed their rows.
    """

    factors: tuple[LowRank, ...]
    operands: tuple[Operand, ...] = struct.field(pytree_node=False)
    rank: int = struct.field(pytree_node=False)
    weighted: bool = struct.field(pytree_node=False)

    def of(self, operands: Iterable[Operand]) -> list[LowRank]:
        """Those of some operands.

        Args:
          operands: of one site.

        Returns:
          In their order.

        Raises:
          FunctionError: one was not known when they were made.
        """
        known = dict(zip(self.operands, self.factors, strict=True))
        for operand in operands:
            if operand not in known:
                raise FunctionError(
                    f"static: expected factors of {operand.path}, read as {operand}, got none; "
                    "make them with static_factors of the function that reads, and its select"
                )
        return [known[operand] for operand in operands]


def static_factors(
    fn: Callable[..., Any],
    recipe: Recipe,
    *,
    select: str | None = None,
    prior: Observed | None = None,
) -> Callable[..., StaticFactors]:
    """The static low-rank part of every parameter that would be packed: once per parameter tree.

    Args:
      fn: see `kernels`.
      recipe: its `low_rank` says which.
      select: see `kernels`.
      prior: moments of a corpus for a recipe with `moments.prior` "corpus"; they weigh the rows
        of a part that is `weighted`.

    Returns:
      A function of the parameters and `fn`'s other arguments, of which shapes are enough. It gives
      what `read` and `quantize` take as `static`.

    Raises:
      ConfigError: the recipe has no static part, or one that its corpus weighs; or see `read`.
      FunctionError: (from that function) see `kernels`.
    """
    rule, priors = served(recipe).low_rank, priors_of(recipe, prior)
    if not rule.rank:
        raise ConfigError(f"low_rank.rank: expected a static part, got rank {rule.rank}")
    if rule.weighted and not priors:
        raise ConfigError(
            "low_rank.weighted: expected a prior that weighs the rows, but this recipe's corpus "
            "does; quantize makes its static part from what was observed, once: leave static out"
        )

    def make(params: Any, *args: Any, **kwargs: Any) -> StaticFactors:
        call = traced_call(fn, dense_only(params), args, kwargs)
        operands = tuple(o for site in plan_of(call, select).sites for o in site.operands)
        factors = []
        for operand in operands:
            moments = priors.get(operand) if rule.weighted else None
            if rule.weighted and moments is None:
                raise ConfigError(f"prior: expected moments of {operand.path}, got none")
            w = call.by_path[operand.path]
            factors.append(_factored(w, moments, kind=operand.kind, rank=rule.rank))
        return StaticFactors(tuple(factors), operands, rule.rank, rule.weighted)

    return make


@partial(jax.jit, static_argnames=("kind", "rank"))
def _factored(w: Any, moments: Moments | None, *, kind: Operand, rank: int) -> LowRank:
    """The factors of one parameter."""

    def one(at: tuple[list[Any], Moments | None]) -> LowRank:
        (matrix,), moments = at
        return truncated_svd(matrix, rank, None if moments is None else moments.mean_power(2.0))

    return each_matrix(one, [w], moments, (kind,))


def check_static(static: StaticFactors | None, recipe: Recipe) -> None:
    """Refuses factors that were made for another recipe.

    Args:
      static: what `read` and `quantize` are given.
      recipe: theirs.

    Raises:
      ConfigError: it is.
      Error: no factors.
    """
    if static is None:
        return
    expect("static", static, StaticFactors, "what static_factors made")
    rule = recipe.low_rank
    if (static.rank, static.weighted) != (rule.rank, rule.weighted):
        raise ConfigError(
            f"static: expected factors of rank {rule.rank} with weighted={rule.weighted}, as the "
            f"recipe says, got rank {static.rank} with weighted={static.weighted}"
        )

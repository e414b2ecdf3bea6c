"""Bits where they matter: a width for each projection of each layer, within a budget.

The error of a width is measured, not modelled: every weight is rounded at every width by the
recipe's own rounding, and the output error that the given moments see is taken relative to the
output itself. Upgrades are then bought in the order of error removed per stored bit. The result is
a tuple of `Width` rules, static in the recipe: one program per model, and none per prompt.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ttq_jax.config import ConfigError
from ttq_jax.linear import dense_weight
from ttq_jax.quant.grid import BITS
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.tree import quantize_layer
from ttq_jax.quant.widths import Width
from ttq_jax.types import (
    SITE_OF,
    LowRank,
    Moments,
    Offline,
    Params,
    QuantizedLinear,
    kernels,
    leaf_bits,
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What each width costs and leaves, per projection.

    Attributes:
      widths: ascending.
      errors: by projection, [L, len(widths)]; output error over output, both in power.
      bits: by projection, [len(widths)]; stored bits of one layer, everything counted.
      weights: by projection, weights of one layer.
    """

    widths: tuple[int, ...]
    errors: dict[str, np.ndarray]
    bits: dict[str, np.ndarray]
    weights: dict[str, int]


def _power(matrix: Float[Array, "d_in d_out"], moments: Moments) -> Float[Array, ""]:
    """E‖xᵀ M‖² as the moments see it: by the whole Gram matrix, its blocks, or its diagonal."""
    if moments.gram is None:
        return jnp.sum(moments.mean_power(2.0)[:, None] * jnp.square(matrix))
    n_block, b = moments.gram.shape[:2]
    padded = jnp.pad(matrix, ((0, n_block * b - len(matrix)), (0, 0))).reshape(n_block, b, -1)
    seen = jnp.einsum("bij,bjn->bin", moments.gram, padded)
    return jnp.sum(padded * seen) / jnp.maximum(moments.count, 1.0)


@partial(jax.jit, static_argnames=("name", "recipe"))
def _errors(
    stack: Float[Array, "L d_in d_out"], moments: Moments, low_rank: LowRank | None, *,
    name: str, recipe: Recipe,
) -> tuple[Float[Array, "L"], QuantizedLinear]:  # fmt: skip
    """Relative output error of every layer, and the packed weight (for its size)."""

    def one(at: tuple) -> tuple[Array, QuantizedLinear]:
        layer, seen, factors = at
        made = quantize_layer(
            {name: stack}, seen, recipe, {} if factors is None else {name: factors}, layer=layer
        )[1][name]
        w = jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False).astype(jnp.float32)
        whole = _power(w, seen)
        return _power(w - dense_weight(made), seen) / jnp.where(whole > 0, whole, 1.0), made

    return jax.lax.map(one, (jnp.arange(len(stack)), moments, low_rank))


def measure_widths(
    params: Params, recipe: Recipe, moments: dict[str, Moments], offline: Offline,
    widths: tuple[int, ...] = BITS,
) -> Measured:  # fmt: skip
    """Rounds every weight at every width.

    Args:
      params: a dense tree.
      recipe: its rounding, scale, groups and low rank; its own bits and width rules are not read.
      moments: per site, stacked over the layers: of the prompt, or of a text like it; with the
        second moment and what `recipe.reads` says.
      offline: its static factors are used.
      widths: to try, ascending.

    Returns:
      Errors and sizes.

    Raises:
      ConfigError: the recipe selects no projection, or an unknown width.
    """
    dense = {n: k for n, k in kernels(params["layers"]).items() if recipe.selects(n)}
    if not dense:
        raise ConfigError(f"select: {recipe.select!r} matches no projection of this model")
    out = Measured(widths, {}, {}, {})
    for name, stack in dense.items():
        errors, bits = [], []
        for width in widths:
            grid = dataclasses.replace(recipe.grid, bits=width)
            uniform = dataclasses.replace(recipe, grid=grid, widths=(), select="layers/.*")
            error, made = _errors(
                stack, moments[SITE_OF[name]], offline.low_rank.get(name),
                name=name, recipe=uniform,
            )  # fmt: skip
            errors.append(np.asarray(error, np.float64))
            bits.append(leaf_bits(made) * stack[0].size)
        out.errors[name] = np.stack(errors, axis=1)
        out.bits[name] = np.array(bits)
        out.weights[name] = int(stack[0].size)
    return out


def allocate(measured: Measured, budget: float) -> tuple[Width, ...]:
    """Widths that spend a budget where it removes most error.

    Every weight starts at the narrowest width; of all upgrades along the lower convex hull of each
    weight's (size, error) points, the one that removes most error per bit is bought first, until
    nothing more fits. For a sum of convex terms this greedy choice is optimal up to the last item.

    Args:
      measured: from `measure_widths`.
      budget: stored bits per weight on average, everything counted.

    Returns:
      Rules, a few per projection; `Recipe.widths` takes them.

    Raises:
      ConfigError: even the narrowest width exceeds the budget.
    """
    total = sum(measured.weights[name] * len(errors) for name, errors in measured.errors.items())
    chosen = {name: np.zeros(len(errors), int) for name, errors in measured.errors.items()}
    spent = sum(measured.bits[name][0] * len(errors) for name, errors in measured.errors.items())
    if spent > budget * total:
        raise ConfigError(
            f"allocate: expected a budget of at least {spent / total:.3f} bits per weight, what "
            f"{measured.widths[0]} bits in these groups take; got {budget}"
        )
    upgrades = []
    for name, errors in measured.errors.items():
        for layer, row in enumerate(errors):
            upgrades += [(gain, name, layer, to) for gain, to in _hull(measured.bits[name], row)]
    # Along a hull the gains fall, so a weight's upgrades come in order.
    for _, name, layer, to in sorted(upgrades, key=lambda u: -u[0]):
        bits = measured.bits[name]
        price = bits[to] - bits[chosen[name][layer]]
        if price > 0 and spent + price <= budget * total:
            chosen[name][layer], spent = to, spent + price
    return tuple(rule for name, to in chosen.items() for rule in _rules(name, to, measured.widths))


def _hull(bits: np.ndarray, errors: np.ndarray) -> list[tuple[float, int]]:
    """(error removed per bit, index of the width) along the lower convex hull."""
    steps, at = [], 0
    while at < len(bits) - 1:
        gains = (errors[at] - errors[at + 1 :]) / (bits[at + 1 :] - bits[at])
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        at += best + 1
        steps.append((float(gains[best]), at))
    return steps


def _rules(name: str, chosen: np.ndarray, widths: tuple[int, ...]) -> list[Width]:
    """One projection's widths as rules: one for all layers, or one per width."""
    used = sorted(set(chosen.tolist()))
    if len(used) == 1:
        return [Width(select=f"layers/{name}", bits=widths[used[0]])]
    return [
        Width(
            select=f"layers/({'|'.join(str(i) for i in np.flatnonzero(chosen == to))})/{name}",
            bits=widths[to],
        )
        for to in used
    ]

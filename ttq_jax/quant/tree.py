"""Whole trees: each layer's projections at their widths, and quantization before any prompt.

Layers are scanned, so every layer of a stack has one shape. A projection whose layers differ in
width is computed by a `lax.switch` over its widths; each step of the scan gives one result per
width, zeros except for the right one; afterwards each width keeps its own layers. Each weight is
rounded once. The price is temporary memory: the stacks of all widths exist at once.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ttq_jax.config import ConfigError
from ttq_jax.errors import shown
from ttq_jax.experts import for_own_experts
from ttq_jax.host import on_device
from ttq_jax.mesh import check_rows
from ttq_jax.quant.convert import quantize_site
from ttq_jax.quant.grid import Grid
from ttq_jax.quant.lowrank import factor_layers
from ttq_jax.quant.moments import Reads
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.streams import Streams
from ttq_jax.types import SITE_OF, SITES, LowRank, MixedLinear, Moments, Offline, Params, kernels


def quantize_layer(
    stacks: dict[str, Array],
    moments: Moments | None,
    recipe: Recipe,
    low_rank: dict[str, LowRank],
    *,
    layer: Array,
    expert: Array | None = None,
    x: Array | Streams | None = None,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Quantizes one layer's projections of a site, each at the width that the recipe gives it.

    Args:
      stacks: by projection, weights stacked over the layers, and over the experts if there are any.
      moments: see `quantize_site`.
      recipe: how.
      low_rank: this layer's (and expert's) static factors by projection.
      layer: which layer.
      expert: which expert of the stacks; None where there are none.
      x: see `quantize_site`.

    Returns:
      What `quantize_site` returns; a projection of several widths as a tuple, one result per
      width, for `gather_widths`.
    """
    plans = {name: recipe.grids(name, len(stack)) for name, stack in stacks.items()}
    uniform = {name: plan[0] for name, plan in plans.items() if len(set(plan)) == 1}
    at = layer
    if expert is not None:
        at = layer * next(iter(stacks.values())).shape[1] + expert
        stacks = {name: stack.reshape(-1, *stack.shape[2:]) for name, stack in stacks.items()}
    stacks, at = on_device(stacks, at)
    ys, packed = quantize_site(
        {name: stacks[name] for name in uniform}, moments, recipe, low_rank,
        grids=uniform, layer=at, x=x,
    )  # fmt: skip
    made: dict[str, Any] = dict(packed)
    for name in stacks:
        if name not in uniform:
            run = partial(
                quantize_site, {name: stacks[name]}, moments, recipe, low_rank, layer=at, x=x
            )
            y, made[name] = _at_its_width(name, plans[name], run, layer)
            ys |= y
    return ys, made


def _used(plan: tuple[Grid, ...]) -> tuple[list[Grid], np.ndarray]:
    """The grids of a projection, and per layer the index of its grid."""
    grids = list(dict.fromkeys(plan))
    return grids, np.array([grids.index(grid) for grid in plan], np.int32)


def _at_its_width(
    name: str, plan: tuple[Grid, ...], run: Any, layer: Array
) -> tuple[dict[str, Array], tuple[Any, ...]]:
    """The product and, per grid, the packed weight: zeros except for the layer's own grid."""
    grids, which = _used(plan)
    of_grid = [partial(run, grids={name: grid}) for grid in grids]
    shapes = [jax.eval_shape(one)[1][name] for one in of_grid]

    def branch(i: int) -> tuple[dict[str, Array], tuple[Any, ...]]:
        ys, packed = of_grid[i]()
        zeros = [jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape) for shape in shapes]
        return ys, tuple(packed[name] if j == i else zero for j, zero in enumerate(zeros))

    branches = [partial(branch, i) for i in range(len(grids))]
    return jax.lax.switch(jnp.asarray(which)[layer], branches)


def gather_widths(packed: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Sorts the stacked results of `quantize_layer` by width.

    Args:
      packed: by projection, stacked over the layers.
      recipe: the one that made them.

    Returns:
      The same with a `MixedLinear` for each projection of several widths.
    """
    out = dict(packed)
    for name, results in packed.items():
        if isinstance(results, tuple):
            n_layers = results[0].planes[0].shape[0]
            _, which = _used(recipe.grids(name, n_layers))
            members = [np.flatnonzero(which == i).astype(np.int32) for i in range(len(results))]
            slot = np.zeros_like(which)
            for layers in members:
                slot[layers] = np.arange(len(layers))
            stacks = [
                jax.tree.map(lambda a, at=at: a[at], result)
                for result, at in zip(results, members, strict=True)
            ]
            out[name] = MixedLinear(tuple(stacks), jnp.asarray(which), jnp.asarray(slot))
    return out


def at_its_width(name: str, results: Any, recipe: Recipe, n_layers: int, layer: Array) -> Any:
    """One layer's result of `quantize_layer` as a weight to multiply with.

    Args:
      name: the projection.
      results: a packed weight, or a tuple of one per width.
      recipe: the one that made it.
      n_layers: L.
      layer: which layer it is.

    Returns:
      The packed weight.
    """
    if not isinstance(results, tuple):
        return results
    _, which = _used(recipe.grids(name, n_layers))
    alone = jax.tree.map(lambda a: a[None], results)
    return MixedLinear(alone, jnp.asarray(which), jnp.zeros_like(jnp.asarray(which)), layer)


def replace_kernels(params: Params, packed: dict[str, Any]) -> Params:
    """The tree with some projections' kernels replaced; everything else is shared."""
    layers = params["layers"]
    new = {name: {**layers[name], "kernel": kernel} for name, kernel in packed.items()}
    return {**params, "layers": {**layers, **new}}


def check_selection(params: Params, recipe: Recipe | None) -> None:
    """Refuses a recipe that does not fit a tree: what it says would change nothing.

    Args:
      params: the dense tree.
      recipe: None for the unquantized model.

    Raises:
      ConfigError: no projection is selected, a width rule matches none, groups are wider than
        every input, one would lie on several devices of
        the current mesh, or a mixture of experts would be read in two streams.
    """
    if recipe is None:
        return
    stacks = kernels(params["layers"])
    names = recipe.selected(stacks)
    for rule in recipe.widths:
        if not any(rule.matches(n, i) for n in names for i in range(stacks[n].shape[0])):
            raise ConfigError(
                f"widths: expected a match with layers/{names[0]} or layers/0/{names[0]} (or "
                f"another of {', '.join(names)}), got {shown(rule.select)}"
            )
    if recipe.prefill == "both" and any(stack.ndim == 4 for stack in stacks.values()):
        raise ConfigError(
            "prefill = 'both' does not serve mixtures of experts, because the two streams of a "
            "token may reach different experts; choose prefill = 'full'"
        )
    for name in names:
        # Experts are dealt out whole.
        for grid in recipe.grids(name, len(stacks[name])) if stacks[name].ndim == 3 else ():
            check_rows(name, stacks[name].shape[-2], grid.group_size)
    widest = max(stacks[name].shape[-2] for name in names)
    for grid in {grid for name in names for grid in recipe.grids(name, len(stacks[name]))}:
        if grid.group_size > -(-widest // 8) * 8:
            raise ConfigError(
                f"group size: expected at most {widest}, the widest input of the selected "
                f"projections, got {grid.group_size}; -1 gives one group per column"
            )


def _selected(params: Params, recipe: Recipe) -> dict[str, Array]:
    """The dense kernels that the recipe quantizes, stacked over the layers."""
    return {
        name: leaf["kernel"]
        for name, leaf in params["layers"].items()
        if "kernel" in leaf and recipe.selects(name)
    }


@jax.jit
def _mean_squares(moments: Moments) -> Float[Array, "L d_in"]:
    return jax.vmap(lambda layer: layer.mean_power(2.0))(moments)


def static_factors(
    params: Params, recipe: Recipe | None, moments: dict[str, Moments] | None = None
) -> dict[str, LowRank]:
    """The low-rank factors that a recipe keeps, computed once per model.

    Args:
      params: a dense tree.
      recipe: its low rank and selection are used.
      moments: per site, stacked over the layers, of the corpus or prior that weighs the rows; read
        only if the recipe says so.

    Returns:
      Per selected projection, factors stacked over the layers; {} at rank 0.

    Raises:
      ValueError: weighted factors without moments.
    """
    if recipe is None or not recipe.low_rank.rank:
        return {}
    if recipe.low_rank.weighted and not moments:
        raise ValueError("weighted static factors need moments; make them with prepare()")
    factors = {}
    for name, stack in _selected(params, recipe).items():
        power = None
        if recipe.low_rank.weighted and moments:
            power = _mean_squares(moments[SITE_OF[name]])
        factors[name] = factor_layers(stack, recipe.low_rank.rank, power)
    return factors


def quantize_tree(
    params: Params, recipe: Recipe, moments: dict[str, Moments], low_rank: dict[str, LowRank]
) -> Params:
    """Quantizes a whole tree from given moments, one layer at a time; pure and jittable.

    Args:
      params: a dense tree.
      recipe: how.
      moments: per site, stacked over the layers; {} if the recipe reads none.
      low_rank: static factors, stacked over the layers.

    Returns:
      The tree with packed kernels.
    """
    selected = _selected(params, recipe)
    packed: dict[str, Any] = {}
    for site, names in SITES.items():
        stacks = {name: selected[name] for name in names if name in selected}
        if not stacks:
            continue
        factors = {name: low_rank[name] for name in stacks if name in low_rank}

        n_layers, *experts, _, _ = next(iter(stacks.values())).shape
        one = partial(_layer_from_moments, stacks, recipe, *experts)
        per_layer = (jnp.arange(n_layers, dtype=jnp.int32), moments.get(site), factors)
        packed |= jax.lax.map(one, per_layer)
    return replace_kernels(params, gather_widths(packed, recipe))


def _layer_from_moments(stacks: dict[str, Array], recipe: Recipe, *at: Any) -> dict[str, Any]:
    """One layer's packed projections of a site; of all its experts, if their number is given."""
    *n_experts, (layer, moments, low_rank) = at

    def make(_: Any, expert: Array | None, mine: tuple, stacks: dict[str, Array]) -> dict[str, Any]:
        return quantize_layer(stacks, mine[0], recipe, mine[1], layer=layer, expert=expert)[1]

    return for_own_experts(make, (moments, low_rank), stacks, *n_experts)


@partial(jax.jit, static_argnames="recipe")
def quantize_params(params: Params, recipe: Recipe, offline: Offline) -> Params:
    """Quantizes a whole tree before any prompt.

    Args:
      params: a dense tree.
      recipe: its moments must not be the prompt's.
      offline: the corpus's moments and the static factors that the recipe reads.

    Returns:
      The tree with packed kernels.

    Raises:
      ValueError: the recipe needs a prompt.
    """
    if recipe.source.of == "prompt":
        raise ValueError(
            "expected a recipe that reads no prompt, got moments.of = 'prompt'; use "
            "generate(…, recipe=…), which quantizes during prefill, or moments 'corpus' or 'none'"
        )
    moments = offline.moments if recipe.reads != Reads() else {}
    return quantize_tree(params, recipe, moments, offline.low_rank)

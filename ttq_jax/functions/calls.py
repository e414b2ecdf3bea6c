"""`read`, `observe`, `quantize`, `run`, `kernels`: a user's function, and packed weights for it."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Bool

from ttq_jax.config import ConfigError
from ttq_jax.errors import expect
from ttq_jax.functions.control import HANDLERS
from ttq_jax.functions.modules import path_of
from ttq_jax.functions.moments import Observing
from ttq_jax.functions.packed import PackedKernel, is_packed, multiplied, quantized
from ttq_jax.functions.plan import (
    Call,
    Plan,
    Table,
    plan_of,
    shardings_of,
    table_of,
    traced_call,
)
from ttq_jax.functions.refusals import check_groups, dense_only, priors_of, served
from ttq_jax.functions.sharding import splits_of
from ttq_jax.functions.sites import Observed, Operand, Site, merged
from ttq_jax.functions.static import StaticFactors, check_static
from ttq_jax.functions.trace import Evaluator, FunctionError, Kernel, Product
from ttq_jax.partition import Split
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import Moments

Fn = Callable[..., Any]


def kernels(fn: Fn, *, select: str | None = None) -> Callable[..., Table]:
    """What would be packed of a function's parameters, at which site, and why not the rest.

    Args:
      fn: any JAX function whose first argument is a tree of parameters.
      select: regular expression; a parameter is packed if its path ("params/Dense_0/kernel")
        matches fully. None: all that is multiplied, but tables of the vocabulary and routers, which
        a part of their path names: embed…, unembed…, head, router or logits.

    Returns:
      A function of the parameters and `fn`'s other arguments, or their shapes. It computes nothing;
      its table can be printed.

    Raises:
      FunctionError: (from that function) no parameter is multiplied, or none is selected.
    """

    def table(params: Any, *args: Any, **kwargs: Any) -> Table:
        call = traced_call(fn, dense_only(params), args, kwargs)
        return table_of(call, plan_of(call, select))

    return table


def observe(
    fn: Fn,
    recipe: Recipe,
    *,
    where: Bool[Array, "B T"] | None = None,
    select: str | None = None,
) -> Callable[..., tuple[Any, Observed]]:
    """The function, and the moments of what its parameters are multiplied with.

    Args:
      fn: see `kernels`.
      recipe: says which moments.
      where: bool[B, T], False for padding, where inputs are [B, T, …] or [B·T, …]; None: all rows
        are real.
      select: see `kernels`.

    Returns:
      A function of the parameters and `fn`'s other arguments. It gives (what `fn` gives, bit for
      bit; the moments). Pure: for jit, vmap, and inside a user's own loop. Moments of several calls
      add.

    Raises:
      ConfigError: the recipe is for our own decoder only.
      FunctionError: (from that function) see `kernels`; or rows that the mask does not fit.
    """
    recipe = served(recipe)

    def run(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Observed]:
        call = traced_call(fn, dense_only(params), args, kwargs)
        plan = plan_of(call, select)
        ev = Evaluator(Observing(plan.operands, recipe.reads, where), HANDLERS)
        out, kept = call.evaluate(ev, _kernels(call, plan))
        return out, Observed(merged(kept))

    return run


def quantize(
    params: Any,
    observed: Observed,
    recipe: Recipe,
    *,
    prior: Observed | None = None,
    static: StaticFactors | None = None,
    shardings: Any = None,
) -> Any:
    """Packs every parameter that was observed; pure and jittable.

    Args:
      params: the dense tree.
      observed: moments of the prompt or of a corpus, as the recipe's `moments.of` says.
      recipe: how.
      prior: moments of a corpus for a recipe with `moments.prior` "corpus".
      static: see `read`.
      shardings: see `read`.

    Returns:
      The tree with packed parameters, for `run`. Everything else is shared.

    Raises:
      ConfigError: the recipe is for our own decoder only, or its prior is missing, or the static
        factors are another recipe's, or a group would lie on several devices.
      FunctionError: an observed parameter is not in the tree, has no static factors, or is sharded
        in a way that packed weights cannot be.
    """
    recipe = served(recipe)
    check_static(static, recipe)
    expect("observed", observed, Observed, "what observe returns")
    found, tree = jax.tree_util.tree_flatten_with_path(dense_only(params))
    leaves = {path_of(path): leaf for path, leaf in found}
    for site in observed.sites:
        for operand in site.operands:
            if operand.path not in leaves:
                raise FunctionError(
                    f"{operand.path}: expected the tree that was observed, whose paths are "
                    f"{', '.join(list(leaves)[:5])}, …"
                )
    operands = {o for site in observed.sites for o in site.operands}
    check_groups(recipe, leaves, operands)
    lie = shardings_of(list(leaves.items()), shardings)
    splits = splits_of(lie, leaves, operands, recipe)
    made = _packed(observed.sites, leaves, recipe, priors_of(recipe, prior), static, splits)
    return jax.tree.unflatten(tree, [made.get(path, leaf) for path, leaf in leaves.items()])


@struct.dataclass
class _Made:
    """A packed weight that was made inside the scan that slices it."""

    kernel: PackedKernel
    operand: Operand = struct.field(pytree_node=False)


def read(
    fn: Fn,
    recipe: Recipe,
    *,
    where: Bool[Array, "B T"] | None = None,
    select: str | None = None,
    prior: Observed | None = None,
    static: StaticFactors | None = None,
    shardings: Any = None,
) -> Callable[..., tuple[Any, Any]]:
    """Reads a prompt with the function, and quantizes its parameters for that prompt.

    `observe` and `quantize` in one pass: a layer that a scan slices is quantized inside the scan,
    so that one layer's Gram matrices are alive at a time.

    Args:
      fn: see `kernels`.
      recipe: how. Reading is with the dense weights.
      where: see `observe`.
      select: see `kernels`.
      prior: see `quantize`.
      static: what `static_factors` made of these parameters; None for a recipe without a static
        low-rank part, or to make it in every call, by an SVD of every packed weight.
      shardings: of sharded parameters inside a jit, where nobody can see it, how they lie: a tree
        like theirs, `jax.tree.map(lambda a: a.sharding, params)`. Packed weights lie as they do.

    Returns:
      A function of the parameters and `fn`'s other arguments. It gives (what `fn` gives, bit for
      bit; the packed tree, for `run`).

    Raises:
      ConfigError: the recipe is for our own decoder only, or its prior is missing, or the static
        factors are another recipe's; (from that function) a group would lie on several devices.
      FunctionError: (from that function) see `observe`; or a parameter has no static factors, or is
        sharded in a way that packed weights cannot be.
    """
    recipe = served(recipe)
    check_static(static, recipe)
    if recipe.source.of == "corpus":
        raise ConfigError(
            "moments.of = 'corpus' reads no prompt: observe a corpus, and quantize with what that "
            "gives; or set moments.of to 'prompt'"
        )
    priors = priors_of(recipe, prior)

    def run(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        call = traced_call(fn, dense_only(params), args, kwargs)
        plan = plan_of(call, select)
        check_groups(recipe, call.by_path, plan.operands)
        lie = shardings_of(call.leaves, shardings)
        splits = splits_of(lie, call.by_path, plan.operands, recipe)
        hook = _Reading(plan, recipe, where, priors, static, splits)
        ev = Evaluator(hook, HANDLERS, hook.end_scan)
        out, kept = call.evaluate(ev, _kernels(call, plan))
        sites = merged(one for one in kept if isinstance(one, Site))
        done = [one for one in kept if isinstance(one, _Made)]
        made = _packed(sites, call.by_path, recipe, priors, static, splits, done)
        leaves = [made.get(path, leaf) for path, leaf in call.leaves]
        return out, jax.tree.unflatten(call.tree, leaves)

    return run


class _Reading(Observing):
    """Observes, and quantizes what can be quantized inside a scan."""

    def __init__(
        self, plan: Plan, recipe: Recipe, where: Any, priors: dict[Operand, Moments],
        static: StaticFactors | None, splits: Mapping[Operand, Split],
    ):  # fmt: skip
        super().__init__(plan.operands, recipe.reads, where)
        self.plan, self.recipe, self.priors, self.static = plan, recipe, priors, static
        self.splits = splits
        self.slices: dict[Operand, tuple[int, Any, Any]] = {}

    def __call__(self, ev: Evaluator, product: Product) -> None:
        super().__call__(ev, product)
        kernel = product.kernel
        weight = kernel.dense if kernel.uncast is None else kernel.uncast
        self.slices[product.operand] = (ev.depth, weight, kernel.index)

    def end_scan(self, ev: Evaluator, kept: list[Any], scan: int) -> list[Any]:
        """Quantizes the sites that nothing outside of the scan adds to."""
        out: list[Any] = []
        for site in kept:
            whole = (
                isinstance(site, Site)
                and site.scans == (scan,)
                and all(
                    self.plan.seen[operand] == 1
                    and self.slices[operand][0] == ev.depth + 1  # not in a branch of its body
                    and sum(step[0] == "at" for step in operand.steps) == 1
                    for operand in site.operands
                )
            )
            if not whole or ev.depth > 1 or self.priors:
                out.append(site)
                continue
            here = tuple(dataclasses.replace(operand, steps=()) for operand in site.operands)
            one = dataclasses.replace(site, operands=here)
            weights = [self.slices[operand][1] for operand in site.operands]
            static = None
            if self.static is not None:
                (i,) = self.slices[site.operands[0]][2]
                slice_of = partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
                static = [jax.tree.map(slice_of, f) for f in self.static.of(site.operands)]
            splits = tuple(map(self.splits.get, site.operands))
            packed = quantized(one, weights, self.recipe, None, static, splits)
            pairs = zip(packed, site.operands, strict=True)
            out += [_Made(kernel, operand) for kernel, operand in pairs]
        return out


def run(fn: Fn) -> Callable[..., Any]:
    """The function over packed parameters.

    Args:
      fn: the function that was read or observed, or another that reads its parameters alike.

    Returns:
      A function of a packed tree and `fn`'s other arguments, which gives what `fn` gives. Pure: for
      jit, vmap, and inside a user's own loop.

    Raises:
      FunctionError: (from that function) nothing is packed, or a packed parameter is used otherwise
        than it was packed for.
    """

    def step(packed: Any, *args: Any, **kwargs: Any) -> Any:
        call = traced_call(fn, packed, args, kwargs)
        if not any(is_packed(leaf) for _, leaf in call.leaves):
            raise FunctionError(
                "run: expected a tree with packed parameters, got none; pass what read or quantize "
                "returned, or call the function itself"
            )
        leaves = [
            Kernel(path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), packed=leaf)
            if is_packed(leaf)
            else leaf
            for path, leaf in call.leaves
        ]
        ev = Evaluator(lambda _, product: multiplied(product), HANDLERS)
        return call.evaluate(ev, leaves)[0]

    return step


def _kernels(call: Call, plan: Plan) -> list[Any]:
    """The parameters, those that are packed as kernels."""
    return [
        Kernel(path, jax.typeof(leaf), dense=leaf) if path in plan.paths else leaf
        for path, leaf in call.leaves
    ]


def _packed(
    sites: tuple[Site, ...], leaves: dict[str, Any], recipe: Recipe,
    priors: dict[Operand, Moments], static: StaticFactors | None,
    splits: Mapping[Operand, Split], done: Iterable[_Made] = (),
) -> dict[str, PackedKernel]:  # fmt: skip
    """By path, the packed parameters: a view for each way in which one is read.

    Raises:
      ConfigError: the prior says nothing of one of them.
    """
    views: dict[str, list[tuple[Operand, PackedKernel]]] = {}
    for one in done:
        views.setdefault(one.operand.path, []).append((one.operand, one.kernel))
    for site in sites:
        weights = [leaves[operand.path] for operand in site.operands]
        prior = priors.get(site.operands[0])
        if priors and prior is None:
            raise ConfigError(f"prior: expected moments of {site.operands[0].path}, got none")
        fixed = None if static is None else static.of(site.operands)
        mine = tuple(map(splits.get, site.operands))
        made = quantized(site, weights, recipe, prior, fixed, mine)
        for operand, kernel in zip(site.operands, made, strict=True):
            views.setdefault(operand.path, []).append((operand, kernel))
    out = {}
    for path, parts in views.items():
        parts.sort(key=lambda part: str(part[0]))
        out[path] = PackedKernel(
            tuple(kernel.views[0] for _, kernel in parts),
            tuple(kernel.rows[0] for _, kernel in parts),
            tuple(operand for operand, _ in parts),
            tuple(leaves[path].shape), str(leaves[path].dtype),
        )  # fmt: skip
    return out

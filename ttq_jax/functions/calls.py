"""`read`, `observe`, `quantize`, `run`, `kernels`: a user's function, and packed weights for it."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Bool

from ttq_jax.config import ConfigError
from ttq_jax.errors import expect, shown
from ttq_jax.functions.control import HANDLERS
from ttq_jax.functions.modules import path_of
from ttq_jax.functions.moments import Observing
from ttq_jax.functions.packed import PackedKernel, is_packed, multiplied, quantized
from ttq_jax.functions.plan import Call, Plan, Table, plan_of, table_of, traced_call
from ttq_jax.functions.sites import Observed, Operand, Site, merged
from ttq_jax.functions.trace import Evaluator, FunctionError, Kernel, Product
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import Moments

Fn = Callable[..., Any]


def kernels(fn: Fn, *, select: str | None = None) -> Callable[..., Table]:
    """What would be packed of a function's parameters, at which site, and why not the rest.

    Args:
      fn: any JAX function whose first argument is a tree of parameters.
      select: regular expression; a parameter is packed if its path ("params/Dense_0/kernel")
        matches fully. None: all that is multiplied, but tables of the vocabulary and routers, which
        a part of their path names: embed…, head, router or logits.

    Returns:
      A function of the parameters and `fn`'s other arguments, or their shapes. It computes nothing;
      its table can be printed.

    Raises:
      FunctionError: (from that function) no parameter is multiplied, or none is selected.
    """

    def table(params: Any, *args: Any, **kwargs: Any) -> Table:
        call = traced_call(fn, _dense(params), args, kwargs)
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
    recipe = _served(recipe)

    def run(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Observed]:
        call = traced_call(fn, _dense(params), args, kwargs)
        plan = plan_of(call, select)
        ev = Evaluator(Observing(plan.operands, recipe.reads, where), HANDLERS)
        out, kept = call.evaluate(ev, _kernels(call, plan))
        return out, Observed(merged(kept))

    return run


def quantize(
    params: Any, observed: Observed, recipe: Recipe, *, prior: Observed | None = None
) -> Any:
    """Packs every parameter that was observed; pure and jittable.

    Args:
      params: the dense tree.
      observed: moments of the prompt or of a corpus, as the recipe's `moments.of` says.
      recipe: how.
      prior: moments of a corpus for a recipe with `moments.prior` "corpus".

    Returns:
      The tree with packed parameters, for `run`. Everything else is shared.

    Raises:
      ConfigError: the recipe is for our own decoder only, or its prior is missing.
      FunctionError: an observed parameter is not in the tree.
    """
    recipe = _served(recipe)
    expect("observed", observed, Observed, "what observe returns")
    found, tree = jax.tree_util.tree_flatten_with_path(_dense(params))
    leaves = {path_of(path): leaf for path, leaf in found}
    for site in observed.sites:
        for operand in site.operands:
            if operand.path not in leaves:
                raise FunctionError(
                    f"{operand.path}: expected the tree that was observed, whose paths are "
                    f"{', '.join(list(leaves)[:5])}, …"
                )
    _check(recipe, leaves, {o for site in observed.sites for o in site.operands})
    made = _packed(observed.sites, leaves, recipe, _priors(recipe, prior))
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
) -> Callable[..., tuple[Any, Any]]:
    """Reads a prompt with the function, and quantizes its parameters for that prompt.

    `observe` and `quantize` in one pass: a layer that a scan slices is quantized inside the scan,
    so that one layer's Gram matrices are alive at a time.

    Args:
      fn: see `kernels`.
      recipe: how. Reading is with the dense weights. A static low-rank part is an SVD of every
        packed weight in every call: nothing is kept between calls.
      where: see `observe`.
      select: see `kernels`.
      prior: see `quantize`.

    Returns:
      A function of the parameters and `fn`'s other arguments. It gives (what `fn` gives, bit for
      bit; the packed tree, for `run`).

    Raises:
      ConfigError: the recipe is for our own decoder only, or its prior is missing.
      FunctionError: (from that function) see `observe`.
    """
    recipe = _served(recipe)
    if recipe.source.of == "corpus":
        raise ConfigError(
            "moments.of = 'corpus' reads no prompt: observe a corpus, and quantize with what that "
            "gives; or set moments.of to 'prompt'"
        )
    priors = _priors(recipe, prior)

    def run(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        call = traced_call(fn, _dense(params), args, kwargs)
        plan = plan_of(call, select)
        _check(recipe, call.by_path, plan.operands)
        hook = _Reading(plan, recipe, where, priors)
        ev = Evaluator(hook, HANDLERS, hook.end_scan)
        out, kept = call.evaluate(ev, _kernels(call, plan))
        sites = merged(one for one in kept if isinstance(one, Site))
        done = [one for one in kept if isinstance(one, _Made)]
        made = _packed(sites, call.by_path, recipe, priors, done)
        leaves = [made.get(path, leaf) for path, leaf in call.leaves]
        return out, jax.tree.unflatten(call.tree, leaves)

    return run


class _Reading(Observing):
    """Observes, and quantizes what can be quantized inside a scan."""

    def __init__(self, plan: Plan, recipe: Recipe, where: Any, priors: dict[Operand, Moments]):
        super().__init__(plan.operands, recipe.reads, where)
        self.plan, self.recipe, self.priors = plan, recipe, priors
        self.slices: dict[Operand, tuple[int, Any]] = {}

    def __call__(self, ev: Evaluator, product: Product) -> None:
        super().__call__(ev, product)
        kernel = product.kernel
        weight = kernel.dense if kernel.uncast is None else kernel.uncast
        self.slices[product.operand] = (ev.depth, weight)

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
            packed = quantized(one, weights, self.recipe, None)
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
    priors: dict[Operand, Moments], done: list[_Made] | None = None,
) -> dict[str, PackedKernel]:  # fmt: skip
    """By path, the packed parameters: a view for each way in which one is read.

    Raises:
      ConfigError: the prior says nothing of one of them.
    """
    views: dict[str, list[tuple[Operand, PackedKernel]]] = {}
    for one in done or []:
        views.setdefault(one.operand.path, []).append((one.operand, one.kernel))
    for site in sites:
        weights = [leaves[operand.path] for operand in site.operands]
        prior = priors.get(site.operands[0])
        if priors and prior is None:
            raise ConfigError(f"prior: expected moments of {site.operands[0].path}, got none")
        made = quantized(site, weights, recipe, prior)
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


def _dense(params: Any) -> Any:
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


def _priors(recipe: Recipe, prior: Observed | None) -> dict[Operand, Moments]:
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


def _served(recipe: Recipe) -> Recipe:
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


def _check(recipe: Recipe, leaves: dict[str, Any], operands: set[Operand]) -> None:
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

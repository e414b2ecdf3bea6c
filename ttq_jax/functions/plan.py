"""What would be packed of a function, and why not the rest. Nothing is computed."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from ttq_jax.functions.control import HANDLERS
from ttq_jax.functions.modules import path_of, refuse_hijax, refuse_module
from ttq_jax.functions.moments import Observing
from ttq_jax.functions.packed import is_packed
from ttq_jax.functions.sharding import sharding_of, unseen_mesh
from ttq_jax.functions.sites import Operand, Site, merged
from ttq_jax.functions.trace import FLOATS, Evaluator, FunctionError, Kernel
from ttq_jax.quant.widths import check_pattern

# A part of a path that names a table of the vocabulary, or what chooses experts.
_TABLE = re.compile(r"(\w+_)?((un)?embed\w*|head|router|logits)(_\d+)?")


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a user's function, traced.

    Attributes:
      jaxpr: of the flat parameters and the arrays among the other arguments.
      out: structure of its output.
      tree: structure of the parameters.
      leaves: (path, leaf) of each parameter.
      arrays: the arrays among the other arguments.
    """

    jaxpr: Any
    out: Any
    tree: Any
    leaves: list[tuple[str, Any]]
    arrays: list[Any]

    def evaluate(self, ev: Evaluator, leaves: list[Any]) -> tuple[Any, list[Any]]:
        """(the function's output, what the hook kept) with these in the place of parameters."""
        outs, kept = ev.scope(self.jaxpr, [*leaves, *self.arrays])
        outs = [_value(one) for one in outs]
        return jax.tree.unflatten(self.out, outs), kept

    @property
    def by_path(self) -> dict[str, Any]:
        """The parameters by path."""
        return dict(self.leaves)


def _value(out: Any) -> Any:
    """A kernel that the function returns is the parameter: modules return their state."""
    if not isinstance(out, Kernel):
        return out
    return out.dense if out.packed is None else out.packed


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def traced_call(fn: Callable[..., Any], params: Any, args: Any, kwargs: Any) -> Call:
    """Traces a function over dense parameters; an argument that is no array stays what it is.

    Args:
      fn: its first argument is the parameters.
      params: dense or packed.
      args: the others.
      kwargs: likewise.

    Returns:
      The traced call.

    Raises:
      FunctionError: `fn` is a module, a parameter is a hijax variable, or is sharded otherwise than
        by the automatic axes of a mesh.
    """
    refuse_module(fn)
    found, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)
    leaves = [(path_of(path), leaf) for path, leaf in found]
    for path, leaf in leaves:
        refuse_hijax(path, leaf)
        if not is_packed(leaf) and _is_array(leaf):
            sharding_of(path, leaf)
    shapes = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_packed(leaf) else leaf
        for _, leaf in leaves
    ]
    rest, rest_tree = jax.tree.flatten((args, kwargs))
    is_array = [_is_array(v) for v in rest]

    def flat(leaves: list[Any], arrays: list[Any]) -> Any:
        left = iter(arrays)
        whole = [next(left) if given else v for given, v in zip(is_array, rest, strict=True)]
        args, kwargs = jax.tree.unflatten(rest_tree, whole)
        return fn(jax.tree.unflatten(tree, leaves), *args, **kwargs)

    arrays = [v for given, v in zip(is_array, rest, strict=True) if given]
    jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(shapes, arrays)
    return Call(jaxpr, jax.tree.structure(out), tree, leaves, arrays)


def shardings_of(leaves: list[tuple[str, Any]], given: Any) -> dict[str, NamedSharding]:
    """Where the parameters lie that are on a mesh of several devices.

    Inside a jit an array's layout is part of its type only along explicit axes of a mesh. Along
    automatic ones it is XLA's choice, so there the user has to say it.

    Args:
      leaves: (path, leaf) of each parameter.
      given: a tree of shardings like the parameters', or None.

    Returns:
      By path.

    Raises:
      FunctionError: another tree, or see `sharding.sharding_of`.
    """
    said: list[Any] = [None] * len(leaves)
    if given is not None:
        said = jax.tree.leaves(given)
        if len(said) != len(leaves) or not all(isinstance(s, jax.sharding.Sharding) for s in said):
            raise FunctionError(
                f"shardings: expected one for each of the {len(leaves)} parameters, as in "
                f"jax.tree.map(lambda a: a.sharding, params), got a tree of {len(said)}"
            )
    found = {
        path: one
        for (path, leaf), sharding in zip(leaves, said, strict=True)
        if _is_array(leaf) and (one := sharding_of(path, leaf, sharding)) is not None
    }  # fmt: skip
    unseen = {path: unseen_mesh(leaf) for path, leaf in leaves if _is_array(leaf)}
    some = [path for path, mesh in unseen.items() if mesh]
    if given is None and some:
        warnings.warn(
            f"{some[0]} and {len(some) - 1} other parameters are on a mesh of automatic axes, "
            f"{unseen[some[0]]}: inside a jit nobody can see if they are sharded, and packed "
            "weights would inherit no sharding; pass shardings=jax.tree.map(lambda a: a.sharding, "
            "params), made outside of it",
            stacklevel=4,
        )
    return found


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is observed of a call.

    Attributes:
      sites: without moments; their operands are what is packed.
      seen: how often each operand occurs in the program.
      dense: by path, why a parameter that could be a weight stays as it is.
    """

    sites: tuple[Site, ...]
    seen: Mapping[Operand, int]
    dense: Mapping[str, str]

    @property
    def operands(self) -> set[Operand]:
        """All that is packed."""
        return {operand for site in self.sites for operand in site.operands}

    @property
    def paths(self) -> set[str]:
        """The parameters that are packed."""
        return {operand.path for operand in self.operands}


def candidates(call: Call) -> list[str]:
    """The paths of parameters that could be weights: floating, of two axes or more.

    In a tree with a collection "params", as Linen's, only those of that collection.
    """
    collections = any(path.startswith("params/") for path, _ in call.leaves)
    return [
        path
        for path, leaf in call.leaves
        if _is_array(leaf) and len(leaf.shape) >= 2 and str(leaf.dtype) in FLOATS
        and (not collections or path.startswith("params/"))
    ]  # fmt: skip


def plan_of(call: Call, select: str | None) -> Plan:
    """Finds every product of a call's parameters.

    Args:
      call: the call.
      select: regular expression; a parameter is packed if its path matches fully. None: all but
        tables of the vocabulary and routers, by name.

    Returns:
      The plan.

    Raises:
      FunctionError: no parameter is multiplied, or none of those is selected.
    """
    if select is not None:
        check_pattern("select", select)
    names, hook = candidates(call), Observing(None, None)
    ev = Evaluator(hook, HANDLERS)

    def survey(leaves: list[Any], arrays: list[Any]) -> list[Any]:
        values = [
            Kernel(path, jax.typeof(leaf), dense=leaf) if path in names else leaf
            for (path, _), leaf in zip(call.leaves, leaves, strict=True)
        ]
        return ev.scope(call.jaxpr, [*values, *arrays])[1]

    sites = merged(jax.eval_shape(survey, [leaf for _, leaf in call.leaves], call.arrays))
    if not sites and not ev.otherwise:
        raise FunctionError(
            f"this function multiplies none of the {len(call.leaves)} parameters it was given: "
            "they must be its first argument, not a closure"
        )
    reads: dict[str, list[Operand]] = {}
    for operand in (one for site in sites for one in site.operands):
        reads.setdefault(operand.path, []).append(operand)
    dense = {path: "no product reads it" for path in names if path not in reads}
    dense |= _overlapping(reads, call.by_path) | ev.otherwise
    kernels = [path for path in reads if path not in dense]
    dense |= {path: why for path in kernels if (why := _unselected(path, select))}
    chosen = [path for path in kernels if path not in dense]
    if not chosen:
        some = ", ".join(kernels[:5]) or "; ".join(f"{k}: {v}" for k, v in list(dense.items())[:5])
        what = "the default select" if select is None else f"select {select!r}"
        raise FunctionError(f"{what} matched none of the {len(kernels)} kernels: {some}")
    left = [s.only(i for i, o in enumerate(s.operands) if o.path in chosen) for s in sites]
    stays = {path: dense[path] for path in names if path in dense}
    return Plan(tuple(site for site in left if site.operands), hook.seen, stays)


def _unselected(path: str, select: str | None) -> str:
    """Why a kernel is not selected; "" if it is."""
    if select is not None:
        return "" if re.fullmatch(select, path) else "select leaves it out"
    named = next((part for part in path.split("/") if _TABLE.fullmatch(part)), None)
    return f"its name, {named}, is a table's or a router's; name it in select" if named else ""


def _overlapping(reads: Mapping[str, list[Operand]], leaves: Mapping[str, Any]) -> dict[str, str]:
    """Parameters of which a part is read in two ways: one number cannot be rounded twice."""
    found = {}
    for path, operands in reads.items():
        if len(operands) > 1:
            shape = tuple(leaves[path].shape)
            times = np.zeros(np.prod(shape, dtype=np.int64), np.uint8)
            for operand in operands:
                times[operand.places(shape).reshape(-1)] += 1
            if times.max() > 1:
                found[path] = f"it is read in two ways: {operands[0]}; and {operands[1]}"
    return found


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter that could be a weight.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      d_in: input channels; 0 if it stays dense, as in the following.
      d_out: output channels.
      stack: sizes of the stacks that are scanned or indexed, () for none.
      experts: matrices that are batched; None for none.
      site: number of the input that it reads; kernels of one site share D.
      source: where in the user's code it is multiplied.
      dense: why it stays dense; "" if it is packed.
    """

    path: str
    shape: tuple[int, ...]
    d_in: int = 0
    d_out: int = 0
    stack: tuple[int, ...] = ()
    experts: int | None = None
    site: int | None = None
    source: str = ""
    dense: str = ""


class Table(tuple[Row, ...]):
    """Rows; printed, a table."""

    __slots__ = ()

    def __str__(self) -> str:
        head = ("path", "shape", "d_in", "d_out", "stack", "experts", "site", "where, or why dense")
        cells = [head]
        for row in self:
            shape = "x".join(map(str, row.shape))
            if row.dense:
                cells.append((row.path, shape, "", "", "", "", "", f"dense: {row.dense}"))
                continue
            experts = "" if row.experts is None else str(row.experts)
            stack = "x".join(map(str, row.stack))
            cells.append((
                row.path, shape, str(row.d_in), str(row.d_out), stack, experts, str(row.site),
                row.source,
            ))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(one, widths, strict=True)) for one in cells)
        return "\n".join(line.rstrip() for line in lines)


def table_of(call: Call, plan: Plan) -> Table:
    """The plan as rows, in the order of the parameters; a kernel that is read twice has two."""
    rows: dict[str, list[Row]] = {}
    for number, site in enumerate(plan.sites):
        for operand, source in zip(site.operands, site.sources, strict=True):
            stack = tuple(step[2] for step in operand.steps if step[0] == "at")
            rows.setdefault(operand.path, []).append(Row(
                operand.path, tuple(call.by_path[operand.path].shape), operand.d_in, operand.d_out,
                stack, operand.experts, number, source,
            ))  # fmt: skip
    for path, why in plan.dense.items():
        rows[path] = [Row(path, tuple(call.by_path[path].shape), dense=why)]
    return Table(row for path, _ in call.leaves for row in rows.get(path, ()))

"""Equations that meet a kernel and hold programs of their own, or a stack: loops, branches, slices.

What is observed in a loop's body is stacked over its steps for the kernels that the loop slices,
and summed for all others. In a branch that is not taken it is zero.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ttq_jax.functions.sites import Operand, Site, added
from ttq_jax.functions.trace import (
    Evaluator,
    Handler,
    Kernel,
    Product,
    called,
    opened,
    traced,
)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _origin(jaxpr: Any, var: Any) -> int | None:
    """The input of a jaxpr that this variable is, unchanged; None if it is computed."""
    inner = opened(jaxpr)[0]
    for i, known in enumerate(inner.invars):
        if known is var:
            return i
    for eqn in inner.eqns:
        at = next((i for i, known in enumerate(eqn.outvars) if known is var), None)
        if at is not None and (callee := called(eqn)) is not None:
            back = _origin(callee, opened(callee)[0].outvars[at])
            return None if back is None else _origin(inner, eqn.invars[back])
    return None


def _carried(
    ev: Evaluator, eqn: Any, body: Any, first: int, carry: list[Any]
) -> tuple[set[int], list[Any]]:
    """A loop's carry: which are kernels that the body hands on as they are, and all others' values.

    Args:
      ev: the evaluator.
      eqn: the loop.
      body: its jaxpr, whose inputs from `first` on are the carry.
      first: see `body`.
      carry: the first values.

    Returns:
      (indices of what is fixed, arrays of what is not).
    """
    inner, fixed, moving = opened(body)[0], set(), []
    for i, value in enumerate(carry):
        if isinstance(value, Kernel) and _origin(inner, inner.outvars[i]) == first + i:
            fixed.add(i)
            continue
        a = ev.dense(value, eqn, "a loop's carry that it changes")
        # It may begin with a literal, which has no type of its own.
        dtype = inner.invars[first + i].aval.dtype
        moving.append(a if isinstance(a, jax.Array) else jnp.asarray(a, dtype))
    return fixed, moving


def _filled(carry: list[Any], fixed: set[int], moving: list[Any]) -> list[Any]:
    """A whole carry: what is fixed, and what moves."""
    left = iter(moving)
    return [value if i in fixed else next(left) for i, value in enumerate(carry)]


def scan_parts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many its carry."""
    if "ft_in" in params:  # jax 0.12
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def _scan(ev: Evaluator, eqn: Any, vals: list[Any]) -> list[Any]:
    """A scan; kernels may be sliced by it, constants of it, or carried unchanged."""
    p, body = eqn.params, eqn.params["jaxpr"]
    n_consts, n_carry = scan_parts(p)
    consts, carry, xs = (
        vals[:n_consts],
        vals[n_consts : n_consts + n_carry],
        vals[n_consts + n_carry :],
    )
    fixed, start = _carried(ev, eqn, body, n_consts, carry)
    xs = [_sliceable(ev, eqn, x) for x in xs]
    ev.scans += 1
    number, handed_on = ev.scans, {}

    def step(moving: list[Any], at: tuple[Any, list[Any]]) -> tuple[Any, ...]:
        i, slices = at
        mine = [
            x.at(0, i, s, number) if isinstance(x, Kernel) else s
            for x, s in zip(xs, slices, strict=True)
        ]
        outs, kept = ev.scope(body, [*consts, *_filled(carry, fixed, moving), *mine])
        for j, out in enumerate(outs[n_carry:]):
            # NNX returns whole modules: a slice that comes out as it went in is the stack itself.
            same = [k for k, one in enumerate(mine) if one is out and isinstance(out, Kernel)]
            if same:
                handed_on[j], outs[n_carry + j] = same[0], None
        moved = [out for i, out in enumerate(outs[:n_carry]) if i not in fixed]
        moved = [ev.dense(out, eqn, "a loop's carry that it changes") for out in moved]
        ys = [ev.dense(out, eqn, "a loop's output") for out in outs[n_carry:]]
        return moved, ys, *_apart(ev, kept, number)

    slices = [(x.dense, x.uncast) if isinstance(x, Kernel) else x for x in xs]
    counted = (jnp.arange(p["length"], dtype=jnp.int32), slices)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), counted)
    shapes, again = traced(step, start, one)

    def summing(state: Any, at: Any) -> tuple[Any, Any]:
        moving, ys, stacked, summed = again(state[0], at)
        return (moving, added(state[1], summed)), (ys, stacked)

    how = {"length": p["length"], "reverse": p["reverse"], "unroll": p["unroll"]}
    (end, summed), (ys, stacked) = jax.lax.scan(summing, (start, _zeros(shapes[3])), counted, **how)
    ev.keep([*stacked, *summed])
    ys = [xs[handed_on[j]] if j in handed_on else y for j, y in enumerate(ys)]
    return [*_filled(carry, fixed, end), *ys]


def _sliceable(ev: Evaluator, eqn: Any, value: Any) -> Any:
    """A scan's operand, dense where the model itself has chosen a slice of it before."""
    if isinstance(value, Kernel) and None in value.scans:
        return ev.dense(value, eqn, "a scan over what a traced number chose")
    return value


def _apart(ev: Evaluator, kept: list[Any], scan: int) -> tuple[list[Any], list[Any]]:
    """What a scan stacks of what its body kept, and what it sums."""
    stacked: list[Any] = []
    summed: list[Any] = []
    for one in ev.end_scan(ev, kept, scan):
        if not isinstance(one, Site):
            stacked.append(one)
        elif one.scans[-1:] == (scan,):
            stacked.append(dataclasses.replace(one, scans=one.scans[:-1]))
        else:
            summed.append(one)
    return stacked, summed


def _while(ev: Evaluator, eqn: Any, vals: list[Any]) -> list[Any]:
    """A while loop; its condition is computed with dense values."""
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    asked, consts, carry = vals[:n], vals[n : n + m], vals[n + m :]
    body = p["body_jaxpr"]
    fixed, start = _carried(ev, eqn, body, m, carry)

    def step(moving: list[Any]) -> tuple[list[Any], list[Any]]:
        outs, kept = ev.scope(body, [*consts, *_filled(carry, fixed, moving)])
        outs = [
            ev.dense(out, eqn, "a loop's carry") for i, out in enumerate(outs) if i not in fixed
        ]
        return outs, kept

    shapes, again = traced(step, start)

    def summing(state: Any) -> Any:
        moving, kept = again(state[0])
        return moving, added(state[1], kept)

    def goes_on(state: Any) -> Any:
        values = [*asked, *_filled(carry, fixed, state[0])]
        plain = [ev.dense(v, eqn, "a loop's condition") for v in values]
        return ev.evaluate(p["cond_jaxpr"], plain)[0]

    end, kept = jax.lax.while_loop(goes_on, summing, (start, _zeros(shapes[1])))
    ev.keep(kept)
    return _filled(carry, fixed, end)


def _cond(ev: Evaluator, eqn: Any, vals: list[Any]) -> list[Any]:
    """Branches; what is observed in those that are not taken is zero."""
    index, *operands = vals
    plain = [v for v in operands if not isinstance(v, Kernel)]

    def branch(jaxpr: Any) -> Any:
        def run(plain: list[Any]) -> tuple[list[Any], list[Any]]:
            left = iter(plain)
            args = [v if isinstance(v, Kernel) else next(left) for v in operands]
            outs, kept = ev.scope(jaxpr, args)
            return [ev.dense(out, eqn, "a branch's output") for out in outs], kept

        return traced(run, plain)

    branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
    shapes = [kept for (_, kept), _ in branches]

    def with_zeros(i: int) -> Any:
        def run(plain: list[Any]) -> tuple[list[Any], list[Any]]:
            outs, kept = branches[i][1](plain)
            return outs, [kept if j == i else _zeros(s) for j, s in enumerate(shapes)]

        return run

    outs, kept = jax.lax.switch(index, [with_zeros(i) for i in range(len(branches))], plain)
    ev.keep(one for some in kept for one in some)
    return outs


def _dynamic_slice(ev: Evaluator, eqn: Any, vals: list[Any]) -> list[Any]:
    """One slice of a stack, chosen by a number that the program computes."""
    kernel, *starts = vals
    if not isinstance(kernel, Kernel):
        return ev.fallback(eqn, vals)
    shape, sizes = tuple(kernel.aval.shape), tuple(eqn.params["slice_sizes"])
    cut = [d for d, n in enumerate(shape) if sizes[d] < n]
    if len(starts) != len(shape) or len(cut) != 1 or sizes[cut[0]] != 1:
        return ev.fallback(eqn, vals)
    (axis,) = cut
    index = ev.clipped(starts[axis], shape[axis])
    dense = None if kernel.dense is None else ev.bind(eqn, [kernel.dense, *starts])[0]
    one = kernel.at(axis, index, (None, None), None)
    step = ("reshape", sizes, tuple(one.aval.shape))
    return [one.then((step,), eqn.outvars[0].aval, dense)]


def _ragged_dot(ev: Evaluator, eqn: Any, vals: list[Any]) -> list[Any]:
    """Rows sorted by expert, multiplied by a stack of experts."""
    x, kernel, *rest = vals
    d = eqn.params["ragged_dot_dimension_numbers"]
    plain = d.dot_dimension_numbers == (((1,), (1,)), ((), ()))
    plain = plain and tuple(d.rhs_group_dimensions) == tuple(d.lhs_ragged_dimensions) == (0,)
    if not plain or isinstance(x, Kernel) or not isinstance(kernel, Kernel) or len(rest) != 1:
        return ev.fallback(eqn, vals)
    operand = Operand(kernel.path, kernel.steps, tuple(kernel.aval.shape), (0,), (1,), (2,))
    key = ev.key(x, rest[0], "ragged")
    y = ev.hook(ev, Product(operand, kernel, x, key, ev.source(eqn), rest[0]))
    if y is None:
        return ev.fallback_product(eqn, vals)
    return [y.astype(eqn.outvars[0].aval.dtype)]


HANDLERS: dict[str, Handler] = {
    "scan": _scan, "while": _while, "cond": _cond, "dynamic_slice": _dynamic_slice,
    "ragged_dot_general": _ragged_dot, "ragged_dot": _ragged_dot,
}  # fmt: skip
"""By primitive."""

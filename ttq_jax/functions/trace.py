"""Any JAX function of a parameter tree, with the products of its parameters handed to a hook.

One idea makes a model of any library quantizable: its function is traced to a jaxpr with its
parameters dense in shape only, and the jaxpr is evaluated with a `Kernel` in the place of a
parameter. A kernel survives what only moves its numbers (a cast, a transposition, being a scan's
operand) and ends at a `dot_general`, which is where a model multiplies a weight, whoever wrote it.
This file and `control` are the only ones that read jaxprs, whose parameters JAX may rename.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun, jaxprs_in_params
from jax.extend.source_info_util import current_name_stack, summarize, user_context

from ttq_jax.errors import Error
from ttq_jax.functions.sites import Operand, Step, joined, moved

FLOATS = ("float32", "bfloat16", "float16")
"""What kernels and their inputs may be."""

FEWEST_CHANNELS = 8
"""A product over fewer input channels is no weight's: a norm's scale, multiplied axis by axis."""

_SAME = {
    "copy", "copy_p", "device_put", "layout_constraint", "name", "pvary", "sharding_constraint",
}  # fmt: skip
_VIEWS = {"convert_element_type", "expand_dims", "reshape", "squeeze", "transpose"}
_LIBRARIES, _FRAMES = (str(Path(flax.__file__).parent), str(Path(__file__).parent)), 20
_OPAQUE = {"pallas_call", "shard_map"}


class FunctionError(Error):
    """A use of a kernel that cannot be served."""


@dataclasses.dataclass(eq=False)
class Kernel:
    """A parameter on its way to its products.

    Attributes:
      path: of the leaf in the parameter tree.
      aval: shape and dtype after the steps.
      steps: what moved its numbers since.
      dense: its value after the steps, or None where only the packed one exists.
      uncast: the same without casts, which is what is rounded; None if there are none.
      packed: what stands for the leaf, or None.
      index: which slice of the stack is meant, int32[], one for each "at" among the steps.
      scans: for each of them the number of the scan that counts it, None for the model's own index.
    """

    path: str
    aval: Any
    steps: tuple[Step, ...] = ()
    dense: Any = None
    uncast: Any = None
    packed: Any = None
    index: tuple[Any, ...] = ()
    scans: tuple[int | None, ...] = ()

    def then(self, steps: tuple[Step, ...], aval: Any, dense: Any) -> "Kernel":
        """The kernel after some more steps, or after a cast."""
        uncast = self.uncast
        if uncast is None and aval.dtype != self.aval.dtype:
            uncast = self.dense
        if uncast is not None:
            uncast = functools.reduce(moved, steps, uncast)
        whole = joined(self.steps, steps)
        return dataclasses.replace(self, steps=whole, aval=aval, dense=dense, uncast=uncast)

    def at(self, axis: int, index: Any, values: tuple[Any, Any], scan: int | None) -> "Kernel":
        """One slice of a stack, without the axis; `values` are its dense and uncast ones."""
        shape, size = list(self.aval.shape), self.aval.shape[axis]
        del shape[axis]
        return dataclasses.replace(
            self, steps=(*self.steps, ("at", axis, size)),
            aval=jax.ShapeDtypeStruct(tuple(shape), self.aval.dtype), dense=values[0],
            uncast=values[1], index=(*self.index, index), scans=(*self.scans, scan),
        )  # fmt: skip


@dataclasses.dataclass
class Product:
    """One product with a kernel, as matrices.

    Attributes:
      operand: how it reads the kernel.
      kernel: the kernel.
      x: [*batch, *rows, d_in], the other side.
      key: equal for products whose x is one value, read in one way.
      source: where in the user's code.
      sizes: of a ragged product, how many rows each expert has, one expert after the other; else
        None.
    """

    operand: Operand
    kernel: Kernel
    x: Any
    key: tuple[Any, ...]
    source: str
    sizes: Any = None


# What is done with a product: y[*batch, *rows, d_out], or None for the user's own product.
Hook = Callable[["Evaluator", Product], Any]
Handler = Callable[["Evaluator", Any, list[Any]], list[Any]]
EndScan = Callable[["Evaluator", list[Any], int], list[Any]]


def source_of(eqn: Any) -> str:
    """Where in the user's code an equation comes from: "model.py:17 (Block.__call__)", or ""."""
    frames = summarize(eqn.source_info, _FRAMES).splitlines()[::-1]
    own = [frame for frame in frames if not frame.startswith(_LIBRARIES)] or frames
    found = re.fullmatch(r"(.*?):(\d+)(?::\d+)? \((.*)\)", own[0]) if own else None
    return f"{Path(found[1]).name}:{found[2]} ({found[3]})" if found else ""


def opened(jaxpr: Any) -> tuple[Any, list[Any]]:
    """(jaxpr, consts) of a closed or an open jaxpr; from jax 0.12 on there is only one kind."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def called(eqn: Any) -> Any:
    """The jaxpr that an equation calls once with all its operands; None for any other equation."""
    if eqn.primitive.name in _OPAQUE:
        return None
    inner = next(
        (eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params), None
    )
    if inner is None or len(opened(inner)[0].invars) != len(eqn.invars):
        return None
    return inner


def _layout(eqn: Any, shape: tuple[int, ...]) -> list[tuple[Step, ...]] | None:
    """For each output the steps of an equation that only moves a kernel's numbers; else None."""
    p, name = eqn.params, eqn.primitive.name
    out = tuple(eqn.outvars[0].aval.shape)
    if name in _SAME:
        return [()]
    if name == "convert_element_type":
        return [()] if str(p["new_dtype"]) in FLOATS else None
    if name == "transpose":
        return [(("transpose", tuple(p["permutation"])),)]
    if name in {"squeeze", "expand_dims"} or (name == "reshape" and p.get("dimensions") is None):
        return [(("reshape", out, shape),)]
    if name == "broadcast_in_dim":
        kept = tuple(out[d] for d in p["broadcast_dimensions"])
        same = kept == shape and np.prod(out, dtype=int) == np.prod(shape, dtype=int)
        return [(("reshape", out, shape),)] if same else None
    if name == "slice":
        strides = tuple(p["strides"] or (1,) * len(shape))
        return [(("slice", tuple(p["start_indices"]), tuple(p["limit_indices"]), strides),)]
    if name == "split":
        ends = np.cumsum(p["sizes"]).tolist()
        cuts = zip([0, *ends[:-1]], ends, strict=True)
        axis, zeros, ones = p["axis"], (0,) * len(shape), (1,) * len(shape)
        put = lambda base, n: (*base[:axis], n, *base[axis + 1 :])  # noqa: E731
        return [(("slice", put(zeros, a), put(shape, b), ones),) for a, b in cuts]
    return None


class Evaluator:
    """Evaluates jaxprs in which some values are kernels.

    Attributes:
      hook: what is done with a product.
      handlers: by primitive, equations that meet a kernel and need more than a step.
      kept: by key, the sites that the hook kept in the scope that is being evaluated.
      otherwise: by path, what else a kernel is used in than products.
      end_scan: what becomes of what a scan's body kept, before it is stacked or summed.
      depth: of scopes: the program, and bodies of loops and branches.
      calls: the equations whose jaxprs are being evaluated, the innermost last.
    """

    def __init__(
        self, hook: Hook, handlers: Mapping[str, Handler], end_scan: EndScan | None = None
    ):
        self.hook, self.handlers = hook, handlers
        self.end_scan: EndScan = end_scan or (lambda ev, kept, scan: kept)
        self.kept: dict[Any, Any] = {}
        self.otherwise: dict[str, str] = {}
        self.depth = 0
        self.calls: list[Any] = []
        self.scans = 0
        self.memo: dict[Any, Any] = {}

    def scope(self, jaxpr: Any, args: list[Any]) -> tuple[list[Any], list[Any]]:
        """Outputs of a jaxpr, and what was kept in it; no value of it is known outside."""
        before = self.kept, self.memo
        self.kept, self.memo, self.depth = {}, {}, self.depth + 1
        try:
            return self.evaluate(jaxpr, args), list(self.kept.values())
        finally:
            self.kept, self.memo = before
            self.depth -= 1

    def keep(self, values: Iterable[Any]) -> None:
        """Keeps what was kept in a scope that has ended."""
        self.kept |= {object(): value for value in values}

    def evaluate(self, jaxpr: Any, args: list[Any]) -> list[Any]:
        """Outputs of a jaxpr, kernels among them where it hands one on."""
        inner, consts = opened(jaxpr)
        names = (*getattr(inner, "constvars", ()), *inner.invars)
        env = dict(zip(names, (*consts, *args), strict=True))
        read = lambda v: v.val if isinstance(v, Literal) else env[v]  # noqa: E731
        for eqn in inner.eqns:
            vals = [read(v) for v in eqn.invars]
            with _as_written(eqn):
                meets = any(isinstance(v, Kernel) for v in vals)
                outs = self.with_kernels(eqn, vals) if meets else self.bind(eqn, vals)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in inner.outvars]

    def bind(self, eqn: Any, vals: list[Any]) -> list[Any]:
        """The equation as it is. A cast, a view or a number that is made again is one value."""
        key = None
        if _cheap(eqn):
            key = (eqn.primitive.name, str(eqn.params), *self.key(*map(_named, vals)))
            if key in self.memo:
                return self.memo[key]
        out = eqn.primitive.bind(*vals, **eqn.primitive.get_bind_params(eqn.params))
        outs = list(out) if eqn.primitive.multiple_results else [out]
        if key is not None:
            self.memo[key] = outs
        return outs

    def clipped(self, index: Any, size: int) -> Any:
        """A number within a stack, as `dynamic_slice` takes it."""
        key = ("clipped", size, *self.key(index))
        if key not in self.memo:
            self.memo[key] = jnp.clip(jnp.asarray(index, jnp.int32), 0, size - 1)
        return self.memo[key]

    def with_kernels(self, eqn: Any, vals: list[Any]) -> list[Any]:
        """An equation with kernels among its operands."""
        name, kernels = eqn.primitive.name, [v for v in vals if isinstance(v, Kernel)]
        if name == "optimization_barrier":
            return vals
        if name == "dot_general":
            return self._product(eqn, vals) if len(kernels) == 1 else self.fallback(eqn, vals)
        if len(vals) == 1:
            (kernel,) = kernels
            steps = _layout(eqn, tuple(kernel.aval.shape))
            if steps is not None:
                dense = [None] * len(steps)
                if kernel.dense is not None:
                    dense = self.bind(eqn, [kernel.dense])
                return [
                    kernel.then(s, v.aval, d)
                    for s, v, d in zip(steps, eqn.outvars, dense, strict=True)
                ]
        if name in self.handlers:
            return self.handlers[name](self, eqn, vals)
        inner = called(eqn)
        if inner is None:
            return self.fallback(eqn, vals)
        self.calls.append(eqn)
        try:
            return self.evaluate(inner, vals)
        finally:
            self.calls.pop()

    def source(self, eqn: Any) -> str:
        """Where in the user's code, of an equation or else of the call that it is in.

        A function that JAX has traced before, such as `jnp.take`, forgets who calls it.
        """
        places = (source_of(one) for one in (eqn, *reversed(self.calls)))
        return next(filter(None, places), "an unknown place")

    def fallback(self, eqn: Any, vals: list[Any], why: str = "") -> list[Any]:
        """The equation over the kernels' dense values."""
        return self.bind(eqn, [self.dense(v, eqn, why) for v in vals])

    def dense(self, value: Any, eqn: Any, why: str = "") -> Any:
        """A kernel's dense value, because of an equation that is no product; or any other value.

        Raises:
          FunctionError: it is packed.
        """
        if not isinstance(value, Kernel):
            return value
        name = eqn.primitive.name
        where = f"{why or name} at {self.source(eqn)}"
        if name in _OPAQUE:
            where = f"{where}: kernels of sharded code are not packed"
        if value.dense is None:
            raise FunctionError(
                f"{value.path} is packed for a product, but this function also uses it in {where}; "
                "leave it out of select"
            )
        self.otherwise.setdefault(value.path, where)
        return value.dense

    def _product(self, eqn: Any, vals: list[Any]) -> list[Any]:
        """A `dot_general` of a kernel and something else."""
        side = 0 if isinstance(vals[0], Kernel) else 1
        kernel, x = vals[side], vals[1 - side]
        (contract, batch), shape = eqn.params["dimension_numbers"], tuple(kernel.aval.shape)
        kc, xc = _by_axis(contract[side], contract[1 - side])
        kb, xb = _by_axis(batch[side], batch[1 - side])
        if np.prod([shape[d] for d in kc], dtype=int) < FEWEST_CHANNELS:
            return self.fallback(eqn, vals, f"a product over fewer than {FEWEST_CHANNELS} channels")
        if str(x.dtype) not in FLOATS:
            return self.fallback(eqn, vals, f"a product with {x.dtype}")
        kf = tuple(d for d in range(len(shape)) if d not in kc + kb)
        xf = tuple(d for d in range(x.ndim) if d not in xc + xb)
        sizes = lambda dims: tuple(x.shape[d] for d in dims)  # noqa: E731
        operand = Operand(kernel.path, kernel.steps, shape, kb, kc, kf)
        d_in = int(np.prod(sizes(xc), dtype=int))
        flat = jnp.transpose(x, (*xb, *xf, *xc)).reshape(*sizes(xb), *sizes(xf), d_in)
        dtype = eqn.outvars[0].aval.dtype
        if dtype == jnp.float32:
            # The sums are wanted as they are, not rounded to the type of narrower inputs.
            flat = flat.astype(dtype)
        product = Product(operand, kernel, flat, self.key(x, xb, xf, xc), self.source(eqn))
        y = self.hook(self, product)
        if y is None:
            return self.fallback_product(eqn, vals)
        y = y.reshape(*sizes(xb), *sizes(xf), *(shape[d] for d in kf))
        # As dot_general orders its axes: batched ones as given, then the left side's, the right's.
        n, m = len(xb), len(xf)
        order = [xb.index(d) for d in batch[1 - side]]
        rows, columns = range(n, n + m), range(n + m, y.ndim)
        y = jnp.transpose(y, (*order, *columns, *rows) if side == 0 else (*order, *rows, *columns))
        return [y.astype(dtype)]

    def fallback_product(self, eqn: Any, vals: list[Any]) -> list[Any]:
        """The user's own product, over the dense value."""
        return self.bind(eqn, [v.dense if isinstance(v, Kernel) else v for v in vals])

    def key(self, *parts: Any) -> tuple[Any, ...]:
        """A key that two products have in common if these parts are the same values."""
        named = tuple(part if isinstance(part, tuple | str) else id(part) for part in parts)
        self.memo["key", named] = parts  # alive, so that no other value gets its id
        return named


def _cheap(eqn: Any) -> bool:
    """Whether an equation makes a view, a cast, or one number."""
    if eqn.primitive.name in _VIEWS:
        return True
    numbers = eqn.outvars and not any(getattr(v.aval, "ndim", 1) for v in eqn.outvars)
    return bool(numbers) and not eqn.effects and not any(jaxprs_in_params(eqn.params))


def _named(value: Any) -> Any:
    """What tells a literal from others; a value is told by its identity."""
    if isinstance(value, jax.Array) or np.ndim(value):
        return value
    return (repr(value), str(getattr(value, "dtype", "")))


def _by_axis(kernel: Any, other: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Paired axes of both sides, in the order of the kernel's: one reading has one description."""
    pairs = sorted(zip(map(int, kernel), map(int, other), strict=True))
    return tuple(k for k, _ in pairs), tuple(x for _, x in pairs)


@contextmanager
def _as_written(eqn: Any) -> Iterator[None]:
    """The equation's own context: its traceback, scopes for profilers, the mesh."""
    info = eqn.source_info
    stack = current_name_stack() + info.name_stack
    with user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def traced(fun: Callable[..., Any], *args: Any) -> tuple[Any, Callable[..., Any]]:
    """A function traced once.

    Args:
      fun: of pytrees.
      *args: its arguments, or their shapes.

    Returns:
      Shapes of its outputs, and a function that computes them without tracing `fun` again.
    """
    jaxpr, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    run, structure = jaxpr_as_fun(jaxpr), jax.tree.structure(shapes)
    return shapes, lambda *args: jax.tree.unflatten(structure, run(*jax.tree.leaves(args)))

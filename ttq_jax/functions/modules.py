"""Flax NNX: a module as a function of its parameters. Linen's `model.apply` is one already."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx

from ttq_jax.errors import expect
from ttq_jax.functions.trace import FunctionError


def functional(
    module: nnx.Module, method: Callable[..., Any] | None = None
) -> tuple[Callable[..., Any], Any, Any]:
    """An NNX module as a function.

    Args:
      module: stays as it is.
      method: called with the module and the arguments, such as `Model.encode`; None calls the
        module.

    Returns:
      (fn, params, rest): `fn(params, rest, *args)` gives (what the module returns, the rest
      afterwards). `rest` is all state that is no `nnx.Param`: caches, counters, random streams.

    Raises:
      FunctionError: a parameter is a hijax variable.
      Error: no module.
    """
    expect("module", module, nnx.Module, "an nnx.Module (Linen: pass model.apply to read itself)")
    graph, params, rest = _split(module)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        refuse_hijax(path_of(path), leaf)

    def fn(params: Any, rest: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        # Variables of this trace: NNX's own transformations take no others.
        merged = nnx.merge(graph, *jax.tree.map(lambda a: a, (params, rest)))
        out = merged(*args, **kwargs) if method is None else method(merged, *args, **kwargs)
        return out, _split(merged)[2]

    return fn, params, rest


def _split(module: nnx.Module) -> tuple[Any, Any, Any]:
    """(graph, parameters, the rest)."""
    parts: Any = nnx.split(module, nnx.Param, ...)
    return parts


def refuse_hijax(path: str, leaf: Any) -> None:
    """Refuses a variable that is a leaf by itself.

    Args:
      path: of the leaf.
      leaf: of a parameter tree.

    Raises:
      FunctionError: it is one.
    """
    if isinstance(leaf, nnx.Variable) or type(leaf).__name__ in {
        "HijaxVariable",
        "AbstractVariable",
    }:
        raise FunctionError(
            f"{path} is a hijax variable: modules made under nnx.var_defaults(hijax=True) are not "
            "served; make them without"
        )


def refuse_module(fn: Any) -> None:
    """Refuses a module in the place of its function.

    Args:
      fn: what `read` and its like were given.

    Raises:
      FunctionError: it is one.
    """
    if isinstance(fn, linen.Module | nnx.Module):
        instead = "model.apply" if isinstance(fn, linen.Module) else "fn of ttq.functional(model)"
        raise FunctionError(
            f"fn: expected a function whose first argument is the parameters, got the module "
            f"{type(fn).__name__}; pass {instead}"
        )


def path_of(keys: tuple[Any, ...]) -> str:
    """A leaf's path in words: "layers/0/q/kernel"; without the ".value" of NNX's variables."""
    if keys and getattr(keys[-1], "name", None) in {"value", "raw_value"}:
        keys = keys[:-1]
    parts = []
    for key in keys:
        found = (getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name))
        parts.append(str(next(found, key)))
    return "/".join(parts)

"""The one door to Pallas' Triton backend, which jax has deprecated since 0.11 and will remove.

Kernels import the backend from here: on a jax without it they still import, and `refusal` gives the
reason for which something else serves.

jax warns once for every kernel, and not when a kernel is called but when the program around it is
lowered, out of reach of the caller. So a call is a primitive of its own that lowers to the kernel,
and silences that one warning meanwhile. In its place `ttq kernels` prints `NOTICE`, once.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:
    plgpu: Any = None  # type: ignore[no-redef]

NOTICE: str | None = None
"""What a user of Triton kernels should know; None on a jax that has not deprecated them."""
if jax.version.__version_info__ >= (0, 11):
    NOTICE = (
        "jax will remove the backend that compiles the triton kernels; on a jax without it, XLA or "
        "Mosaic GPU computes, and this list says why"
    )


def refusal(chip: str | None) -> str | None:
    """Why no Triton kernel runs, whatever the problem.

    Args:
      chip: Short name of the GPU, None if unknown.

    Returns:
      The reason, None if they run.
    """
    if plgpu is None:
        return (
            f"jax {jax.__version__} has no Pallas Triton backend, jax 0.10.2 to 0.12 have one "
            "(pip install 'jax<0.13')"
        )
    if chip == "t4":
        # What XLA's compiler answers.
        return "XLA compiles Triton kernels for compute capability 8.0 and up, a T4 has 7.5"
    return None


_kernel_p = Primitive("triton_kernel")
_kernel_p.multiple_results = True


@_kernel_p.def_abstract_eval
def _outputs(*_: Any, jaxpr: Any) -> Any:
    return jaxpr.out_avals


@_kernel_p.def_impl
def _run(*operands: Any, jaxpr: Any) -> Any:
    return jax.jit(functools.partial(_kernel_p.bind, jaxpr=jaxpr))(*operands)


def _lower(ctx: Any, *operands: Any, jaxpr: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The Pallas Triton backend is deprecated", DeprecationWarning
        )
        return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *operands)


mlir.register_lowering(_kernel_p, _lower)


def pallas_call(kernel: Any, *, interpret: bool, **kind: Any) -> Callable[..., Any]:
    """`pl.pallas_call` by the Triton backend, without jax's warning.

    Args:
      kernel: The kernel's body.
      interpret: Runs on the CPU, for tests.
      **kind: The other arguments of `pl.pallas_call`.

    Returns:
      A function of the operands.
    """
    call = pl.pallas_call(kernel, interpret=interpret, **kind)
    return call if interpret else quietly(call)


def quietly(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls Triton kernels, without jax's warning.

    Args:
      call: Takes and returns trees of arrays.

    Returns:
      The same function.
    """

    def run(*operands: Any) -> Any:
        jaxpr, shapes = jax.make_jaxpr(call, return_shape=True)(*operands)
        outputs = _kernel_p.bind(*jax.tree.leaves(operands), jaxpr=jaxpr)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return run


def _map(operands: Any, axes: Any, *, jaxpr: Any) -> Any:
    """Of one call over many: Pallas adds an axis to the kernel's grid."""
    outputs = quietly(jax.vmap(jaxpr_as_fun(jaxpr), tuple(axes)))(*operands)
    return outputs, [0] * len(outputs)


batching.primitive_batchers[_kernel_p] = _map

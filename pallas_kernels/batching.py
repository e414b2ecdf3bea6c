"""What vmap and grad do to a kernel: map it without copying a weight, refuse a gradient.

Pallas' own batching rule does not cover kernels whose operands are indexed by a prefetched layer,
and XLA's would not see that the weights of a batch are one longer stack. Here, over operands
``(stacks, layer, rest)``:

    only activations batched      the batch becomes rows (the kernel's own `fold`)
    anything else                 one call after the other; batched stacks [B, L, ...] are seen as
                                  [B * L, ...] and the layer counts on
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

Call = Callable[[Any, Any, Any], Any]
"""``(stacks, layer, rest) -> outputs``: weights with a leading layer axis, int32[], the others."""


def _any(tree: Any) -> bool:
    return any(jax.tree.leaves(tree))


def _axes(batched: Any) -> Any:
    return jax.tree.map(lambda b: 0 if b else None, batched)


def _all_batched(out: Any) -> Any:
    return jax.tree.map(lambda _: True, out)


def _serial(call: Call, size: int, batched: Any, stacks: Any, layer: Any, rest: Any) -> Any:
    """One call per element of the batch, in a loop."""
    stacked, layer_batched, rest_batched = batched
    if _any(stacked):
        depth = jax.tree.leaves(stacks)[0].shape[1 if jax.tree.leaves(stacked)[0] else 0]

        def merge(a: Any, is_batched: bool) -> Any:
            a = a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(size * depth, *a.shape[2:])

        stacks = jax.tree.map(merge, stacks, stacked)
        layer = layer + depth * jnp.arange(size, dtype=jnp.int32)
        layer_batched = True
    leaves, structure = jax.tree.flatten((layer, rest))
    which = jax.tree.leaves((layer_batched, rest_batched))

    def one(mapped: list[Any]) -> Any:
        left = iter(mapped)
        whole = [next(left) if b else a for a, b in zip(leaves, which, strict=True)]
        return call(stacks, *jax.tree.unflatten(structure, whole))

    return jax.lax.map(one, [a for a, b in zip(leaves, which, strict=True) if b])


def mapped(
    call: Call, *, name: str, native: Callable[[], bool], fold: Callable[..., Any] | None = None
) -> Call:
    """Gives a kernel call its meaning under vmap and grad.

    Args:
      call: the kernel, everything static bound.
      name: of the public function, for messages.
      native: whether JAX's own batching serves (plain XLA).
      fold: ``(call, stacks, layer, rest) -> outputs`` for batched `rest` alone, or None.

    Returns:
      The same call.
    """
    batchable = custom_vmap(call)

    @batchable.def_vmap
    def rule(size: int, batched: Any, stacks: Any, layer: Any, rest: Any) -> Any:
        again = mapped(call, name=name, native=native, fold=fold)
        if native():
            out = jax.vmap(call, in_axes=_axes(tuple(batched)))(stacks, layer, rest)
        elif fold is not None and not _any(batched[:2]) and all(jax.tree.leaves(batched[2])):
            out = fold(again, stacks, layer, rest)
        else:
            out = _serial(again, size, batched, stacks, layer, rest)
        return out, _all_batched(out)

    @jax.custom_jvp
    def guarded(stacks: Any, layer: Any, rest: Any) -> Any:
        return batchable(stacks, layer, rest)

    @guarded.defjvp
    def no_gradient(primals: Any, tangents: Any) -> Any:
        raise TypeError(
            f"{name} has no gradient: a packed weight is made to be read. Differentiate the dense "
            "model, or one whose weights were dequantized (pallas_kernels.dequantize)"
        )

    return guarded

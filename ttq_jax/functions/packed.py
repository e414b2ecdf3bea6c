"""What stands in a parameter's place: packed weights, one for each way in which it is read."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ttq_jax.experts import gather_tokens, of_own_experts, routed_linear, sort_by_expert
from ttq_jax.functions.sharding import of_experts
from ttq_jax.functions.sites import Operand, Site, moved
from ttq_jax.functions.trace import FunctionError, Product
from ttq_jax.linear import dense_weight, linear
from ttq_jax.partition import EXPERTS, Split
from ttq_jax.quant.convert import quantize_site
from ttq_jax.quant.lowrank import truncated_svd
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.source import blend
from ttq_jax.types import Leaf, LowRank, Moments, QuantizedLinear, model_bits


@struct.dataclass
class PackedKernel:
    """A parameter whose products read packed weights; run its function with `run`.

    `views[i]` serves `operands[i]`. Its arrays have a leading axis for each "at" among the
    operand's steps, and one for experts.

    Attributes:
      views: packed weights.
      rows: float32, for each view how many rows its moments were of; 0 is an expert that none
        reached, which was rounded as if its channels were alike.
      operands: how they are read.
      shape: of the parameter.
      dtype: of the parameter.
    """

    views: tuple[QuantizedLinear, ...]
    rows: tuple[Leaf, ...]
    operands: tuple[Operand, ...] = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)

    def find(self, operand: Operand) -> QuantizedLinear:
        """The packed weight for one way of reading.

        Raises:
          FunctionError: it was not packed for that.
        """
        for view, known in zip(self.views, self.operands, strict=True):
            if known == operand:
                return view
        packed_for = "; ".join(map(str, self.operands))
        raise FunctionError(
            f"{operand.path} was packed for {packed_for}, but here it is read as {operand}; "
            "observe the function that will decode as well"
        )

    def _refuse(self, *_: Any) -> Any:
        path = self.operands[0].path
        raise TypeError(f"{path} is packed and no array; run its function with ttq.run(fn)")

    __getitem__ = __jax_array__ = __array__ = __matmul__ = __rmatmul__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = _refuse

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a packed parameter has no {name!r}, for it is no array; run its function with "
            "ttq.run(fn)"
        )


def is_packed(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is packed."""
    return isinstance(leaf, PackedKernel)


def effective_bits(packed: Any) -> float:
    """Stored bits per weight of the packed parameters, everything counted.

    `ttq_jax.types.model_bits` counts the dense ones too, and `stored_bytes` gives bytes.

    Args:
      packed: a tree with packed parameters, or its shapes.

    Returns:
      Mean stored bits per weight.
    """
    leaves = jax.tree.leaves(packed, is_leaf=is_packed)
    return model_bits({"": [leaf.views for leaf in leaves if is_packed(leaf)]})


def dense_tree(params: Any, packed: Any) -> Any:
    """The dense parameters that a packed tree stands for, to compare with; made on the host.

    Args:
      params: the dense tree that was packed.
      packed: what `read` or `quantize` made of it.

    Returns:
      The dense tree with every packed parameter replaced by exactly what its products read.
    """

    def one(w: Any, leaf: Any) -> Any:
        if not is_packed(leaf):
            return w
        out = np.array(w)
        for view, operand in zip(leaf.views, leaf.operands, strict=True):
            values = np.asarray(dense_weight(view)).astype(out.dtype)
            out.reshape(-1)[operand.places(out.shape).reshape(-1)] = values.reshape(-1)
        return jnp.asarray(out)

    return jax.tree.map(one, params, packed, is_leaf=is_packed)


def quantized(
    site: Site,
    weights: list[Any],
    recipe: Recipe,
    prior: Moments | None,
    static: list[LowRank] | None,
    splits: tuple[Split | None, ...],
) -> list[PackedKernel]:
    """A site's kernels, each packed for its one operand.

    Args:
      site: with moments.
      weights: the leaves that its operands read, in their order.
      recipe: how.
      prior: of the same site; None without.
      static: low-rank parts, stacked as the moments are; None where the recipe has none, or where
        they are made here.
      splits: how the devices of a mesh share each weight; None on one device.

    Returns:
      In the same order.

    Raises:
      FunctionError: the devices of a mesh share the experts of one otherwise than another's.
    """
    dealt = of_experts(site.operands, splits)
    kinds = tuple(operand.kind for operand in site.operands)
    of = (site.moments, prior, static)
    views = _quantized(weights, of, kinds=kinds, recipe=recipe, splits=splits, dealt=dealt)
    rows = site.moments.count
    return [
        PackedKernel((view,), (rows,), (operand,), tuple(w.shape), str(w.dtype))
        for view, operand, w in zip(views, site.operands, weights, strict=True)
    ]


@partial(jax.jit, static_argnames=("kinds", "recipe", "splits", "dealt"))
def _quantized(
    weights: list[Any], of: tuple[Any, ...], *, kinds: tuple[Operand, ...], recipe: Recipe,
    splits: tuple[Split | None, ...], dealt: Split | None,
) -> list[QuantizedLinear]:  # fmt: skip
    """One packed weight for each kind."""
    one = partial(_matrices, recipe=recipe, splits=splits)
    made = each_matrix(one, weights, of, kinds, dealt)
    return made if dealt is None else [dataclasses.replace(w, split=dealt) for w in made]


def each_matrix(
    one: Callable[[Any], Any], weights: list[Any], of: Any, kinds: tuple[Operand, ...],
    dealt: Split | None = None,
) -> Any:  # fmt: skip
    """A function of the matrices that products read, through their steps one stack after the other.

    Args:
      one: of ([a matrix for each kind], what there is of them).
      weights: the leaves.
      of: arrays with a leading axis for each stack, and one for experts.
      kinds: how each leaf is read; their stacks are alike.
      dealt: how the devices of a mesh share the experts.

    Returns:
      What it gives, with the same leading axes.
    """
    steps = [kind.steps for kind in kinds]

    def through(ws: list[Any], of: Any, done: list[int]) -> Any:
        ws, done, stacked = list(ws), list(done), False
        for i, kind_steps in enumerate(steps):
            for step in kind_steps[done[i] :]:
                ws[i], done[i] = moved(ws[i], step), done[i] + 1
                if step[0] == "at":
                    stacked = True
                    break
        if stacked:
            return jax.lax.map(lambda at: through(at[0], at[1], done), (ws, of))
        matrices = [kind.matrix(w) for kind, w in zip(kinds, ws, strict=True)]
        if kinds[0].experts is None:
            return one((matrices, of))
        return of_own_experts(partial(jax.lax.map, one), dealt, (matrices, of))

    return through(weights, of, [0] * len(kinds))


def _matrices(
    at: tuple[list[Any], tuple[Any, ...]], recipe: Recipe, splits: tuple[Split | None, ...]
) -> list[QuantizedLinear]:
    """Plain matrices that read one input, by the same code as our own decoder's."""
    matrices, (moments, prior, static) = at
    weights = {str(i): w for i, w in enumerate(matrices)}
    moments = blend(moments, prior, recipe.source)
    if rank := 0 if static else recipe.low_rank.rank:
        source = moments if prior is None else prior
        power = source.mean_power(2.0) if recipe.low_rank.weighted else None
        static = [truncated_svd(w, rank, power) for w in matrices]
    factors = dict(zip(weights, static or [], strict=False))
    reads = moments if recipe.source.of != "none" else None
    shared = dict(zip(weights, splits, strict=True))
    packed = quantize_site(weights, reads, recipe, factors, splits=shared)[1]
    return [packed[name] for name in weights]


def multiplied(product: Product) -> Any:
    """The product with a packed kernel: y[*batch, *rows, d_out]."""
    kernel, operand, x = product.kernel, product.operand, product.x
    packed = kernel.packed.find(operand)
    index = kernel.index
    if operand.experts is not None and product.sizes is None:
        packed = _sliced(packed, index)
        rows = x.reshape(operand.experts, -1, operand.d_in)
        y = of_own_experts(jax.vmap(linear), packed.split, rows, packed)
        return y.reshape(*x.shape[:-1], operand.d_out)
    if index:
        packed = _sliced(packed, index[:-1]).at(index[-1])
    return _linear(x, packed) if product.sizes is None else _by_expert(x, product.sizes, packed)


def _sliced(packed: QuantizedLinear, index: Any) -> QuantizedLinear:
    """A slice of a stack of stacks."""
    for i in index:
        at = partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
        packed = jax.tree.map(at, packed)
    return packed


def _by_expert(x: Any, sizes: Any, packed: QuantizedLinear) -> Any:
    """Rows that are sorted by expert already; those of no expert give zeros."""
    n = sizes.shape[0]
    expert, real = experts_of(x, sizes)
    routed, place = sort_by_expert(x, expert[:, None], real, n)
    split = EXPERTS if packed.split is None else packed.split
    rows = routed_linear(routed, {"kernel": {"kernel": packed}}, split)["kernel"]
    return gather_tokens(rows, place, jnp.ones(place.shape, jnp.float32)).astype(x.dtype)


def experts_of(x: Any, sizes: Any) -> tuple[Any, Any]:
    """For each row of a ragged product its expert, and whether it has one."""
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)
    expert = jnp.sum(rows[:, None] >= ends[None], axis=1, dtype=jnp.int32)
    return jnp.minimum(expert, sizes.shape[0] - 1), rows < ends[-1]


# One program for every product of a kind: an unrolled model asks for it at each of its layers.
_linear = jax.jit(linear)

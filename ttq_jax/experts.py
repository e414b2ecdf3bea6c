"""Mixtures of experts: activations sorted by expert, and products that read routed experts only.

A layer's rows (a token at each of its experts) are sorted by expert and cut into blocks that each
belong to one expert, padded to whole blocks. A product is then a loop over blocks, each an ordinary
`linear` with a weight that is indexed in its stack: the packed kernels serve experts as they are,
and an expert that no token chose is never read. `jax.lax.ragged_dot` would not do: but for TPUs,
XLA computes it as one product with all experts, and it takes no packed weight.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Split
from ttq_jax.host import on_host, slab_of
from ttq_jax.linear import linear
from ttq_jax.partition import EXPERTS, kernel_specs
from ttq_jax.types import Leaf, MixedLinear, Params, QuantizedLinear, Stacked

# Rows that share one reading of a weight; with more, most blocks would be padding.
_MOST_ROWS = 128


@struct.dataclass
class Routed:
    """Activations sorted by expert, in N blocks of R rows.

    Attributes:
      rows: [N, R, d]; zeros where there is no token.
      token: int32[N, R]; each row's token, counted over the batch; the number of tokens for none.
      expert: int32[N]; whose rows the block holds.
      first: int32[E + 1]; expert e has the blocks first[e] to first[e + 1] - 1. Those from first[E]
        on are empty.
    """

    rows: Leaf
    token: Leaf
    expert: Leaf
    first: Leaf

    @property
    def n_experts(self) -> int:
        """E."""
        return len(self.first) - 1

    def real(self, valid: Bool[Array, "*batch"]) -> Bool[Array, "N R"]:
        """Which rows are of a token that is `valid`."""
        return valid.reshape(-1).at[self.token].get(mode="fill", fill_value=False)


def rows_per_block(pairs: int, n_experts: int) -> int:
    """How many rows a block has: about an expert's share, and one while experts outnumber rows.

    Args:
      pairs: rows in all, one for each token at each of its experts.
      n_experts: E.

    Returns:
      A power of two.
    """
    rows = 1
    while rows < min(pairs / n_experts, _MOST_ROWS):
        rows *= 2
    return rows


def sort_by_expert(
    x: Float[Array, "M d"], chosen: Int[Array, "M k"], valid: Bool[Array, " M"], n_experts: int
) -> tuple[Routed, Int[Array, "M k"]]:
    """Sorts tokens by the experts they go to.

    Args:
      x: the tokens' activations.
      chosen: each token's experts.
      valid: which tokens are real; the others go nowhere.
      n_experts: E.

    Returns:
      The sorted rows, and the place of each token's rows among all N·R; past the end for padding.
    """
    n_tokens, per_token = chosen.shape
    pairs = n_tokens * per_token
    size = rows_per_block(pairs, n_experts)
    # At worst every expert's last block has one row.
    n_blocks = min(pairs, (pairs + n_experts * (size - 1)) // size)
    expert = jnp.where(valid[:, None], chosen, n_experts).reshape(-1)
    counts = jnp.zeros(n_experts + 1, jnp.int32).at[expert].add(1)[:-1]
    first = jnp.cumulative_sum(-(-counts // size), include_initial=True, dtype=jnp.int32)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    before = jnp.cumulative_sum(counts, include_initial=True, dtype=jnp.int32)
    by_expert = expert[order]
    rank = jnp.arange(pairs, dtype=jnp.int32) - before[by_expert]
    slot = jnp.where(by_expert < n_experts, first[by_expert] * size + rank, n_blocks * size)
    place = jnp.zeros(pairs, jnp.int32).at[order].set(slot)
    token = jnp.full(n_blocks * size, n_tokens, jnp.int32)
    token = token.at[slot].set(order // per_token, mode="drop").reshape(n_blocks, size)
    blocks = jnp.arange(n_blocks, dtype=jnp.int32)
    owner = jnp.sum(first[None, 1:] <= blocks[:, None], axis=1, dtype=jnp.int32)
    rows = x.at[token].get(mode="fill", fill_value=0)
    routed = Routed(rows, token, jnp.minimum(owner, n_experts - 1), first)
    return routed, place.reshape(chosen.shape)


def gather_tokens(
    rows: Float[Array, "N R d"], place: Int[Array, "M k"], weight: Float[Array, "M k"]
) -> Float[Array, "M d"]:
    """The weighted sum of each token's rows.

    Args:
      rows: what the experts made of them.
      place: from `sort_by_expert`.
      weight: of each token's experts.

    Returns:
      float32; zeros for tokens that went nowhere.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    mine = flat.at[place].get(mode="fill", fill_value=0).astype(jnp.float32)
    return jnp.sum(mine * weight[..., None], axis=1)


def for_each_expert(make: Callable[..., Any], operands: Any, n_experts: int | None = None) -> Any:
    """Makes something of every expert of a layer, one after another.

    Args:
      make: (expert's index, its operands) -> arrays.
      operands: stacked over the experts.
      n_experts: E; None for a layer without experts, whose index is None.

    Returns:
      The results, stacked over the experts.
    """
    if n_experts is None:
        return make(None, operands)
    experts = jnp.arange(n_experts, dtype=jnp.int32)
    return jax.lax.map(lambda at: make(*at), (experts, operands))


def for_own_experts(
    make: Callable[..., Any], operands: Any, stacks: Any, n_experts: int | None = None
) -> Any:
    """`for_each_expert` of weights: on a mesh, every device makes it of its own experts.

    Args:
      make: (expert's index, its index in the stacks, its operands, the stacks) -> arrays.
      operands: see `for_each_expert`.
      stacks: dense weights, stacked over layers and experts.
      n_experts: see `for_each_expert`.

    Returns:
      See `for_each_expert`.
    """
    if n_experts is None:
        return make(None, None, operands, stacks)
    here = EXPERTS.here()
    axes = here.experts if here else ()

    def run(operands: Any, stacks: Any) -> Any:
        first, count = _own(axes, n_experts)
        at = (jnp.arange(count, dtype=jnp.int32), operands)
        return jax.lax.map(lambda at: make(first + at[0], *at, stacks), at)

    if here is None:
        return run(operands, stacks)
    own = P(axes or None)
    specs = (own, jax.tree.map(lambda _: P(None, axes or None), stacks))
    return jax.shard_map(run, in_specs=specs, out_specs=own, check_vma=False)(operands, stacks)


def of_own_experts(run: Callable[..., Any], split: Split | None, *trees: Any) -> Any:
    """A function of all experts of a layer; on a mesh, of every device's own.

    Args:
      run: of trees of arrays [E, …]; it gives another one, expert by expert.
      split: how the devices share the experts; None leaves it to XLA's partitioner.
      *trees: what it takes.

    Returns:
      What it gives.
    """
    here = None if split is None else split.here()
    if here is None:
        return run(*trees)
    own = P(here.experts or None)
    mapped = jax.shard_map(run, mesh=here.mesh, in_specs=own, out_specs=own, check_vma=False)
    return mapped(*trees)


def _own(axes: tuple[str, ...], n_experts: int) -> tuple[Any, int]:
    """The first of a device's own experts, and how many these are."""
    if not axes:
        return jnp.zeros((), jnp.int32), n_experts
    count = n_experts // jax.lax.axis_size(axes)
    return jax.lax.axis_index(axes).astype(jnp.int32) * count, count


def _merged(stack: Any) -> Any:
    """Arrays [L, E, …] as [L·E, …]."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stack)


def of_expert(kernel: Any, expert: Int[Array, ""]) -> Any:
    """One expert's weight among a layer's, for `linear`; nothing large is copied.

    Args:
      kernel: a layer's, as `at_layer` gives it, or [E, d_in, d_out] dense or packed.
      expert: its index.

    Returns:
      What `linear` takes.
    """
    if isinstance(kernel, MixedLinear):
        n_experts = kernel.stacks[0].planes[0].shape[1]
        slots = kernel.slot[:, None] * n_experts + jnp.arange(n_experts, dtype=jnp.int32)[None]
        return MixedLinear(
            _merged(kernel.stacks), jnp.repeat(kernel.which, n_experts), slots.reshape(-1),
            kernel.layer * n_experts + expert,
        )  # fmt: skip
    if isinstance(kernel, QuantizedLinear):
        chosen = kernel.at(expert)
        if kernel.layer is None:
            return chosen
        planes, scales, zeros = _merged((kernel.planes, kernel.scales, kernel.zeros))
        at = kernel.layer * kernel.planes[0].shape[1] + expert
        return dataclasses.replace(chosen, planes=planes, scales=scales, zeros=zeros, layer=at)
    if isinstance(kernel, Stacked):
        at = kernel.layer * kernel.kernels.shape[1] + expert
        return Stacked(_merged(kernel.kernels), at)
    return Stacked(kernel, expert)


def _on_device(kernel: Any) -> Any:
    """A layer's experts; those in the host's memory are fetched together."""
    if isinstance(kernel, Stacked) and on_host(kernel.kernels):
        return Stacked(slab_of(kernel.kernels, kernel.layer), jnp.zeros((), jnp.int32))
    return kernel


def routed_linear(
    x: Routed, weights: dict[str, Params], split: Split = EXPERTS
) -> dict[str, Float[Array, "N R d_out"]]:
    """Each block's product with its expert's weights.

    On a mesh every device multiplies the blocks of its own experts, and the results are added: the
    others' are zeros.

    Args:
      x: sorted activations.
      weights: by projection, {"kernel"}: all experts of one layer.
      split: how the devices share them.

    Returns:
      By projection, the rows' outputs.
    """
    kernels = {name: w["kernel"] for name, w in weights.items()}
    if len(x.expert) >= x.n_experts:
        # There are blocks for all experts: each is fetched once, not for each of its blocks.
        kernels = {name: _on_device(kernel) for name, kernel in kernels.items()}
    here = split.here()
    if here is None:
        return _products(x, kernels, ())
    specs = (P(), kernel_specs(kernels, here, (None, here.experts or None)))
    run = partial(_products, axes=here.experts)
    mapped = jax.shard_map(run, mesh=here.mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return mapped(x, kernels)


def _products(x: Routed, kernels: dict[str, Any], axes: tuple[str, ...]) -> dict[str, Array]:
    """`routed_linear` on one device, whose experts are its share over these mesh axes."""
    begin, count = _own(axes, x.n_experts)

    def product(rows: Array, expert: Array) -> dict[str, Array]:
        return {name: linear(rows, of_expert(w, expert)) for name, w in kernels.items()}

    def empty(rows: Array, expert: Array) -> dict[str, Array]:
        shapes = jax.eval_shape(product, rows, expert)
        return {n: jnp.zeros(s.shape, s.dtype) for n, s in shapes.items()}

    def block(_: None, at: tuple[Array, Array, Array]) -> tuple[None, dict[str, Array]]:
        used, rows, expert = at
        # A block of one row is a token's own: only padding would leave it empty.
        if len(rows) == 1 and not axes:
            return None, product(rows, expert)
        return None, jax.lax.cond(used, product, empty, rows, expert)

    used = jnp.arange(len(x.expert), dtype=jnp.int32) < x.first[-1]
    expert = x.expert
    if axes:
        expert = x.expert - begin
        used = used & (expert >= 0) & (expert < count)
    ys = jax.lax.scan(block, None, (used, x.rows, expert))[1]
    return jax.lax.psum(ys, axes) if axes else ys

"""The pytrees that are passed between the stages.

Shapes use the legend of `ttq_jax/__init__.py`. In a layer-stacked tree each array has one more
leading axis `L`; the static fields always describe a single layer. So the body of a `lax.scan` over
the layers gets exactly the object that is documented here.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels import Split
from ttq_jax.host import layer_of

Params = dict[str, Any]

# A field of a pytree: an array, or what stands for one while JAX transforms the tree.
Leaf = Any


# The observation sites of a block, and the projections that read each one's activations.
SITES: dict[str, tuple[str, ...]] = {
    "attn_in": ("q", "k", "v"),
    "attn_out": ("o",),
    "mlp_in": ("gate", "up"),
    "mlp_out": ("down",),
}

# Those of the feed-forward layer, of which a mixture of experts has several.
EXPERT_SITES = ("mlp_in", "mlp_out")

SITE_OF = {name: site for site, names in SITES.items() for name in names}


@struct.dataclass
class Prompts:
    """A batch of tokenized prompts, padded to one length on either side.

    Attributes:
      tokens: int32[B, T]; values in the padding have no effect.
      valid: bool[B, T]; True where a token is real. The real tokens of a row are contiguous.
    """

    tokens: Leaf
    valid: Leaf


@struct.dataclass
class Moments:
    """Power sums of a linear layer's input channels: a commutative monoid under `+`.

    A corpus, a prompt, a batch and a conversation are all sums of these. Any `scaled(0)` is the
    identity.

    Attributes:
      sums: float32[P, d_in]; row j is Σ |x|^powers[j] over the observed tokens.
      count: float32[]; number of observed tokens.
      gram: float32[n_block, b, b] or None; Σ x xᵀ within each of n_block runs of b consecutive
        channels, the last one padded with zeros. One block is the whole Gram matrix; a prior
        from the weights knows only the diagonal, b = 1.
      first: float32[d_in] or None; Σ x, with signs.
      powers: the P exponents, each > 0.
    """

    sums: Leaf
    count: Leaf
    gram: Leaf = None
    first: Leaf = None
    powers: tuple[float, ...] = struct.field(pytree_node=False, kw_only=True)

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both sets of tokens together.

        Raises:
          ValueError: the two do not hold the same powers and Gram blocks.
        """
        if self.holds() != other.holds():
            raise ValueError(
                f"moments: expected two of one kind, got {self.holds()}, and {other.holds()}; "
                "observe both with the same reads (Recipe.reads)"
            )
        return jax.tree.map(jnp.add, self, other)

    def holds(self) -> str:
        """What was observed, in words."""
        blocks = "no Gram matrix"
        if self.gram is not None:
            blocks = "Gram blocks of {1}x{2}".format(*self.gram.shape[-3:])
        first = "" if self.first is None else ", sums of x"
        return f"powers {self.powers}{first} and {blocks}"

    def scaled(self, factor: jax.Array | float) -> "Moments":
        """The moments as if every token had been read `factor` times, factor >= 0."""
        return jax.tree.map(lambda a: a * factor, self)

    def mean_power(self, p: float) -> jax.Array:
        """E[|x|^p] per channel.

        Args:
          p: one of `powers`.

        Returns:
          float32[d_in]; zeros if nothing was observed.

        Raises:
          ValueError: `p` was not observed.
        """
        if p not in self.powers:
            raise ValueError(f"these moments hold powers {self.powers}, not {p}")
        row = self.sums[..., self.powers.index(p), :]
        return row / jnp.maximum(self.count, 1.0)[..., None]


@struct.dataclass
class LowRank:
    """A low-rank correction: the matrix `down @ up` of its `factors()`.

    In the method's symbols (y = W x with W[d_out, d_in]), `down` is Aᵀ and `up` is Bᵀ.

    Attributes:
      down: [d_in, r].
      up: [r, d_out].
      down_scale: [r], a scale per column if `down` is int8; None if it is floating point.
      up_scale: [r], a scale per row if `up` is int8; None if it is floating point.
    """

    down: Leaf
    up: Leaf
    down_scale: Leaf = None
    up_scale: Leaf = None

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """(down, up) in floating point; products are rounded, whatever they are fused with."""
        if self.down_scale is None:
            return self.down, self.up

        def times(codes: jax.Array, scale: jax.Array) -> jax.Array:
            exact = codes.astype(jnp.float32) * scale.astype(jnp.float32)
            to = jnp.finfo(scale.dtype)
            return jax.lax.reduce_precision(exact, to.nexp, to.nmant).astype(scale.dtype)

        down = times(self.down, self.down_scale[..., None, :])
        return down, times(self.up, self.up_scale[..., :, None])


@struct.dataclass
class Offline:
    """What a recipe needs besides the prompt, stacked over the layers.

    Attributes:
      moments: per site, a corpus's moments or a prior's; {} for recipes that read neither.
      carried: per site, the moments of a conversation so far; {} at its first turn.
      low_rank: per projection, static factors; {} for none.
      packed: the whole tree, if it is quantized already and prefill quantizes nothing; else None.
      head: the packed tables of the vocabulary, see `quant.head`; None for dense ones.
    """

    moments: dict[str, Leaf] = struct.field(default_factory=dict)
    carried: dict[str, Leaf] = struct.field(default_factory=dict)
    low_rank: dict[str, Leaf] = struct.field(default_factory=dict)
    packed: Leaf = None
    head: Leaf = None


@struct.dataclass
class QuantizedLinear:
    """A packed weight.

    It stands for exactly this matrix, W[d_in, d_out]:

        W[i, j] = scales[g, j] · (codes[i, j] − zeros[g, j]) / channel_scale[i]
                  + (A B)[i, j],   (A, B) = low_rank.factors(),   g = i // group_size

    where `codes = unpack(planes)`, the zero point is 2^(bits−1) if `zeros` is None, the channel
    scale is 1 if None and the low-rank term 0 if None. On a mesh whose devices have blocks of rows,
    each of the row_blocks is packed by itself: `unpack` is then of every block's planes, one block
    after another. Coded scales are columns[j] · codes[g, j]
    of `pallas_kernels.CodedScales`, the zero points beside them count in 2^(bits−8); `CodedPairs`
    have both. Rows from d_in up to n_group · group_size are padding: their inputs are zeros.

    Attributes:
      planes: uint8 bit planes of the codes, see `pallas_kernels.layout`.
      scales: [n_group, d_out], positive; an array, `CodedScales` or `CodedPairs`.
      zeros: [n_group, d_out], uint8 beside `CodedScales`; None if symmetric or in `CodedPairs`.
      channel_scale: D, [d_in], positive, or None.
      low_rank: the low-rank correction that is added, or None.
      layer: None for a single layer; else int32[], its index: planes, scales and zeros then have
        a leading axis over all layers.
      bits: 2, 3, 4, 5 or 8.
      group_size: rows of one column that share a scale; a multiple of 8.
      d_in: input channels, before padding.
      d_out: output channels.
      split: how the devices of a mesh share it; None on one device, or for whole ones.
      row_blocks: equal runs of rows that are packed by themselves.
    """

    planes: tuple[Leaf, ...]
    scales: Leaf
    zeros: Leaf
    channel_scale: Leaf
    low_rank: Leaf
    layer: Leaf = None
    bits: int = struct.field(pytree_node=False, kw_only=True)
    group_size: int = struct.field(pytree_node=False, kw_only=True)
    d_in: int = struct.field(pytree_node=False, kw_only=True)
    d_out: int = struct.field(pytree_node=False, kw_only=True)
    split: Split | None = struct.field(pytree_node=False, kw_only=True, default=None)
    row_blocks: int = struct.field(pytree_node=False, kw_only=True, default=1)

    def at(self, layer: jax.Array) -> "QuantizedLinear":
        """One layer of a stack. The large arrays stay stacked; a kernel indexes them.

        Args:
          layer: int32[], its index.

        Returns:
          The same stack with `layer` set; channel scale and factors are sliced.
        """
        small = jax.tree.map(lambda a: layer_of(a, layer), (self.channel_scale, self.low_rank))
        return dataclasses.replace(self, channel_scale=small[0], low_rank=small[1], layer=layer)


@struct.dataclass
class MixedLinear:
    """A projection whose layers have different widths: one stack per width.

    Attributes:
      stacks: packed weights, each stacked over the layers that have its width.
      which: int32[L]; per layer, the index of its stack.
      slot: int32[L]; per layer, its index within that stack.
      layer: int32[], the index of the current layer; None before one is chosen.
    """

    stacks: tuple[QuantizedLinear, ...]
    which: Leaf
    slot: Leaf
    layer: Leaf = None


@struct.dataclass
class Stacked:
    """A dense kernel, given as a stack and a layer's index so that it need not be copied.

    Attributes:
      kernels: [L, d_in, d_out]; may be in the host's memory.
      layer: int32[], its index.
    """

    kernels: Leaf
    layer: Leaf

    @property
    def kernel(self) -> jax.Array:
        """The kernel, [d_in, d_out]; XLA copies it unless it can fuse the slice with its use.

        Of a stack in the host's memory it is fetched to the device.
        """
        return layer_of(self.kernels, self.layer)


@struct.dataclass
class EightBits:
    """Keys or values in eight bits: scales[..., None] · codes.

    Attributes:
      codes: int8[..., H], from -127 to 127.
      scales: float32[...], >= 0, one for each head of each token.
    """

    codes: Leaf
    scales: Leaf


@struct.dataclass
class Cache:
    """The KV cache: keys and values of the tokens read so far.

    Validity and causality follow from `positions` and `valid`, not from the slot number, so padding
    may be on either side.

    Attributes:
      k: [L, B, S, K, H], rotated; an array or `EightBits`.
      v: [L, B, S, K, H], likewise.
      positions: int32[B, S]; each slot's position in its sequence.
      valid: bool[B, S]; False for padding and for slots not yet written.
      used: slots written so far; int32[], the same for every row, or int32[B].
    """

    k: Leaf
    v: Leaf
    positions: Leaf
    valid: Leaf
    used: Leaf


def at_layer(layers: Params, layer: jax.Array) -> Params:
    """One layer of a stacked block tree; the large arrays stay in their stacks.

    A scan that slices its operands copies each weight before a kernel can read it. Here the
    weights of the linear layers are passed whole, with the layer's index; the kernels read their
    blocks from the stack. Norms, biases, channel scales and factors are sliced.

    Args:
      layers: the tree's "layers" entry, stacked.
      layer: int32[], its index.

    Returns:
      The layer's tree, with `Stacked` for dense kernels and `layer` set in the others.
    """
    at = lambda a: layer_of(a, layer)  # noqa: E731

    def one(kernel: Any) -> Any:
        if isinstance(kernel, QuantizedLinear):
            return kernel.at(layer)
        if isinstance(kernel, MixedLinear):
            return dataclasses.replace(kernel, layer=layer)
        return Stacked(kernel, layer)

    return {
        name: {k: one(a) if k == "kernel" else jax.tree.map(at, a) for k, a in leaf.items()}
        for name, leaf in layers.items()
    }


def _leaf_sizes(leaf: Any) -> tuple[int, int]:
    """(stored bytes, number of weights) of one kernel, dense or packed."""
    stored = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(leaf))
    if isinstance(leaf, MixedLinear):
        return stored, sum(_leaf_sizes(stack)[1] for stack in leaf.stacks)
    if isinstance(leaf, QuantizedLinear):
        layers = math.prod(leaf.planes[0].shape[:-2])
        return stored, layers * leaf.d_in * leaf.d_out
    return stored, math.prod(leaf.shape)


def leaf_bits(kernel: Any) -> float:
    """Stored bits per weight of one projection, dense or packed, everything counted."""
    stored, weights = _leaf_sizes(kernel)
    return 8 * stored / weights


def kernels(layers: Params) -> dict[str, Any]:
    """The linear layers' weights of a (stacked) block tree, by name.

    Args:
      layers: the tree's "layers" entry.

    Returns:
      {"q": kernel, …}; a kernel is an array [L, d_in, d_out] or a QuantizedLinear.
    """
    return {name: leaf["kernel"] for name, leaf in layers.items() if "kernel" in leaf}


def stored_bytes(tree: Any) -> int:
    """Bytes of every array in a tree, packed ones at their packed size."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def effective_bits(params: Params) -> float:
    """Effective bits per weight over all linear layers of the blocks.

    Everything stored is counted: codes, padding, scales, zero points, channel scales and low-rank
    factors. Biases, norms, the embedding and the head are not weights of these layers and are left
    out. Only shapes and dtypes matter, so trees of `jax.eval_shape` work too.

    Args:
      params: a model's parameter tree, dense, packed or mixed.

    Returns:
      Mean stored bits per weight.
    """
    sizes = [_leaf_sizes(leaf) for leaf in kernels(params["layers"]).values()]
    return 8 * sum(s for s, _ in sizes) / sum(n for _, n in sizes)


def model_bits(params: Params) -> float:
    """Stored bits per parameter of the whole model: the embedding, head and norms count too.

    Args:
      params: as of `effective_bits`.

    Returns:
      Mean stored bits per parameter.
    """
    leaves = jax.tree.leaves(
        params, is_leaf=lambda leaf: isinstance(leaf, QuantizedLinear | MixedLinear)
    )
    sizes = [_leaf_sizes(leaf) for leaf in leaves]
    return 8 * sum(s for s, _ in sizes) / sum(n for _, n in sizes)

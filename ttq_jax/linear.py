"""The one dispatch on how a weight is stored: every product of a model goes through it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import Split, dequantize, pack, packed_matmul, unpack
from ttq_jax.types import MixedLinear, QuantizedLinear, Stacked


def linear(
    x: Float[Array, "*batch d_in"],
    w: Float[Array, "d_in d_out"] | Stacked | QuantizedLinear | MixedLinear,
    bias: Float[Array, " d_out"] | None = None,
) -> Float[Array, "*batch d_out"]:
    """Y = x·W (+ bias), however W is stored; accumulated in float32, returned in x's dtype.

    For a packed weight the channel scale divides the activation vector and never touches the
    codes: y = Q(W·D)·(x / D) + B(A x) (arXiv:2603.19296).

    Args:
      x: activations.
      w: a dense kernel or a packed one.
      bias: added to y, or None.

    Returns:
      The layer's output.
    """
    if isinstance(w, MixedLinear):
        return _mixed(x, w, bias)
    if isinstance(w, QuantizedLinear):
        y = packed_matmul(
            x, w.planes, w.scales, w.zeros, w.channel_scale,
            None if w.low_rank is None else w.low_rank.factors(),
            bits=w.bits, group_size=w.group_size, layer=w.layer, split=split_of(w),
        )  # fmt: skip
    else:
        kernel = w.kernel if isinstance(w, Stacked) else w
        y = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return add_bias(y, bias).astype(x.dtype)


def scores(x: Float[Array, "*batch d_in"], w: QuantizedLinear) -> Float[Array, "*batch d_out"]:
    """Y = x·W as `linear`, but float32 whatever x is: what a choice or a loss is made from.

    Args:
      x: activations.
      w: a packed weight without a channel scale and factors.

    Returns:
      The sums as they are.
    """
    return packed_matmul(
        x, w.planes, w.scales, w.zeros, bits=w.bits, group_size=w.group_size,
        out_dtype=jnp.float32, split=split_of(w),
    )  # fmt: skip


def split_of(w: QuantizedLinear) -> Split | None:
    """How the devices of this program's mesh share a packed weight; None for one device.

    Args:
      w: the weight.

    Returns:
      Its split, with the axes that there are.

    Raises:
      ValueError: its rows are packed in other blocks than the devices have.
    """
    split = None if w.split is None else w.split.here()
    blocks = 1 if split is None else split.row_blocks
    if blocks != w.row_blocks:
        raise ValueError(
            f"a packed weight: expected rows in {blocks} blocks, as many as the devices that share "
            f"them, got {w.row_blocks}; use it on the mesh that it was packed on, or save and load "
            "it with that of this model"
        )
    return split


def repacked(w: QuantizedLinear, row_blocks: int) -> QuantizedLinear:
    """The same weight with its rows packed in another number of blocks; pure and jittable.

    Args:
      w: packed; may be stacked over layers.
      row_blocks: divides the weight's groups.

    Returns:
      The packed weight.
    """

    def blocks(plane: Array) -> Array:
        *lead, _, n = plane.shape
        return plane.reshape(*lead, w.row_blocks, -1, n)

    codes = unpack([blocks(plane) for plane in w.planes], bits=w.bits)
    codes = codes.reshape(*w.planes[0].shape[:-2], -1, codes.shape[-1])
    planes = pack(codes, bits=w.bits, row_blocks=row_blocks)
    return dataclasses.replace(w, planes=planes, row_blocks=row_blocks)


def columns(w: QuantizedLinear, at: Int[Array, "*batch"]) -> Float[Array, "*batch d_in"]:
    """Some columns of `dense_weight`; only they are unpacked.

    Args:
      w: a packed weight of one layer, without a channel scale and factors.
      at: which columns, in range.

    Returns:
      float32.
    """
    flat = at.reshape(-1)
    taken = jax.tree.map(lambda a: jnp.take(a, flat, axis=-1, mode="clip"), w)
    return dense_weight(taken).T.reshape(*at.shape, w.d_in)


def _mixed(x: Array, w: MixedLinear, bias: Array | None) -> Array:
    """The product with the stack that holds this layer."""

    def with_stack(stack: QuantizedLinear, x: Array, slot: Array) -> Array:
        return linear(x, stack.at(slot), bias)

    branches = [partial(with_stack, stack) for stack in w.stacks]
    return jax.lax.switch(w.which[w.layer], branches, x, w.slot[w.layer])


def add_bias(
    y: Float[Array, "*batch d_out"], bias: Float[Array, " d_out"] | None
) -> Float[Array, "*batch d_out"]:
    """Y + bias in float32; y itself without one."""
    if bias is None:
        return y
    return y.astype(jnp.float32) + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)


def dense_weight(w: QuantizedLinear) -> Float[Array, "*layers d_in d_out"]:
    """The matrix that a packed weight stands for, see `QuantizedLinear`.

    Args:
      w: packed; may be stacked over layers.

    Returns:
      float32[..., d_in, d_out].
    """
    dense = dequantize(
        w.planes, w.scales, w.zeros, bits=w.bits, group_size=w.group_size, row_blocks=w.row_blocks
    )
    dense = dense[..., : w.d_in, :]
    if w.channel_scale is not None:
        dense = dense / w.channel_scale.astype(jnp.float32)[..., :, None]
    if w.low_rank is not None:
        down, up = (factor.astype(jnp.float32) for factor in w.low_rank.factors())
        dense = dense + jnp.matmul(down, up, precision="highest")
    return dense

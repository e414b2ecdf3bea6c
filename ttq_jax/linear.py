"""The single dispatch on what a weight is: all that a model ever multiplies goes through here."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dequantize, packed_matmul
from ttq_jax.types import QuantizedLinear


def linear(
    x: Float[Array, "*batch d_in"],
    w: Float[Array, "d_in d_out"] | QuantizedLinear,
    bias: Float[Array, "d_out"] | None = None,
) -> Float[Array, "*batch d_out"]:
    """Y = x·W (+ bias), whatever W is stored as; accumulated in float32, returned in x's dtype.

    For a packed weight the channel scale divides the activation vector and never touches the
    codes: y = Q(W·D)·(x / D) + B(A x) (arXiv:2603.19296).

    Args:
      x: activations.
      w: a dense kernel or a packed one.
      bias: added to y, or None.

    Returns:
      The layer's output.
    """
    if isinstance(w, QuantizedLinear):
        y = _packed(x, w)
    else:
        y = jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    if bias is not None:
        y = y + bias
    return y.astype(x.dtype)


def _packed(x: Array, w: QuantizedLinear) -> Array:
    """The packed product, float32."""
    scaled = x.astype(jnp.float32)
    if w.channel_scale is not None:
        scaled = scaled / w.channel_scale.astype(jnp.float32)
    padding = w.scales.shape[-2] * w.group_size - w.d_in
    scaled = jnp.pad(scaled, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    y = packed_matmul(
        scaled, w.planes, w.scales, w.zeros, bits=w.bits, group_size=w.group_size
    ).astype(jnp.float32)
    if w.low_rank is not None:
        down, up = w.low_rank.down.astype(x.dtype), w.low_rank.up.astype(x.dtype)
        inner = jnp.matmul(x, down, preferred_element_type=jnp.float32).astype(x.dtype)
        y = y + jnp.matmul(inner, up, preferred_element_type=jnp.float32)
    return y


def dense_weight(w: QuantizedLinear) -> Float[Array, "*layers d_in d_out"]:
    """The matrix that a packed weight stands for, by the formula in its docstring.

    Args:
      w: packed; may be stacked over layers.

    Returns:
      float32[..., d_in, d_out].
    """
    dense = dequantize(w.planes, w.scales, w.zeros, bits=w.bits, group_size=w.group_size)
    dense = dense[..., : w.d_in, :]
    if w.channel_scale is not None:
        dense = dense / w.channel_scale.astype(jnp.float32)[..., :, None]
    if w.low_rank is not None:
        down = w.low_rank.down.astype(jnp.float32)
        dense = dense + jnp.matmul(down, w.low_rank.up.astype(jnp.float32))
    return dense

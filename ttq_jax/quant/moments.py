"""Activation moments: a linear layer's inputs, reduced to sums over tokens.

TTQ (arXiv:2603.19296) observes them on the prompt; AWQ (Lin et al., 2023) and GPTQ (Frantar et al.,
2022), on a calibration corpus. The code is the same for both.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ttq_jax.experts import Routed
from ttq_jax.types import Moments


@dataclasses.dataclass(frozen=True)
class Reads:
    """The moments of a layer's inputs that a recipe reads.

    Attributes:
      powers: exponents p > 0 of Σ |x|^p, ascending.
      span: channels per block of the Gram matrix Σ x xᵀ: 0 for none of it, -1 for all of it.
      first: whether Σ x is read.
    """

    powers: tuple[float, ...] = ()
    span: int = 0
    first: bool = False

    def block(self, d_in: int) -> int:
        """Channels per Gram block, 0 for none: never more than the layer has, padded."""
        whole = -(-d_in // 8) * 8
        return whole if self.span == -1 else min(self.span, whole)


def observe(
    x: Float[Array, "*batch T d_in"], valid: Bool[Array, "*batch T"], reads: Reads
) -> Moments:
    """Sums over the real tokens' activations; padding is left out.

    Args:
      x: activations entering a linear layer.
      valid: True where a token is real.
      reads: what is summed.

    Returns:
      float32 moments over all leading axes.
    """
    d_in, block = x.shape[-1], reads.block(x.shape[-1])
    # Selected, not multiplied: 0 · inf in a padding row would be NaN.
    seen = jnp.where(valid[..., None], x.astype(jnp.float32), 0.0).reshape(-1, d_in)
    size = jnp.abs(seen)
    rows = [jnp.sum(jnp.square(seen) if p == 2 else size**p, axis=0) for p in reads.powers]
    sums = jnp.stack(rows) if rows else jnp.zeros((0, d_in), jnp.float32)
    gram = None
    if block:
        blocks = jnp.pad(seen, ((0, 0), (0, -d_in % block))).reshape(len(seen), -1, block)
        gram = jnp.einsum("tbi,tbj->bij", blocks, blocks, precision="highest")
    first = jnp.sum(seen, axis=0) if reads.first else None
    return Moments(sums, jnp.sum(valid, dtype=jnp.float32), gram, first, powers=reads.powers)


def observe_expert(
    x: Array | Routed, valid: Bool[Array, "B T"], reads: Reads, expert: Int[Array, ""] | None
) -> Moments:
    """`observe` of the tokens that one expert gets.

    Args:
      x: activations entering a linear layer.
      valid: True where a token is real; of the tokens before they were sorted.
      reads: what is summed.
      expert: which; None for activations that are not sorted by expert.

    Returns:
      float32 moments; those of no token if the expert gets none.
    """
    if not isinstance(x, Routed):
        return observe(x, valid, reads)
    assert expert is not None, "sorted activations are one expert's or another's"
    rows, real = x.rows, x.real(valid)

    def add(block: Array, total: Moments) -> Moments:
        return total + observe(rows[block], real[block], reads)

    nothing = observe(rows[0], jnp.zeros_like(real[0]), reads)
    return jax.lax.fori_loop(x.first[expert], x.first[expert + 1], add, nothing)


def mean_input(moments: Moments) -> Float[Array, " d_in"]:
    """E[x] per channel.

    Args:
      moments: of one layer, with the sums of x.

    Returns:
      float32; zeros if nothing was observed.

    Raises:
      ValueError: the sums of x were not observed.
    """
    if moments.first is None:
        raise ValueError(f"moments: expected sums of x, got {moments.holds()}")
    return moments.first / jnp.maximum(moments.count, 1.0)


def about_mean(moments: Moments) -> Moments:
    """The moments with variances in place of E[x²].

    The Gram matrix stays that of x: the difference of two large ones is no longer positive, and
    what reads it knows the mean from it.

    Args:
      moments: of one layer, with the sums of x. Powers other than 2 stay those of x.

    Returns:
      Moments of as many tokens. A variance is at least a millionth of E[x²]: below that the
      difference is rounding.
    """
    square = moments.count * jnp.square(mean_input(moments))
    rows = [
        jnp.maximum(row - square, 1e-6 * row) if p == 2 else row
        for p, row in zip(moments.powers, moments.sums, strict=True)
    ]
    return dataclasses.replace(moments, sums=jnp.stack(rows) if rows else moments.sums)


def p_mean(moments: Moments, p: float) -> Float[Array, " d_in"]:
    """The p-mean (E|x|^p)^(1/p) of each channel: the p-norm, made independent of prompt length.

    Args:
      moments: holding power `p`.
      p: 1 gives the mean magnitude (AWQ), 2 the root mean square (TTQ).

    Returns:
      float32[d_in], >= 0; zeros if nothing was observed.
    """
    return moments.mean_power(p) ** (1.0 / p)


def gram_blocks(moments: Moments, block: int) -> Float[Array, "n_block block block"]:
    """E[x xᵀ] within runs of `block` channels.

    Args:
      moments: with Gram blocks of this size, or with the whole matrix.
      block: channels per block.

    Returns:
      float32; rows of channels beyond the layer's width are zeros.

    Raises:
      ValueError: these moments hold neither.
    """
    gram = moments.gram
    if gram is not None and gram.shape[-3] == 1 and gram.shape[-1] > block:
        whole = jnp.pad(gram[0], [(0, -gram.shape[-1] % block)] * 2)
        n = whole.shape[0] // block
        gram = jnp.einsum("ibic->ibc", whole.reshape(n, block, n, block))
    if gram is None or gram.shape[-1] != block:
        raise ValueError(
            f"moments: expected Gram blocks of {block}x{block}, got {moments.holds()}; observe "
            "with the recipe's own reads (Recipe.reads)"
        )
    return gram / jnp.maximum(moments.count, 1.0)

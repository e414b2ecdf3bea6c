"""A prior without data: a layer's activation statistics, estimated from the model's own weights.

A normed vector has power g² per channel, g the norm's scale. White noise of that power, sent
through the block's own weights, gives the power of the values that attention mixes and of the
gated units (of each expert's, where there are experts). Only the profile over the channels matters:
`quant.source.blend` scales it to the prompt. It is less accurate than a corpus and costs nothing.

An expert that no token of a prompt (or corpus) reached has no moments. Every recipe that reads
moments takes this prior for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ttq_jax.config import ModelConfig
from ttq_jax.host import fetched, on_host
from ttq_jax.linear import dense_weight
from ttq_jax.models.layers import ACTIVATIONS
from ttq_jax.quant.moments import Reads
from ttq_jax.quant.source import seen_or
from ttq_jax.types import EXPERT_SITES, Moments, Params, QuantizedLinear


@partial(jax.jit, static_argnames=("config", "reads"))
def prior_from_weights(params: Params, *, config: ModelConfig, reads: Reads) -> dict[str, Moments]:
    """The profile of every site's inputs, as moments of one token.

    Args:
      params: a dense tree.
      config: the model's.
      reads: what the recipe reads; of a Gram matrix only the diagonal is estimated, and kept as
        blocks of one channel.

    Returns:
      Per site, moments stacked over the layers, and over the experts where there are any.
    """
    layers = params["layers"]
    attn_in, mlp_in = _block_inputs(config, params)
    values = _through(attn_in, layers["v"])
    heads = values.reshape(len(values), config.n_kv_heads, -1)
    attn_out = jnp.repeat(heads, config.n_heads // config.n_kv_heads, axis=1)
    mlp_out = _through(mlp_in, layers["up"])
    if config.gated:
        mlp_out = mlp_out * _activated(config, _through(mlp_in, layers["gate"]))
    else:
        mlp_out = _activated(config, mlp_out)
    if config.n_experts:
        shape = (config.n_layers, config.n_experts, config.d_model)
        mlp_in = jnp.broadcast_to(mlp_in[:, None], shape)
    power = {
        "attn_in": attn_in,
        "attn_out": attn_out.reshape(len(values), -1),
        "mlp_in": mlp_in,
        "mlp_out": mlp_out,
    }
    one = partial(_moments, reads=reads)
    return {site: _over(p.ndim - 1, one)(p) for site, p in power.items()}


def for_unreached(
    params: Params, moments: dict[str, Moments], *, config: ModelConfig, reads: Reads
) -> dict[str, Moments]:
    """Moments with this prior for experts that have none.

    Args:
      params: a dense tree.
      moments: of a corpus or a prior, per site; {} for a recipe that reads neither.
      config: the model's.
      reads: what the recipe reads.

    Returns:
      The moments. Without any, the prior of the sites that have experts.
    """
    if not config.n_experts or reads == Reads():
        return moments
    profile = prior_from_weights(params, config=config, reads=reads)
    if not moments:
        return {site: profile[site] for site in EXPERT_SITES}
    return _filled(moments, profile)


@jax.jit
def _filled(moments: dict[str, Moments], profile: dict[str, Moments]) -> dict[str, Moments]:
    return {
        site: _over(one.count.ndim, seen_or)(one, profile[site]) for site, one in moments.items()
    }


def _over(axes: int, of_one: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one layer (and expert), over all of them."""
    return of_one if axes == 0 else jax.vmap(_over(axes - 1, of_one))


def _block_inputs(
    config: ModelConfig, params: Params
) -> tuple[Float[Array, "L D"], Float[Array, "L D"]]:
    """The power of what attention and the feed-forward layer read."""
    after = "_post_norm" if config.norm_placement == "branch" else "_norm"
    layers = params["layers"]
    attn, mlp = (_norm_power(config, layers[name + after]) for name in ("attn", "mlp"))
    if config.norm_placement == "post":
        # The norm comes last: attention reads the output of the previous layer's last norm.
        return jnp.roll(mlp, 1, axis=0), attn
    if config.norm_placement == "branch":
        # Both read the residual stream: the embedding and all that was added to it before.
        table = params["embed"]["embedding"]
        packed = isinstance(table, QuantizedLinear)
        table = dense_weight(table).T if packed else table.astype(jnp.float32)
        start = jnp.mean(jnp.square(table), axis=0) * config.embed_scale**2
        added = config.residual_scale**2 * jnp.stack([attn, mlp], axis=1).reshape(-1, len(start))
        before = jnp.cumulative_sum(added, axis=0, include_initial=True)[:-1]
        stream = start[None] + before
        return stream[0::2], stream[1::2]
    return attn, mlp


def _norm_power(config: ModelConfig, norm: Params) -> Float[Array, "L D"]:
    scale = norm["scale"].astype(jnp.float32)
    power = jnp.square(1.0 + scale if config.norm == "rms_plus_one" else scale)
    return power + jnp.square(norm["bias"].astype(jnp.float32)) if "bias" in norm else power


def _through(power: Float[Array, "L d_in"], leaf: Params) -> Float[Array, "L *E d_out"]:
    """The power of white noise after a projection."""
    stack = leaf["kernel"]
    if stack.ndim == 4 or on_host(stack):
        how = "i,eio->eo" if stack.ndim == 4 else "i,io->o"

        def layer(at: tuple[Array, Array]) -> Array:
            kernel = jnp.square(fetched(at[1]).astype(jnp.float32))
            return jnp.einsum(how, at[0], kernel, precision="highest")

        # One layer at a time: in float32 the squares of all experts would take much memory.
        out = jax.lax.map(layer, (power, stack))
    else:
        kernel = jnp.square(stack.astype(jnp.float32))
        out = jnp.einsum("li,lio->lo", power, kernel, precision="highest")
    if stack.ndim == 4:
        return out
    return out + jnp.square(leaf["bias"].astype(jnp.float32)) if "bias" in leaf else out


def _activated(config: ModelConfig, power: Float[Array, "L *E F"]) -> Float[Array, "L *E F"]:
    """E[act(z)²] of z ~ N(0, power), by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    z = jnp.sqrt(power)[..., None] * jnp.asarray(nodes, jnp.float32).reshape(*[1] * power.ndim, -1)
    mean = jnp.asarray(weights / weights.sum(), jnp.float32)
    return jnp.matmul(jnp.square(ACTIVATIONS[config.activation](z)), mean, precision="highest")


def _moments(power: Float[Array, " d_in"], *, reads: Reads) -> Moments:
    """Moments of one token with this power per channel."""
    rows = [power ** (p / 2) for p in reads.powers]
    sums = jnp.stack(rows) if rows else jnp.zeros((0, len(power)), jnp.float32)
    gram = power[:, None, None] if reads.span else None
    # White noise has a mean of 0.
    first = jnp.zeros_like(power) if reads.first else None
    return Moments(sums, jnp.ones((), jnp.float32), gram, first, powers=reads.powers)

"""What a small model predicts, and how the likelihood of its own drawn labels changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits


@functools.partial(jax.jit, static_argnames="config")
def predictions(config, params, tokens):
    """Log-probabilities at every token."""
    cache = empty_cache(config, 1, len(tokens), jnp.float32)
    hidden, _, _ = forward(config, params, tokens[None], jnp.ones((1, len(tokens)), bool), cache)
    return jax.nn.log_softmax(logits(config, params, hidden[0]))


def slope(config, params, tokens, key, name, change):
    """The change of the labels' log-likelihood with a projection's weights, by central difference.

    The labels are those that `sensitivities` draws with the key.
    """
    drawn = jax.random.split(key, 1)[0]
    labels = jax.random.categorical(drawn, predictions(config, params, tokens))

    def likelihood(shift):
        layers = dict(params["layers"])
        layers[name] = {"kernel": layers[name]["kernel"] + shift}
        found = predictions(config, {**params, "layers": layers}, tokens)
        return np.take_along_axis(np.asarray(found, np.float64), labels[:, None], 1).sum()

    shift = jnp.asarray(change, jnp.float32)
    return (likelihood(shift) - likelihood(-shift)) / 2

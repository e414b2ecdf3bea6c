"""Logits of whole texts, here and in transformers."""

import jax.numpy as jnp
import numpy as np

from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits


def our_logits(model, tokens):
    """float32[B, T, V] of token ids [B, T], read at once."""
    tokens = jnp.asarray(tokens, jnp.int32)
    cache = empty_cache(model.config, *tokens.shape, jnp.float32)
    hidden, _, _ = forward(model.config, model.params, tokens, jnp.ones(tokens.shape, bool), cache)
    return np.asarray(logits(model.config, model.params, hidden))


def their_logits(reference, tokens):
    """The same of a transformers model."""
    import torch

    with torch.no_grad():
        return reference(torch.from_numpy(tokens)).logits.numpy()


def assert_same_logits(reference, model, tokens):
    """Two models are one, up to rounding."""
    theirs = their_logits(reference, tokens)
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(our_logits(model, tokens), theirs, rtol=0, atol=1e-4 * scale)

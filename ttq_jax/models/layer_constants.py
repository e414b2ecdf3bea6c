"""What differs from layer to layer besides weights: which rotate, and how, and which slide."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ttq_jax.config import ModelConfig, Rope
from ttq_jax.models.layers import growth
from ttq_jax.types import Cache


def _ropes(config: ModelConfig) -> tuple[Rope, ...]:
    """The rotations of full and of sliding layers; () for learned positions."""
    return () if config.rope is None else (config.rope, config.rope_local or config.rope)


def layer_constants(config: ModelConfig) -> dict[str, Array]:
    """The constants of each layer, stacked for a scan.

    Args:
      config: the model's.

    Returns:
      "layer", its index; "window", how far back it sees; with a rotation "rope", its frequencies;
      and what only some rotations have: "magnitude", a factor on what rotates, and "local", which
      of `growths` is the layer's.
    """
    slides = config.sliding_layers or (False,) * config.n_layers
    sliding = np.array(slides)
    rotated = np.array(config.rotated_layers or (True,) * config.n_layers)
    local, ropes = sliding.astype(np.int32), _ropes(config)
    constants = {
        "layer": np.arange(config.n_layers, dtype=np.int32),
        "window": np.array([_window(config, each) for each in slides], np.int32),
    }
    if ropes:
        frequencies = np.stack([rope.inverse_frequencies(config.head_dim) for rope in ropes])
        # At frequency zero nothing turns.
        constants["rope"] = (frequencies[local] * rotated[:, None]).astype(np.float32)
    if any(rope.attention_factor != 1 for rope in ropes):
        magnitudes = np.array([rope.attention_factor for rope in ropes])
        constants["magnitude"] = np.where(rotated, magnitudes[local], 1).astype(np.float32)
    if grows(config):
        constants["local"] = local
    return jax.tree.map(jnp.asarray, constants)


def _window(config: ModelConfig, slides: bool) -> int:
    """How far back a layer sees."""
    far = np.iinfo(np.int32).max
    return min(config.sliding_window or far, far) if slides else far


def windows(config: ModelConfig) -> tuple[int, ...]:
    """How far back any layer sees, each distance once.

    Args:
      config: the model's.

    Returns:
      Tokens, ascending.
    """
    slides = config.sliding_layers or (False,)
    return tuple(sorted({_window(config, each) for each in slides}))


def grows(config: ModelConfig) -> bool:
    """Whether the rotation of every key depends on the text's length."""
    return any(rope.grows for rope in _ropes(config))


def growths(config: ModelConfig, cache: Cache) -> Float[Array, "2 B half"] | None:
    """Factors on the frequencies of full and of sliding layers.

    Args:
      config: the model's.
      cache: of the texts so far, the new tokens included.

    Returns:
      A factor for each pair of channels and each text; None if they are all 1.
    """
    if not grows(config):
        return None
    ropes = _ropes(config)
    lengths = jnp.sum(cache.valid, axis=1, dtype=jnp.int32)
    return jnp.stack([growth(rope, config.head_dim, lengths) for rope in ropes])

"""SmolLM3 (Bakouch et al., 2025): Llama with every fourth layer left without rotation."""

from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.errors import shown
from ttq_jax.models.family import (
    GGUF_MODULES,
    HF_MODULES,
    Family,
    Settings,
    hf_rope,
    ignore_common,
)
from ttq_jax.models.llama import FAMILY as LLAMA
from ttq_jax.models.sizes import every, gguf_model, hf_sizes, sliding_layers

_THETA, _PERIOD = 2_000_000.0, 4


def _rotated(s: Settings, n_layers: int) -> tuple[bool, ...]:
    """Which layers rotate: 1 in `no_rope_layers`, in spite of its name.

    Raises:
      ConfigError: not a list of zeros and ones, one for each layer.
    """
    period, flags = s.integer("no_rope_layer_interval", _PERIOD), s.take("no_rope_layers", None)
    if flags is None:
        return every(period, n_layers) or (False,) * n_layers
    if not isinstance(flags, list) or len(flags) != n_layers or not set(flags) <= {0, 1}:
        raise ConfigError(
            f"no_rope_layers: expected {n_layers} entries of 0 or 1, got {shown(flags)}"
        )
    return tuple(map(bool, flags))


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "smollm3" describes.

    Args:
      s: config.json.

    Returns:
      Its config.
    """
    ignore_common(s)
    s.ignore("max_window_layers")
    sizes = hf_sizes(s, max_position_embeddings=32768, num_key_value_heads=4)
    n_layers = sizes["n_layers"]
    rotated, types = _rotated(s, n_layers), s.take("layer_types", None)
    window = s.integer("sliding_window", None)
    if not s.flag("use_sliding_window", False):
        window = None
    if types is not None:
        sliding = sliding_layers(types, n_layers)
    else:
        sliding = tuple(window is not None and not on for on in rotated)
    bias = s.flag("attention_bias", False)
    return ModelConfig(
        family="smollm3",
        **sizes,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=s.flag("mlp_bias", False),
        rope=hf_rope(s, _THETA),
        rotated_layers=() if all(rotated) else rotated,
        sliding_window=window,
        sliding_layers=sliding if any(sliding) else (),
        tie_embeddings=s.flag("tie_word_embeddings", True),
    )


def gguf_config(s: Settings, vocab_size: int, tied: bool) -> ModelConfig:
    """The model that a GGUF header of architecture "smollm3" describes.

    Args:
      s: the header.
      vocab_size: rows of the embedding.
      tied: whether the file has no head of its own.

    Returns:
      Its config; biases are switched on by the loader where the file has them.
    """
    # The header does not say it; llama.cpp takes the period for granted.
    rotated = every(_PERIOD, s.layers("smollm3.block_count"))
    return gguf_model(s, vocab_size, tied, arch="smollm3", theta=_THETA, rotated_layers=rotated)


FAMILY = Family(
    name="smollm3",
    hf_types=("smollm3",),
    hf_config=hf_config,
    end=128001,
    hf_modules=HF_MODULES,
    gguf_arch="smollm3",
    gguf_config=gguf_config,
    gguf_modules=GGUF_MODULES,
    gguf_edits=LLAMA.gguf_edits,
)

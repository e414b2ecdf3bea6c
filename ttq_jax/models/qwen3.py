"""Qwen3, dense (Yang et al., 2025): Llama with normed query and key heads."""

from typing import Any

from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.errors import shown
from ttq_jax.foreign import named
from ttq_jax.models.family import (
    GGUF_MODULES,
    HF_MODULES,
    Family,
    Settings,
    activation,
    gguf_rope,
    head_width,
    hf_rope,
    ignore_common,
)


def sliding_layers(types: Any, n_layers: int) -> tuple[bool, ...]:
    """Reads config.json's `layer_types`.

    Args:
      types: per layer, "full_attention" or "sliding_attention".
      n_layers: how many there must be.

    Returns:
      Per layer, whether its attention slides; () if none does.

    Raises:
      ConfigError: another kind of layer, or another number of them.
    """
    if not isinstance(types, list) or len(types) != n_layers:
        raise ConfigError(f"layer_types: expected a list of {n_layers} entries, got {shown(types)}")
    known = {"full_attention": False, "sliding_attention": True}
    other = sorted({str(t) for t in types} - set(known))
    if other:
        raise ConfigError(f"layer_types: expected {' or '.join(known)}, got {named(other)}")
    flags = tuple(known[t] for t in types)
    return flags if any(flags) else ()


def _layers(s: Settings, n_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """(window, which layers slide)."""
    window = s.integer("sliding_window", None if s.is_null("sliding_window") else 4096)
    first = s.integer("max_window_layers", 28, 0)
    types = s.take("layer_types", None)
    if not s.flag("use_sliding_window", False):
        window = None
    if types is not None:
        sliding = sliding_layers(types, n_layers)
    else:
        sliding = tuple(window is not None and i >= first for i in range(n_layers))
        sliding = sliding if any(sliding) else ()
    return window, sliding


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "qwen3" describes.

    Args:
      s: config.json.

    Returns:
      Its config.
    """
    ignore_common(s)
    head_dim = s.integer("head_dim", 128)
    heads, n_layers = s.integer("num_attention_heads"), s.layers("num_hidden_layers")
    attention_bias = s.flag("attention_bias", False)
    window, sliding = _layers(s, n_layers)
    return ModelConfig(
        family="qwen3",
        vocab_size=s.integer("vocab_size"),
        d_model=s.integer("hidden_size"),
        embed_dim=s.integer("hidden_size"),
        n_layers=n_layers,
        n_heads=heads,
        n_kv_heads=s.integer(
            "num_key_value_heads", heads if s.is_null("num_key_value_heads") else 32
        ),
        head_dim=head_dim,
        d_ff=s.integer("intermediate_size"),
        max_positions=s.integer("max_position_embeddings", 32768),
        query_scale=head_dim**-0.5,
        norm_eps=s.number("rms_norm_eps", 1e-6),
        activation=activation(s, "hidden_act", "silu"),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        rope=hf_rope(s),
        sliding_window=window,
        sliding_layers=sliding,
        tie_embeddings=s.flag("tie_word_embeddings", False),
    )


def gguf_config(s: Settings, vocab_size: int, tied: bool) -> ModelConfig:
    """The model that a GGUF header of architecture "qwen3" describes.

    Args:
      s: the header.
      vocab_size: rows of the embedding.
      tied: whether the file has no head of its own.

    Returns:
      Its config.
    """
    width, heads = s.integer("qwen3.embedding_length"), s.integer("qwen3.attention.head_count")
    head_dim = s.integer("qwen3.attention.key_length", head_width(width, heads))
    s.require("qwen3.attention.value_length", head_dim)
    s.require("qwen3.rope.dimension_count", head_dim)
    return ModelConfig(
        family="qwen3",
        vocab_size=vocab_size,
        d_model=width,
        embed_dim=width,
        n_layers=s.layers("qwen3.block_count"),
        n_heads=heads,
        n_kv_heads=s.integer("qwen3.attention.head_count_kv", heads),
        head_dim=head_dim,
        d_ff=s.integer("qwen3.feed_forward_length"),
        max_positions=s.integer("qwen3.context_length"),
        query_scale=head_dim**-0.5,
        norm_eps=s.number("qwen3.attention.layer_norm_rms_epsilon"),
        qk_norm=True,
        rope=gguf_rope(s, "qwen3"),
        tie_embeddings=tied,
    )


FAMILY = Family(
    name="qwen3",
    hf_types=("qwen3",),
    hf_config=hf_config,
    hf_modules=HF_MODULES,
    gguf_arch="qwen3",
    gguf_config=gguf_config,
    gguf_modules=GGUF_MODULES,
)

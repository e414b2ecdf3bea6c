"""Gemma3 text (Gemma Team, 2025), alone or as the text part of the vision model.

Five of six layers attend within a sliding window and rotate with a small theta; the sixth attends
to everything and rotates with a large one.
"""

import numpy as np

from ttq_jax.config import ConfigError, ModelConfig, Rope
from ttq_jax.errors import shown
from ttq_jax.models.family import (
    GGUF_MODULES,
    HF_MODULES,
    Family,
    Settings,
    activation,
    gguf_rope,
    head_width,
    ignore_common,
    make_rope,
)
from ttq_jax.models.qwen3 import sliding_layers

_GLOBAL_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0
_PATTERN = 6


def _every(pattern: int, n_layers: int) -> tuple[bool, ...]:
    """Which layers slide when every `pattern`-th one does not."""
    flags = tuple(bool((i + 1) % pattern) for i in range(n_layers))
    return flags if any(flags) else ()


def _text_settings(s: Settings) -> Settings:
    """The text part of a vision model's config.json, or config.json itself."""
    if "text_config" not in s:
        return s
    ignore_common(s)
    s.ignore("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
             "image_token_index", "image_token_id", "boi_token_id", "eoi_token_id")  # fmt: skip
    text = dict(s.mapping("text_config"))
    tied = s.take("tie_word_embeddings", None)
    if tied is not None:
        text.setdefault("tie_word_embeddings", tied)
    s.finish()
    return Settings(text, "text_config.")


def _ropes(s: Settings) -> tuple[Rope, Rope]:
    """(rotation of full layers, rotation of sliding layers), from old or new keys."""
    theta = s.number("rope_theta", _GLOBAL_THETA)
    local = s.number("rope_local_base_freq", _LOCAL_THETA)
    parts = Settings(s.mapping("rope_parameters"), "rope_parameters.")
    full = {**parts.mapping("full_attention"), **s.mapping("rope_scaling")}
    sliding = parts.mapping("sliding_attention")
    parts.finish()
    return make_rope(full, theta), make_rope(sliding, local)


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "gemma3_text" or "gemma3" describes.

    Args:
      s: config.json. Absent keys mean transformers' defaults, which released files rely on.

    Returns:
      Its config.
    """
    outer, s = s, _text_settings(s)
    ignore_common(s)
    s.require("use_bidirectional_attention", False)
    n_layers, width = s.layers("num_hidden_layers", 26), s.integer("hidden_size", 2304)
    pattern = s.integer("sliding_window_pattern", s.integer("_sliding_window_pattern", _PATTERN))
    types = s.take("layer_types", None)
    full, local = _ropes(s)
    attention_bias = s.flag("attention_bias", False)
    config = ModelConfig(
        family="gemma3",
        vocab_size=s.integer("vocab_size", 262_208),
        d_model=width,
        embed_dim=width,
        n_layers=n_layers,
        n_heads=s.integer("num_attention_heads", 8),
        n_kv_heads=s.integer("num_key_value_heads", 4),
        head_dim=s.integer("head_dim", 256),
        d_ff=s.integer("intermediate_size", 9216),
        max_positions=s.integer("max_position_embeddings", 131_072),
        query_scale=s.number("query_pre_attn_scalar", 256) ** -0.5,
        norm="rms_plus_one",
        norm_eps=s.number("rms_norm_eps", 1e-6),
        norm_placement="sandwich",
        activation=activation(s, "hidden_activation", "gelu_pytorch_tanh"),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        rope=full,
        rope_local=local,
        sliding_window=s.integer("sliding_window", 4096),
        sliding_layers=_every(pattern, n_layers)
        if types is None
        else sliding_layers(types, n_layers),
        embed_scale=width**0.5,
        tie_embeddings=s.flag("tie_word_embeddings", True),
        attn_softcap=s.number("attn_logit_softcapping", None),
        logit_softcap=s.number("final_logit_softcapping", None),
    )
    if s is not outer:
        s.finish()
    return config


def _gguf_sliding(s: Settings, n_layers: int) -> tuple[bool, ...]:
    """Which layers slide: a flag per layer, a period, or Gemma3's own period.

    Raises:
      ConfigError: none of these.
    """
    key = "gemma3.attention.sliding_window_pattern"
    pattern = s.take(key, _PATTERN)
    if not isinstance(pattern, np.ndarray):
        return _every(s.integer(key, _PATTERN), n_layers)
    if pattern.dtype.kind == "f" or len(pattern) != n_layers:
        raise ConfigError(f"{key}: expected {n_layers} flags, got {shown(pattern)}")
    return tuple(bool(p) for p in pattern)


def gguf_config(s: Settings, vocab_size: int, tied: bool) -> ModelConfig:
    """The model that a GGUF header of architecture "gemma3" describes.

    Args:
      s: the header.
      vocab_size: rows of the embedding.
      tied: whether the file has no head of its own.

    Returns:
      Its config.
    """
    width, heads = s.integer("gemma3.embedding_length"), s.integer("gemma3.attention.head_count")
    n_layers = s.layers("gemma3.block_count")
    head_dim = s.integer("gemma3.attention.key_length", 256)
    s.require("gemma3.attention.value_length", head_dim)
    s.require("gemma3.rope.dimension_count", head_dim)
    s.ignore("gemma3.mm.tokens_per_image")
    # The header has no query_pre_attn_scalar; only the 27B, known by its 62 layers, sets it apart.
    scalar = head_width(width, heads) if n_layers == 62 else head_dim
    return ModelConfig(
        family="gemma3",
        vocab_size=vocab_size,
        d_model=width,
        embed_dim=width,
        n_layers=n_layers,
        n_heads=heads,
        n_kv_heads=s.integer("gemma3.attention.head_count_kv", heads),
        head_dim=head_dim,
        d_ff=s.integer("gemma3.feed_forward_length"),
        max_positions=s.integer("gemma3.context_length", 131_072),
        query_scale=scalar**-0.5,
        norm="rms_plus_one",
        norm_eps=s.number("gemma3.attention.layer_norm_rms_epsilon", 1e-6),
        norm_placement="sandwich",
        activation="gelu_tanh",
        qk_norm=True,
        rope=gguf_rope(s, "gemma3", _GLOBAL_THETA),
        rope_local=Rope(theta=s.number("gemma3.rope.freq_base_swa", _LOCAL_THETA)),
        sliding_window=s.integer("gemma3.attention.sliding_window"),
        sliding_layers=_gguf_sliding(s, n_layers),
        embed_scale=width**0.5,
        tie_embeddings=tied,
        attn_softcap=s.number("gemma3.attn_logit_softcapping", None, zero=True) or None,
        logit_softcap=s.number("gemma3.final_logit_softcapping", None, zero=True) or None,
    )


_NORMS = {
    "layers.attn_post_norm": "post_attention_layernorm",
    "layers.mlp_norm": "pre_feedforward_layernorm",
    "layers.mlp_post_norm": "post_feedforward_layernorm",
}
_NORM_MODULES = (
    "final_norm", "layers.attn_norm", "layers.q_norm", "layers.k_norm", *_NORMS,
)  # fmt: skip

FAMILY = Family(
    name="gemma3",
    hf_types=("gemma3_text", "gemma3"),
    hf_config=hf_config,
    end=1,
    hf_modules=HF_MODULES | {k: f"layers.{{i}}.{v}" for k, v in _NORMS.items()},
    hf_prefixes=("model.language_model.", "language_model.model.", "model.", ""),
    hf_heads=("lm_head", "language_model.lm_head"),
    hf_ignored=(
        "vision_tower.*",
        "multi_modal_projector.*",
        "model.vision_tower.*",
        "model.multi_modal_projector.*",
    ),
    gguf_arch="gemma3",
    gguf_config=gguf_config,
    gguf_modules=GGUF_MODULES
    | {
        "layers.attn_post_norm": "blk.{i}.post_attention_norm",
        "layers.mlp_post_norm": "blk.{i}.post_ffw_norm",
    },
    # llama.cpp multiplies by the stored norm weight, so its files hold w + 1.
    gguf_edits=dict.fromkeys(_NORM_MODULES, "minus_one"),
)

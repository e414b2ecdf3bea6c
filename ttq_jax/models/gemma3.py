"""Gemma3 text (Gemma Team, 2025), alone or as the text part of the vision model.

Five of six layers attend within a sliding window and rotate with a small theta; the sixth attends
to everything and rotates with a large one.
"""

from typing import Any

import numpy as np

from ttq_jax.config import ConfigError, ModelConfig, Rope
from ttq_jax.errors import shown
from ttq_jax.models.family import (
    GGUF_MODULES,
    HF_MODULES,
    Family,
    Settings,
    gguf_rope,
    head_width,
    ignore_common,
    make_rope,
)
from ttq_jax.models.settings import disagree, text_settings
from ttq_jax.models.sizes import every, gguf_sizes, hf_sizes, sliding_layers

_GLOBAL_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0
_PATTERN, _POSITIONS = 6, 131_072


def _ropes(s: Settings) -> tuple[Rope, Rope]:
    """(rotation of full layers, rotation of sliding layers), from old or new keys.

    Raises:
      ConfigError: they disagree.
    """
    positions = s.integer("max_position_embeddings", _POSITIONS)
    parts, scaling = s.inside("rope_parameters"), s.mapping("rope_scaling")

    def read(s: Settings, name: str, theta: float, outside: dict[str, tuple[str, Any]]) -> Rope:
        return make_rope(s.inside(name, outside), theta, positions=positions)

    outer = {"rope_theta": (s.label("rope_theta"), s.number("rope_theta", None))}
    new = parts.mapping("full_attention")
    full = read(parts, "full_attention", _GLOBAL_THETA, outer)
    if scaling:
        # transformers adds what is in rope_scaling to the new keys.
        label = parts.label("full_attention")
        both = outer | {key: (f"{label}.{key}", value) for key, value in new.items()}
        rope = read(s, "rope_scaling", _GLOBAL_THETA, both)
        if new and rope != full:
            disagree(label, new, s.label("rope_scaling"), scaling)
        full = rope
    name = "rope_local_base_freq"
    outer = {"rope_theta": (s.label(name), s.number(name, None))}
    local = read(parts, "sliding_attention", _LOCAL_THETA, outer)
    parts.finish()
    return full, local


def _sliding(s: Settings, n_layers: int) -> tuple[bool, ...]:
    """Which layers slide: `layer_types`, or else every one but each `sliding_window_pattern`-th.

    Raises:
      ConfigError: the spellings disagree.
    """
    types, public = s.take("layer_types", None), s.integer("sliding_window_pattern", None)
    private = s.integer("_sliding_window_pattern", None)
    if types is None:
        # transformers does not read the private one; it writes 6 there whatever the layers are.
        if private not in (None, public or _PATTERN):
            disagree(
                s.label("_sliding_window_pattern"), private, s.label("sliding_window_pattern"),
                public or _PATTERN,
            )  # fmt: skip
        return every(public or _PATTERN, n_layers)
    flags = sliding_layers(types, n_layers)
    if public is not None and flags != every(public, n_layers):
        disagree(s.label("layer_types"), types, s.label("sliding_window_pattern"), public)
    return flags


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "gemma3_text" or "gemma3" describes.

    Args:
      s: config.json. Absent keys mean transformers' defaults, which released files rely on.

    Returns:
      Its config.
    """
    outer = s
    s = text_settings(
        s,
        "mm_tokens_per_image",
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
        tied=True,
    )
    ignore_common(s)
    s.require("use_bidirectional_attention", False)
    # Some files have both; transformers reads the one that Llama has not.
    s.ignore("hidden_act")
    sizes = hf_sizes(
        s, activation=("hidden_activation", "gelu_pytorch_tanh"), head_dim=256, hidden_size=2304,
        intermediate_size=9216, max_position_embeddings=_POSITIONS, num_attention_heads=8,
        num_hidden_layers=26, num_key_value_heads=4, vocab_size=262_208,
    )  # fmt: skip
    sizes["query_scale"] = s.number("query_pre_attn_scalar", 256) ** -0.5
    full, local = _ropes(s)
    attention_bias = s.flag("attention_bias", False)
    config = ModelConfig(
        family="gemma3",
        **sizes,
        norm="rms_plus_one",
        norm_placement="sandwich",
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        rope=full,
        rope_local=local,
        sliding_window=s.integer("sliding_window", None if s.is_null("sliding_window") else 4096),
        sliding_layers=_sliding(s, sizes["n_layers"]),
        embed_scale=sizes["d_model"] ** 0.5,
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
        return every(s.integer(key, _PATTERN), n_layers)
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
    sizes = gguf_sizes(s, "gemma3", head_dim=256)
    s.require("gemma3.rope.dimension_count", sizes["head_dim"])
    s.ignore("gemma3.mm.tokens_per_image")
    # The header has no query_pre_attn_scalar; only the 27B, known by its 62 layers, sets it apart.
    if sizes["n_layers"] == 62:
        sizes["query_scale"] = head_width(sizes["d_model"], sizes["n_heads"]) ** -0.5
    return ModelConfig(
        family="gemma3",
        vocab_size=vocab_size,
        **sizes,
        norm="rms_plus_one",
        norm_placement="sandwich",
        activation="gelu_tanh",
        qk_norm=True,
        rope=gguf_rope(s, "gemma3", _GLOBAL_THETA),
        rope_local=Rope(theta=s.number("gemma3.rope.freq_base_swa", _LOCAL_THETA)),
        sliding_window=s.integer("gemma3.attention.sliding_window"),
        sliding_layers=_gguf_sliding(s, sizes["n_layers"]),
        embed_scale=sizes["d_model"] ** 0.5,
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

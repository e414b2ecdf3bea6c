"""Llama (Touvron et al., 2023; Grattafiori et al., 2024) and its kin: Llama 2, Llama 3, SmolLM2."""

from typing import Any

from ttq_jax.config import ModelConfig
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
from ttq_jax.models.sizes import gguf_experts


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "llama" describes.

    Args:
      s: config.json.

    Returns:
      Its config.
    """
    ignore_common(s)
    width, heads = s.integer("hidden_size"), s.integer("num_attention_heads")
    head_dim = s.integer("head_dim", head_width(width, heads))
    attention_bias = s.flag("attention_bias", False)
    return ModelConfig(
        family="llama",
        vocab_size=s.integer("vocab_size"),
        d_model=width,
        embed_dim=width,
        n_layers=s.layers("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=s.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        d_ff=s.integer("intermediate_size"),
        max_positions=s.integer("max_position_embeddings", 2048),
        query_scale=head_dim**-0.5,
        norm_eps=s.number("rms_norm_eps", 1e-6),
        activation=activation(s, "hidden_act", "silu"),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=s.flag("mlp_bias", False),
        rope=hf_rope(s),
        tie_embeddings=s.flag("tie_word_embeddings", False),
    )


def gguf_config(s: Settings, vocab_size: int, tied: bool) -> ModelConfig:
    """The model that a GGUF header of architecture "llama" describes.

    Args:
      s: the header.
      vocab_size: rows of the embedding.
      tied: whether the file has no head of its own.

    Returns:
      Its config; biases are switched on by the loader where the file has them.
    """
    width, heads = s.integer("llama.embedding_length"), s.integer("llama.attention.head_count")
    head_dim = s.integer("llama.attention.key_length", head_width(width, heads))
    s.require("llama.attention.value_length", head_dim)
    s.require("llama.rope.dimension_count", head_dim)
    # Mixtral's files call themselves Llama's.
    experts: dict[str, Any] = {}
    if s.integer("llama.expert_count", 0, least=0):
        experts = gguf_experts(s, "llama", norm_topk=True)
    s.require("llama.expert_used_count", experts.get("experts_per_token", 0))
    return ModelConfig(
        family="mixtral" if experts else "llama",
        vocab_size=vocab_size,
        d_model=width,
        embed_dim=width,
        n_layers=s.layers("llama.block_count"),
        n_heads=heads,
        n_kv_heads=s.integer("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        d_ff=s.integer("llama.feed_forward_length"),
        max_positions=s.integer("llama.context_length"),
        query_scale=head_dim**-0.5,
        norm_eps=s.number("llama.attention.layer_norm_rms_epsilon"),
        rope=gguf_rope(s, "llama"),
        tie_embeddings=tied,
        **experts,
    )


FAMILY = Family(
    name="llama",
    hf_types=("llama",),
    hf_config=hf_config,
    hf_modules=HF_MODULES,
    gguf_arch="llama",
    gguf_config=gguf_config,
    gguf_modules=GGUF_MODULES,
    # llama.cpp rotates neighbouring channels, so its files hold q and k reordered for that.
    gguf_edits={"layers.q": "unpermute", "layers.k": "unpermute"},
)

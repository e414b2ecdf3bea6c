"""Qwen3's mixtures of experts (Yang et al., 2025): its attention, and experts in every layer."""

from functools import partial

from ttq_jax.config import ModelConfig
from ttq_jax.models.family import (
    GGUF_MODULES,
    HF_MODULES,
    Family,
    Settings,
    hf_rope,
    ignore_common,
)
from ttq_jax.models.sizes import HF_EXPERTS, everywhere, gguf_model, hf_experts, hf_sizes


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "qwen3_moe" describes.

    Args:
      s: config.json.

    Returns:
      Its config.
    """
    ignore_common(s)
    # Layers without experts; no released model has any.
    s.require("decoder_sparse_step", 1)
    s.require("mlp_only_layers", [])
    # Qwen3-Coder says what it is not.
    s.require("shared_expert_intermediate_size", 0)
    s.require("qkv_bias", False)
    s.require("use_qk_norm", True)
    s.ignore("max_window_layers")
    absent = None if s.is_null("sliding_window") else 4096
    window = s.integer("sliding_window", absent)
    bias = s.flag("attention_bias", False)
    sizes = hf_sizes(
        s, num_key_value_heads=4, max_position_embeddings=32768, rms_norm_eps=1e-6,
        intermediate_size=6144,
    )  # fmt: skip
    sizes["d_ff"] = s.integer("moe_intermediate_size", 768)
    return ModelConfig(
        family="qwen3_moe",
        **sizes,
        **hf_experts(s, experts=128, per_token=8),
        **everywhere(window if s.flag("use_sliding_window", False) else None, sizes["n_layers"]),
        norm_topk=s.flag("norm_topk_prob", False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        rope=hf_rope(s),
        tie_embeddings=s.flag("tie_word_embeddings", False),
    )


FAMILY = Family(
    name="qwen3_moe",
    hf_types=("qwen3_moe",),
    hf_config=hf_config,
    hf_modules=HF_MODULES | HF_EXPERTS,
    gguf_arch="qwen3moe",
    # llama.cpp takes for granted that the router's weights sum to one.
    gguf_config=partial(
        gguf_model, arch="qwen3moe", family="qwen3_moe", norm_topk=True, qk_norm=True
    ),
    gguf_modules=GGUF_MODULES,
)

"""OLMoE (Muennighoff et al., 2024): many small experts; norms over all heads of q and k at once."""

from ttq_jax.config import ModelConfig
from ttq_jax.models.family import (
    GGUF_MODULES,
    HF_MODULES,
    Family,
    Settings,
    gguf_rope,
    hf_rope,
    ignore_common,
)
from ttq_jax.models.sizes import HF_EXPERTS, gguf_experts, gguf_sizes, hf_experts, hf_sizes


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "olmoe" describes.

    Args:
      s: config.json.

    Returns:
      Its config.
    """
    ignore_common(s)
    s.require("clip_qkv")
    bias = s.flag("attention_bias", False)
    return ModelConfig(
        family="olmoe",
        **hf_sizes(s, max_position_embeddings=4096, rms_norm_eps=1e-5, intermediate_size=2048),
        **hf_experts(s, experts=64, per_token=8),
        norm_topk=s.flag("norm_topk_prob", False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        qk_norm_over="all",
        rope=hf_rope(s),
        tie_embeddings=s.flag("tie_word_embeddings", False),
    )


def gguf_config(s: Settings, vocab_size: int, tied: bool) -> ModelConfig:
    """The model that a GGUF header of architecture "olmoe" describes.

    Args:
      s: the header.
      vocab_size: rows of the embedding.
      tied: whether the file has no head of its own.

    Returns:
      Its config; llama.cpp takes for granted that the router's weights stay as they are.
    """
    sizes = gguf_sizes(s, "olmoe")
    s.require("olmoe.rope.dimension_count", sizes["head_dim"])
    sizes["d_ff"] = s.integer("olmoe.expert_feed_forward_length", sizes["d_ff"])
    return ModelConfig(
        family="olmoe",
        vocab_size=vocab_size,
        **sizes,
        **gguf_experts(s, "olmoe", norm_topk=False),
        qk_norm=True,
        qk_norm_over="all",
        rope=gguf_rope(s, "olmoe"),
        tie_embeddings=tied,
    )


FAMILY = Family(
    name="olmoe",
    hf_types=("olmoe",),
    hf_config=hf_config,
    hf_modules=HF_MODULES | HF_EXPERTS,
    gguf_arch="olmoe",
    gguf_config=gguf_config,
    gguf_modules=GGUF_MODULES,
)

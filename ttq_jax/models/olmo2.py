"""OLMo 2 (OLMo Team, 2024): norms after each sublayer, and over all heads of q and of k at once."""

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
from ttq_jax.models.sizes import gguf_sizes, hf_sizes


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "olmo2" describes.

    Args:
      s: config.json.

    Returns:
      Its config.
    """
    ignore_common(s)
    bias = s.flag("attention_bias", False)
    return ModelConfig(
        family="olmo2",
        **hf_sizes(s, max_position_embeddings=2048, rms_norm_eps=1e-5),
        norm_placement="branch",
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        qk_norm_over="all",
        rope=hf_rope(s),
        tie_embeddings=s.flag("tie_word_embeddings", False),
    )


def gguf_config(s: Settings, vocab_size: int, tied: bool) -> ModelConfig:
    """The model that a GGUF header of architecture "olmo2" describes.

    Args:
      s: the header.
      vocab_size: rows of the embedding.
      tied: whether the file has no head of its own.

    Returns:
      Its config; biases are switched on by the loader where the file has them.
    """
    sizes = gguf_sizes(s, "olmo2")
    s.require("olmo2.rope.dimension_count", sizes["head_dim"])
    return ModelConfig(
        family="olmo2",
        vocab_size=vocab_size,
        **sizes,
        norm_placement="branch",
        qk_norm=True,
        qk_norm_over="all",
        rope=gguf_rope(s, "olmo2"),
        tie_embeddings=tied,
    )


FAMILY = Family(
    name="olmo2",
    hf_types=("olmo2",),
    hf_config=hf_config,
    end=50279,
    hf_modules=HF_MODULES
    | {
        "layers.attn_post_norm": "layers.{i}.post_attention_layernorm",
        "layers.mlp_post_norm": "layers.{i}.post_feedforward_layernorm",
    },
    gguf_arch="olmo2",
    gguf_config=gguf_config,
    gguf_modules=GGUF_MODULES
    | {
        "layers.attn_post_norm": "blk.{i}.post_attention_norm",
        "layers.mlp_post_norm": "blk.{i}.post_ffw_norm",
    },
)

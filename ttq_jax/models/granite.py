"""Granite 3, dense (IBM, 2024): Llama with four multipliers."""

from ttq_jax.config import ModelConfig
from ttq_jax.models.family import (
    GGUF_MODULES,
    HF_MODULES,
    Family,
    Settings,
    hf_rope,
    ignore_common,
)
from ttq_jax.models.llama import FAMILY as LLAMA
from ttq_jax.models.sizes import gguf_model, hf_sizes


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "granite" describes.

    Args:
      s: config.json.

    Returns:
      Its config.
    """
    ignore_common(s)
    sizes = hf_sizes(s, max_position_embeddings=2048)
    sizes["query_scale"] = s.number("attention_multiplier", 1.0)
    bias = s.flag("attention_bias", False)
    return ModelConfig(
        family="granite",
        **sizes,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=s.flag("mlp_bias", False),
        rope=hf_rope(s),
        embed_scale=s.number("embedding_multiplier", 1.0),
        residual_scale=s.number("residual_multiplier", 1.0),
        logit_divisor=s.number("logits_scaling", 1.0),
        tie_embeddings=s.flag("tie_word_embeddings", False),
    )


def gguf_config(s: Settings, vocab_size: int, tied: bool) -> ModelConfig:
    """The model that a GGUF header of architecture "granite" describes.

    Args:
      s: the header.
      vocab_size: rows of the embedding.
      tied: whether the file has no head of its own.

    Returns:
      Its config; biases are switched on by the loader where the file has them.
    """
    scale = s.number("granite.attention.scale", None)
    return gguf_model(
        s,
        vocab_size,
        tied,
        arch="granite",
        embed_scale=s.number("granite.embedding_scale", 1.0),
        residual_scale=s.number("granite.residual_scale", 1.0),
        logit_divisor=s.number("granite.logit_scale", 1.0),
        **({} if scale is None else {"query_scale": scale}),
    )


FAMILY = Family(
    name="granite",
    hf_types=("granite",),
    hf_config=hf_config,
    end=2,
    hf_modules=HF_MODULES,
    gguf_arch="granite",
    gguf_config=gguf_config,
    gguf_modules=GGUF_MODULES,
    gguf_edits=LLAMA.gguf_edits,
)

"""OLMo 2 (OLMo Team, 2024): norms after each sublayer, and over all heads of q and of k at once."""

from functools import partial
from typing import Any

from ttq_jax.config import ModelConfig
from ttq_jax.models.family import (
    GGUF_MODULES,
    HF_MODULES,
    Family,
    Settings,
    hf_rope,
    ignore_common,
)
from ttq_jax.models.sizes import gguf_model, hf_sizes

_NORMS: dict[str, Any] = {"norm_placement": "branch", "qk_norm": True, "qk_norm_over": "all"}


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
        **_NORMS,
        qkv_bias=bias,
        o_bias=bias,
        rope=hf_rope(s),
        tie_embeddings=s.flag("tie_word_embeddings", False),
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
    gguf_config=partial(gguf_model, arch="olmo2", **_NORMS),
    gguf_modules=GGUF_MODULES
    | {
        "layers.attn_post_norm": "blk.{i}.post_attention_norm",
        "layers.mlp_post_norm": "blk.{i}.post_ffw_norm",
    },
)

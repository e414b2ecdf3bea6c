"""OLMoE (Muennighoff et al., 2024): many small experts; norms over all heads of q and k at once."""

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
from ttq_jax.models.sizes import HF_EXPERTS, gguf_model, hf_experts, hf_sizes

_NORMS: dict[str, Any] = {"qk_norm": True, "qk_norm_over": "all"}


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
        **_NORMS,
        rope=hf_rope(s),
        tie_embeddings=s.flag("tie_word_embeddings", False),
    )


FAMILY = Family(
    name="olmoe",
    hf_types=("olmoe",),
    hf_config=hf_config,
    hf_modules=HF_MODULES | HF_EXPERTS,
    gguf_arch="olmoe",
    # llama.cpp takes for granted that the router's weights stay as they are.
    gguf_config=partial(gguf_model, arch="olmoe", norm_topk=False, **_NORMS),
    gguf_modules=GGUF_MODULES,
)

"""Qwen3, dense (Yang et al., 2025): Llama with normed query and key heads.

Of Qwen3-VL the text model is read. A text has equal positions on all three axes of its rotation.
"""

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
from ttq_jax.models.settings import text_settings
from ttq_jax.models.sizes import gguf_model, hf_sizes, qwen_window


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "qwen3" or "qwen3_vl" describes.

    Args:
      s: config.json.

    Returns:
      Its config.
    """
    outer, s = s, text_settings(s, tied=False)
    ignore_common(s)
    alone = s is outer
    positions, theta = (32768, 10000.0) if alone else (128_000, 500_000.0)
    sizes = hf_sizes(s, head_dim=128, max_position_embeddings=positions, num_key_value_heads=32)
    attention_bias = s.flag("attention_bias", False)
    config = ModelConfig(
        family="qwen3",
        **sizes,
        **(qwen_window(s, sizes["n_layers"]) if alone else {}),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        rope=hf_rope(s, theta),
        tie_embeddings=s.flag("tie_word_embeddings", False),
    )
    if not alone:
        s.finish()
    return config


FAMILY = Family(
    name="qwen3",
    hf_types=("qwen3", "qwen3_vl"),
    hf_config=hf_config,
    hf_modules=HF_MODULES,
    hf_prefixes=("model.language_model.", "model.", ""),
    hf_ignored=("model.visual.*", "visual.*"),
    gguf_arch="qwen3",
    gguf_config=partial(gguf_model, arch="qwen3", qk_norm=True),
    gguf_modules=GGUF_MODULES,
)

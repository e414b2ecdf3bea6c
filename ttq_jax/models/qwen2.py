"""Qwen2 and Qwen2.5 (Yang et al., 2024): Llama with biases on q, k and v."""

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
from ttq_jax.models.sizes import gguf_model, hf_sizes, qwen_window


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "qwen2" describes.

    Args:
      s: config.json.

    Returns:
      Its config.
    """
    ignore_common(s)
    s.require("use_mrope", False)
    sizes = hf_sizes(s, max_position_embeddings=32768, num_key_value_heads=32)
    return ModelConfig(
        family="qwen2",
        **sizes,
        **qwen_window(s, sizes["n_layers"]),
        qkv_bias=True,
        rope=hf_rope(s),
        tie_embeddings=s.flag("tie_word_embeddings", False),
    )


FAMILY = Family(
    name="qwen2",
    hf_types=("qwen2",),
    hf_config=hf_config,
    hf_modules=HF_MODULES,
    gguf_arch="qwen2",
    gguf_config=partial(gguf_model, arch="qwen2"),
    gguf_modules=GGUF_MODULES,
)

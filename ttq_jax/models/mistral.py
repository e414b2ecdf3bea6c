"""Mistral (Jiang et al., 2023) and Mistral Nemo: Llama, in early releases with a sliding window.

GGUF files of these models call themselves "llama", and say nothing of a window.
"""

from ttq_jax.config import ModelConfig
from ttq_jax.models.family import HF_MODULES, Family, Settings, hf_rope, ignore_common
from ttq_jax.models.sizes import everywhere, hf_sizes


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "mistral" describes.

    Args:
      s: config.json.

    Returns:
      Its config.
    """
    ignore_common(s)
    s.require("attention_bias", False)
    s.require("mlp_bias", False)
    sizes = hf_sizes(s, num_key_value_heads=8, max_position_embeddings=4096 * 32)
    window = s.integer("sliding_window", None if s.is_null("sliding_window") else 4096)
    return ModelConfig(
        family="mistral",
        **sizes,
        **everywhere(window, sizes["n_layers"]),
        rope=hf_rope(s),
        tie_embeddings=s.flag("tie_word_embeddings", False),
    )


FAMILY = Family(
    name="mistral",
    hf_types=("mistral",),
    hf_config=hf_config,
    end=2,
    hf_modules=HF_MODULES,
)

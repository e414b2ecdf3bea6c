"""Mixtral (Jiang et al., 2024): Mistral with experts. Its GGUF files call themselves "llama"."""

from ttq_jax.config import ModelConfig
from ttq_jax.models.family import HF_MODULES, Family, Settings, hf_rope, ignore_common
from ttq_jax.models.sizes import everywhere, hf_experts, hf_sizes


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "mixtral" describes.

    Args:
      s: config.json.

    Returns:
      Its config.
    """
    ignore_common(s)
    s.require("attention_bias", False)
    sizes = hf_sizes(s, num_key_value_heads=8, max_position_embeddings=32 * 4096, rms_norm_eps=1e-5)
    return ModelConfig(
        family="mixtral",
        **sizes,
        **hf_experts(s, experts=8, per_token=2),
        **everywhere(s.integer("sliding_window", None), sizes["n_layers"]),
        # Its router has no such switch.
        norm_topk=True,
        rope=hf_rope(s, 1e6),
        tie_embeddings=s.flag("tie_word_embeddings", False),
    )


FAMILY = Family(
    name="mixtral",
    hf_types=("mixtral",),
    hf_config=hf_config,
    hf_modules=HF_MODULES
    | {
        "layers.router": "layers.{i}.block_sparse_moe.gate",
        "layers.gate": "layers.{i}.block_sparse_moe.experts.{e}.w1",
        "layers.up": "layers.{i}.block_sparse_moe.experts.{e}.w3",
        "layers.down": "layers.{i}.block_sparse_moe.experts.{e}.w2",
    },
)

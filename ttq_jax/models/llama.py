"""Llama (Touvron et al., 2023; Grattafiori et al., 2024) and its kin: Llama 2, Llama 3, SmolLM2."""

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


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "llama" describes.

    Args:
      s: config.json.

    Returns:
      Its config.
    """
    ignore_common(s)
    attention_bias = s.flag("attention_bias", False)
    return ModelConfig(
        family="llama",
        **hf_sizes(s, max_position_embeddings=2048),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=s.flag("mlp_bias", False),
        rope=hf_rope(s),
        tie_embeddings=s.flag("tie_word_embeddings", False),
    )


def gguf_config(s: Settings, vocab_size: int, tied: bool) -> ModelConfig:
    """The model that a GGUF header of architecture "llama" describes.

    Args:
      s: the header.
      vocab_size: rows of the embedding.
      tied: whether the file has no head of its own.

    Returns:
      Its config; biases are switched on by the loader where the file has them.
    """
    # Mixtral's files call themselves Llama's.
    if s.integer("llama.expert_count", 0, least=0):
        return gguf_model(s, vocab_size, tied, arch="llama", family="mixtral", norm_topk=True)
    s.require("llama.expert_used_count", 0)
    return gguf_model(s, vocab_size, tied, arch="llama")


FAMILY = Family(
    name="llama",
    hf_types=("llama",),
    hf_config=hf_config,
    end=2,
    hf_modules=HF_MODULES,
    gguf_arch="llama",
    gguf_config=gguf_config,
    gguf_modules=GGUF_MODULES,
    # llama.cpp rotates neighbouring channels, so its files hold q and k reordered for that.
    gguf_edits={"layers.q": "unpermute", "layers.k": "unpermute"},
)

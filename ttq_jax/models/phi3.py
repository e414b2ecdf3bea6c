"""Phi-3, Phi-3.5 and Phi-4 (Abdin et al., 2024): Llama with fused tensors and long rotations."""

from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.models.family import (
    GGUF_MODULES,
    HF_MODULES,
    Family,
    Settings,
    gguf_rope,
    hf_rope,
    ignore_common,
)
from ttq_jax.models.sizes import everywhere, gguf_sizes, hf_sizes


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "phi3" describes.

    Args:
      s: config.json.

    Returns:
      Its config.

    Raises:
      ConfigError: a rope scaling that no Phi-3 has.
    """
    ignore_common(s)
    s.ignore("resid_pdrop", "embd_pdrop")
    s.require("attention_bias", False)
    s.require("mlp_bias", False)
    s.require("lm_head_bias", False)
    # Phi-4-mini's code on the hub names them and reads neither.
    s.require("full_attn_mod", 1)
    s.require("interpolate_factor", 1)
    sizes = hf_sizes(s, max_position_embeddings=4096, rms_norm_eps=1e-5)
    rope = hf_rope(s, partial=True)
    if rope.scaling not in {"none", "longrope"}:
        raise ConfigError(
            f"rope_parameters, rope_scaling: expected default or longrope for Phi-3, got "
            f"{rope.scaling}. Use a checkpoint without it"
        )
    return ModelConfig(
        family="phi3",
        **sizes,
        **everywhere(s.integer("sliding_window", None), sizes["n_layers"]),
        rope=rope,
        tie_embeddings=s.flag("tie_word_embeddings", False),
    )


def gguf_config(s: Settings, vocab_size: int, tied: bool) -> ModelConfig:
    """The model that a GGUF header of architecture "phi3" describes.

    Args:
      s: the header.
      vocab_size: rows of the embedding.
      tied: whether the file has no head of its own.

    Returns:
      Its config.
    """
    sizes = gguf_sizes(s, "phi3")
    return ModelConfig(
        family="phi3",
        vocab_size=vocab_size,
        **sizes,
        **everywhere(s.integer("phi3.attention.sliding_window", None), sizes["n_layers"]),
        rope=gguf_rope(s, "phi3", head_dim=sizes["head_dim"]),
        tie_embeddings=tied,
    )


_QKV = ("layers.q", "layers.k", "layers.v")

FAMILY = Family(
    name="phi3",
    hf_types=("phi3",),
    hf_config=hf_config,
    end=32000,
    hf_modules=HF_MODULES
    | dict.fromkeys(_QKV, "layers.{i}.self_attn.qkv_proj")
    | dict.fromkeys(("layers.gate", "layers.up"), "layers.{i}.mlp.gate_up_proj"),
    gguf_arch="phi3",
    gguf_config=gguf_config,
    # llama.cpp calls both halves of the feed-forward layer "up".
    gguf_modules=GGUF_MODULES
    | dict.fromkeys(_QKV, "blk.{i}.attn_qkv")
    | {"layers.gate": "blk.{i}.ffn_up"},
)

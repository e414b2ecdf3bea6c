"""Sizes of released models, for compiling and planning without their weights.

Each entry is what matters here of the model's config.json on the hub; nothing is downloaded.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ttq_jax.config import ModelConfig
from ttq_jax.models.decoder import init_params
from ttq_jax.models.families import FAMILIES
from ttq_jax.models.family import Settings
from ttq_jax.types import SITE_OF, Params, kernels

_QWEN3 = {
    "head_dim": 128, "max_position_embeddings": 40960, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "vocab_size": 151936,
}  # fmt: skip
_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": ("qwen3", _QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
        "num_hidden_layers": 28, "tie_word_embeddings": True,
    }),
    "qwen3-1.7b": ("qwen3", _QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16,
        "num_hidden_layers": 28, "tie_word_embeddings": True,
    }),
    "qwen3-8b": ("qwen3", _QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
        "num_hidden_layers": 36, "tie_word_embeddings": False,
    }),
    "llama-3-8b": ("llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "vocab_size": 128256,
    }),
    "llama-3-70b": ("llama", {
        "hidden_size": 8192, "intermediate_size": 28672, "max_position_embeddings": 8192,
        "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "vocab_size": 128256,
    }),
    "gemma-3-27b": ("gemma3", {
        "head_dim": 128, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 5376,
        "intermediate_size": 21504, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
        "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        "sliding_window_pattern": 6, "vocab_size": 262208,
    }),
    "gemma-3-1b": ("gemma3", {
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    }),
    "qwen2.5-7b": ("qwen2", {
        "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "vocab_size": 152064,
    }),
    "mistral-7b-v0.3": ("mistral", {
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None,
        "vocab_size": 32768,
    }),
    "mistral-nemo-12b": ("mistral", {
        "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
        "sliding_window": None, "vocab_size": 131072,
    }),
    "gemma-2-2b": ("gemma2", {
        "head_dim": 256, "hidden_size": 2304, "intermediate_size": 9216,
        "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
    }),
    "phi-3-mini-4k": ("phi3", {
        "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 2047, "vocab_size": 32064,
    }),
    "phi-4-mini": ("phi3", {
        "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064,
    }),
    "smollm3-3b": ("smollm3", {
        "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 65536,
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "rope_theta": 5000000.0, "vocab_size": 128256,
    }),
    "olmo-2-7b": ("olmo2", {
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "vocab_size": 100352,
    }),
    "granite-3.3-2b": ("granite", {
        "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_size": 2048,
        "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072,
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_theta": 10000000.0,
        "tie_word_embeddings": True, "vocab_size": 49159,
    }),
    "qwen3-30b-a3b": ("qwen3_moe", {
        "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "vocab_size": 151936,
    }),
    "mixtral-8x7b": ("mixtral", {
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0, "vocab_size": 32000,
    }),
    "olmoe-1b-7b": ("olmoe", {
        "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "vocab_size": 50304,
    }),
    "opt-6.7b": ("opt", {
        "activation_function": "relu", "do_layer_norm_before": True, "ffn_dim": 16384,
        "hidden_size": 4096, "max_position_embeddings": 2048, "num_attention_heads": 32,
        "num_hidden_layers": 32, "vocab_size": 50272, "word_embed_proj_dim": 4096,
    }),
}  # fmt: skip

RELEASED = tuple(_SIZES)
"""Names that `released_config` knows."""


def released_config(name: str) -> ModelConfig:
    """The configuration of a released model.

    Args:
      name: one of `RELEASED`.

    Returns:
      What its config.json says.
    """
    family, sizes = _SIZES[name]
    settings = Settings(sizes)
    config = FAMILIES[family].hf_config(settings)
    settings.finish()
    return config


def params_shapes(config: ModelConfig, dtype: jax.typing.DTypeLike = "bfloat16") -> Params:
    """The parameter tree of a model as shapes.

    Args:
      config: the model's.
      dtype: of every leaf.

    Returns:
      A tree of `jax.ShapeDtypeStruct`.
    """
    tree = jax.eval_shape(partial(init_params, config), jax.eval_shape(lambda: jax.random.key(0)))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.dtype(dtype)), tree)


def projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The linear layers of one block, or of one expert in it.

    Args:
      config: the model's.

    Returns:
      {"q": ("d_in", d_out), …}, in the order in which activations meet them.
    """
    found = kernels(params_shapes(config)["layers"])
    return {name: found[name].shape[-2:] for name in SITE_OF if name in found}

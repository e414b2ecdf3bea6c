"""What defines a model family: how its settings are read, and the names of its weights.

All families share one parameter tree (`decoder.init_params`). A family maps the *modules* of that
tree to the checkpoint's names; which leaves a module has follows from the config.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.errors import shown
from ttq_jax.models.rope import gguf_rope, hf_rope, make_rope
from ttq_jax.models.settings import Settings, ignore_common

__all__ = [
    "DERIVED", "GGUF_MODULES", "HF_MODULES", "Edit", "Family", "Settings", "activation",
    "gguf_rope", "head_width", "hf_rope", "ignore_common", "make_rope",
]  # fmt: skip

# What is done to a tensor's rows on the way in: undo llama.cpp's reordering of the rotated
# channels; undo its +1 on Gemma's norms; leave out OPT's two unused leading positions.
Edit = Literal["unpermute", "minus_one", "skip_two_rows"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its settings and the names of its weights.

    Module names map a dotted path of the parameter tree ("embed", "layers.q", …) to the
    checkpoint's; "{i}" stands for the layer, "{e}" for the expert.

    Attributes:
      name: as in `ModelConfig.family`.
      hf_types: values of config.json's `model_type`.
      hf_config: reads config.json.
      hf_modules: names in safetensors files, without prefix.
      hf_prefixes: prefixes that the names may have; the first that matches is used.
      hf_heads: full names of the head; not loaded where it is tied to the embedding.
      hf_ignored: patterns (fnmatch) of tensors that are left out on purpose, with a note.
      hf_edits: module to edit.
      end: the token that ends a text where no file names one, as in transformers; or None.
      gguf_arch: value of a GGUF's `general.architecture`, or None where llama.cpp has none.
      gguf_config: reads a GGUF header, given the vocabulary size and whether the head is tied.
      gguf_modules: names in GGUF files.
      gguf_edits: module to edit.
    """

    name: str
    hf_types: tuple[str, ...]
    hf_config: Callable[[Settings], ModelConfig]
    hf_modules: Mapping[str, str]
    hf_prefixes: tuple[str, ...] = ("model.", "")
    hf_heads: tuple[str, ...] = ("lm_head",)
    hf_ignored: tuple[str, ...] = ()
    hf_edits: Mapping[str, Edit] = dataclasses.field(default_factory=dict)
    end: int | None = None
    gguf_arch: str | None = None
    gguf_config: Callable[[Settings, int, bool], ModelConfig] | None = None
    gguf_modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gguf_edits: Mapping[str, Edit] = dataclasses.field(default_factory=dict)


DERIVED = (
    "*rotary_emb.*inv_freq", "*.inv_freq", "*cos_cached", "*sin_cached", "*embed_scale",
    "*position_ids", "*.masked_bias", "*.attn.bias", "*.self_attn.bias",
)  # fmt: skip
"""Patterns of tensors that follow from the config and that older versions stored."""

HF_MODULES = {
    "embed": "embed_tokens",
    "final_norm": "norm",
    "layers.attn_norm": "layers.{i}.input_layernorm",
    "layers.mlp_norm": "layers.{i}.post_attention_layernorm",
    "layers.q": "layers.{i}.self_attn.q_proj",
    "layers.k": "layers.{i}.self_attn.k_proj",
    "layers.v": "layers.{i}.self_attn.v_proj",
    "layers.o": "layers.{i}.self_attn.o_proj",
    "layers.q_norm": "layers.{i}.self_attn.q_norm",
    "layers.k_norm": "layers.{i}.self_attn.k_norm",
    "layers.gate": "layers.{i}.mlp.gate_proj",
    "layers.up": "layers.{i}.mlp.up_proj",
    "layers.down": "layers.{i}.mlp.down_proj",
}

GGUF_MODULES = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "layers.attn_norm": "blk.{i}.attn_norm",
    "layers.mlp_norm": "blk.{i}.ffn_norm",
    "layers.q": "blk.{i}.attn_q",
    "layers.k": "blk.{i}.attn_k",
    "layers.v": "blk.{i}.attn_v",
    "layers.o": "blk.{i}.attn_output",
    "layers.q_norm": "blk.{i}.attn_q_norm",
    "layers.k_norm": "blk.{i}.attn_k_norm",
    "layers.gate": "blk.{i}.ffn_gate",
    "layers.up": "blk.{i}.ffn_up",
    "layers.down": "blk.{i}.ffn_down",
}

_ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


def activation(settings: Settings, key: str, default: str) -> Any:
    """The activation that a config.json names.

    Args:
      settings: config.json.
      key: its key.
      default: the name to use where the key is absent, as config.json spells it.

    Returns:
      The name in `layers.ACTIVATIONS`.

    Raises:
      ConfigError: an activation that is not implemented.
    """
    name = settings.take(key, default)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ConfigError(f"{key}: expected one of {sorted(_ACTIVATIONS)}, got {shown(name)}")
    return _ACTIVATIONS[name]


def head_width(width: int, heads: int) -> int:
    """Channels per head of a model that does not say it.

    Args:
      width: of the model.
      heads: how many.

    Returns:
      Their quotient, rounded down.

    Raises:
      ConfigError: there are more heads than channels.
    """
    if heads > width:
        raise ConfigError(f"expected at least as many channels as heads, got {width} and {heads}")
    return width // heads

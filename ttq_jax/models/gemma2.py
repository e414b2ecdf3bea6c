"""Gemma 2 (Gemma Team, 2024): Gemma 3 with soft caps, one rotation and no norms on q and k."""

from ttq_jax.config import ModelConfig
from ttq_jax.models.family import (
    Family,
    Settings,
    gguf_rope,
    head_width,
    hf_rope,
    ignore_common,
)
from ttq_jax.models.gemma3 import FAMILY as GEMMA3
from ttq_jax.models.sizes import every, gguf_sizes, hf_sizes, sliding_layers

_WINDOW, _ATTENTION_CAP, _LOGIT_CAP = 4096, 50.0, 30.0


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "gemma2" describes.

    Args:
      s: config.json. Absent keys mean transformers' defaults, which released files rely on.

    Returns:
      Its config.
    """
    ignore_common(s)
    s.require("use_bidirectional_attention", False)
    # Most files have both; transformers reads the one that Llama has not.
    s.ignore("hidden_act")
    sizes = hf_sizes(
        s, activation=("hidden_activation", "gelu_pytorch_tanh"), head_dim=256, hidden_size=2304,
        intermediate_size=9216, max_position_embeddings=8192, num_attention_heads=8,
        num_hidden_layers=26, num_key_value_heads=4, vocab_size=256_000,
    )  # fmt: skip
    types, n_layers = s.take("layer_types", None), sizes["n_layers"]
    bias = s.flag("attention_bias", False)

    def cap(key: str, absent: float) -> float | None:
        return s.number(key, None if s.is_null(key) else absent)

    window = s.integer("sliding_window", None if s.is_null("sliding_window") else _WINDOW)
    sliding = every(2, n_layers) if types is None else sliding_layers(types, n_layers)
    sizes["query_scale"] = s.number("query_pre_attn_scalar", 256) ** -0.5
    return ModelConfig(
        family="gemma2",
        **sizes,
        norm="rms_plus_one",
        norm_placement="sandwich",
        qkv_bias=bias,
        o_bias=bias,
        rope=hf_rope(s),
        sliding_window=window,
        sliding_layers=sliding if window else (),
        embed_scale=sizes["d_model"] ** 0.5,
        tie_embeddings=s.flag("tie_word_embeddings", True),
        attn_softcap=cap("attn_logit_softcapping", _ATTENTION_CAP),
        logit_softcap=cap("final_logit_softcapping", _LOGIT_CAP),
    )


def gguf_config(s: Settings, vocab_size: int, tied: bool) -> ModelConfig:
    """The model that a GGUF header of architecture "gemma2" describes.

    Args:
      s: the header.
      vocab_size: rows of the embedding.
      tied: whether the file has no head of its own.

    Returns:
      Its config.
    """
    sizes = gguf_sizes(s, "gemma2", head_dim=256)
    s.require("gemma2.rope.dimension_count", sizes["head_dim"])
    # The header has no query_pre_attn_scalar; only the 27B, known by its 46 layers, sets it apart.
    if sizes["n_layers"] == 46:
        sizes["query_scale"] = head_width(sizes["d_model"], sizes["n_heads"]) ** -0.5
    return ModelConfig(
        family="gemma2",
        vocab_size=vocab_size,
        **sizes,
        norm="rms_plus_one",
        norm_placement="sandwich",
        activation="gelu_tanh",
        rope=gguf_rope(s, "gemma2"),
        sliding_window=s.integer("gemma2.attention.sliding_window", _WINDOW),
        sliding_layers=every(2, sizes["n_layers"]),
        embed_scale=sizes["d_model"] ** 0.5,
        tie_embeddings=tied,
        attn_softcap=s.number("gemma2.attn_logit_softcapping", _ATTENTION_CAP),
        logit_softcap=s.number("gemma2.final_logit_softcapping", _LOGIT_CAP),
    )


FAMILY = Family(
    name="gemma2",
    hf_types=("gemma2",),
    hf_config=hf_config,
    end=1,
    hf_modules=GEMMA3.hf_modules,
    gguf_arch="gemma2",
    gguf_config=gguf_config,
    gguf_modules=GEMMA3.gguf_modules,
    gguf_edits=GEMMA3.gguf_edits,
)

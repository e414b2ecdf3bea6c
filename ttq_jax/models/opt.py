"""OPT, 125M to 66B (Zhang et al., 2022), including the post-norm 350M with projected embeddings."""

from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.models.family import Family, Settings, activation, ignore_common


def hf_config(s: Settings) -> ModelConfig:
    """The model that a config.json of `model_type` "opt" describes.

    Args:
      s: config.json.

    Returns:
      Its config.

    Raises:
      ConfigError: a width that the heads do not divide.
    """
    ignore_common(s)
    s.ignore("dropout", "activation_dropout", "layerdrop", "init_std", "output_projection")
    s.require("layer_norm_elementwise_affine", True)
    width, heads = s.integer("hidden_size"), s.integer("num_attention_heads")
    if width % heads:
        raise ConfigError(f"num_attention_heads must divide hidden_size, got {heads} and {width}")
    pre = s.flag("do_layer_norm_before", True)
    bias = s.flag("enable_bias", True)
    removed = s.flag("_remove_final_layer_norm", False)
    return ModelConfig(
        family="opt",
        vocab_size=s.integer("vocab_size"),
        d_model=width,
        embed_dim=s.integer("word_embed_proj_dim", width),
        n_layers=s.layers("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=width // heads,
        d_ff=s.integer("ffn_dim"),
        max_positions=s.integer("max_position_embeddings", 2048),
        query_scale=(width // heads) ** -0.5,
        norm="layer",
        norm_placement="pre" if pre else "post",
        final_norm=pre and not removed,
        activation=activation(s, "activation_function", "relu"),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        tie_embeddings=s.flag("tie_word_embeddings", True),
    )


FAMILY = Family(
    name="opt",
    hf_types=("opt",),
    hf_config=hf_config,
    end=2,
    hf_prefixes=("model.decoder.", "decoder."),
    hf_modules={
        "embed": "embed_tokens",
        "positions": "embed_positions",
        "project_in": "project_in",
        "project_out": "project_out",
        "final_norm": "final_layer_norm",
        "layers.attn_norm": "layers.{i}.self_attn_layer_norm",
        "layers.mlp_norm": "layers.{i}.final_layer_norm",
        "layers.q": "layers.{i}.self_attn.q_proj",
        "layers.k": "layers.{i}.self_attn.k_proj",
        "layers.v": "layers.{i}.self_attn.v_proj",
        "layers.o": "layers.{i}.self_attn.out_proj",
        "layers.up": "layers.{i}.fc1",
        "layers.down": "layers.{i}.fc2",
    },
    # Position 0 is row 2 of the table; the first two rows are never read.
    hf_edits={"positions": "skip_two_rows"},
)

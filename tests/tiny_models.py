"""Tiny random Hugging Face checkpoints of every family and variant, written by transformers."""

import json
from pathlib import Path

VOCAB = 264

_BASE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None,
}  # fmt: skip
_QWEN3 = _BASE | {"head_dim": 24}
_GEMMA3 = _BASE | {
    "head_dim": 16, "num_hidden_layers": 4, "sliding_window": 4, "query_pre_attn_scalar": 20,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "pad_token_id": 0,
}  # fmt: skip
_GEMMA2 = {k: v for k, v in _GEMMA3.items() if k != "layer_types"} | {
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5,
}  # fmt: skip
_OPT = {
    "vocab_size": VOCAB, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 40, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": 1, "word_embed_proj_dim": 64,
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
_TWO_THETAS = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

_EXPERTS = _BASE | {"num_experts": 8, "num_experts_per_tok": 3}
_QWEN3_MOE = _EXPERTS | {"head_dim": 24, "moe_intermediate_size": 40, "norm_topk_prob": True}

# name: (transformers' config class, its arguments)
VARIANTS = {
    "llama-gqa-untied": ("LlamaConfig", _BASE),
    "llama-mqa-tied": (
        "LlamaConfig", _BASE | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "llama-mha-biases": (
        "LlamaConfig", _BASE | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-llama3-rope": ("LlamaConfig", _BASE | {"rope_parameters": _LLAMA3_ROPE}),
    "llama-linear-rope": (
        "LlamaConfig",
        _BASE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "qwen3": ("Qwen3Config", _QWEN3),
    "qwen3-tied-biases": (
        "Qwen3Config", _QWEN3 | {"tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen3-sliding": (
        "Qwen3Config",
        _QWEN3 | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "gemma3": ("Gemma3TextConfig", _GEMMA3),
    "gemma3-two-thetas-softcaps": (
        "Gemma3TextConfig",
        _GEMMA3
        | {
            "rope_parameters": _TWO_THETAS, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5, "num_key_value_heads": 1,
        },
    ),
    "gemma3-untied": ("Gemma3TextConfig", _GEMMA3 | {"tie_word_embeddings": False}),
    "gemma2": ("Gemma2Config", _GEMMA2),
    "gemma2-no-caps-untied": (
        "Gemma2Config",
        _GEMMA2
        | {
            "attn_logit_softcapping": None, "final_logit_softcapping": None,
            "tie_word_embeddings": False, "attention_bias": True,
        },
    ),
    "qwen2": ("Qwen2Config", _BASE),
    "qwen2-sliding-tied": (
        "Qwen2Config",
        _BASE
        | {
            "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "mistral-window": ("MistralConfig", _BASE | {"sliding_window": 4}),
    "mistral-nemo": ("MistralConfig", _BASE | {"sliding_window": None, "head_dim": 24}),
    "phi3": ("Phi3Config", _BASE),
    "phi3-window-tied": (
        "Phi3Config",
        _BASE | {"sliding_window": 5, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "smollm3": ("SmolLM3Config", _BASE | {"num_hidden_layers": 5}),
    "smollm3-list-sliding": (
        "SmolLM3Config",
        _BASE
        | {
            "no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": 4,
            "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True,
        },
    ),
    "olmo2": ("Olmo2Config", _BASE),
    "olmo2-tied-biases": (
        "Olmo2Config", _BASE | {"tie_word_embeddings": True, "attention_bias": True},
    ),
    "granite": (
        "GraniteConfig",
        _BASE
        | {
            "embedding_multiplier": 3.0, "logits_scaling": 1.5, "residual_multiplier": 0.4,
            "attention_multiplier": 0.15, "tie_word_embeddings": True,
        },
    ),
    "granite-untied-biases": (
        "GraniteConfig", _BASE | {"attention_bias": True, "mlp_bias": True},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", _QWEN3_MOE),
    "qwen3-moe-raw-weights-window": (
        "Qwen3MoeConfig",
        _QWEN3_MOE
        | {
            "norm_topk_prob": False, "attention_bias": True, "tie_word_embeddings": True,
            "use_sliding_window": True, "sliding_window": 4,
        },
    ),
    "mixtral": (
        "MixtralConfig", _BASE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral-window": ("MixtralConfig", _BASE | {"sliding_window": 4, "num_local_experts": 3}),
    "olmoe": ("OlmoeConfig", _EXPERTS),
    "olmoe-normed-weights": (
        "OlmoeConfig", _EXPERTS | {"norm_topk_prob": True, "num_key_value_heads": 4},
    ),
    "opt": ("OPTConfig", _OPT),
    "opt-350m": ("OPTConfig", _OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "opt-no-final-norm": ("OPTConfig", _OPT | {"_remove_final_layer_norm": True}),
    "opt-no-bias": ("OPTConfig", _OPT | {"enable_bias": False}),
}  # fmt: skip


def make_model(variant: str, seed: int = 0):
    """A random transformers model in which nothing is trivially one or zero."""
    import torch
    import transformers

    kind, arguments = VARIANTS[variant]
    config = getattr(transformers, kind)(**arguments)
    config._attn_implementation = _capped_attention() if "Gemma3" in kind else "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomize(model, torch.Generator().manual_seed(seed))
    return model


def _capped_attention() -> str:
    """Name of an attention that applies Gemma3's score cap.

    transformers 5.23 reads `attn_logit_softcapping` and then forgets to pass it on.
    """
    import transformers
    from transformers.masking_utils import eager_mask
    from transformers.models.gemma3 import modeling_gemma3

    def attention(module, *args, **kwargs):
        cap = getattr(module, "attn_logit_softcapping", None)
        return modeling_gemma3.eager_attention_forward(module, *args, softcap=cap, **kwargs)

    transformers.AttentionInterface.register("eager_capped", attention)
    transformers.AttentionMaskInterface.register("eager_capped", eager_mask)
    return "eager_capped"


def randomize(model, generator) -> None:
    """Random weights at which activations and logits are of order one."""
    import torch

    plus_one = "gemma" in model.config.model_type
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif "norm" in name:
                p.copy_(0.3 * noise + (0.0 if plus_one else 1.0))
            elif "embed" in name:
                p.copy_(0.3 * noise)
            else:
                p.copy_(noise * p.shape[-1] ** -0.5)
    model.tie_weights()


def write_tokenizer(directory: Path, **settings) -> None:
    """A byte-level tokenizer: 256 bytes, "<s>" (256) and "</s>" (257)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_checkpoint(directory: Path, variant: str, *, seed: int = 0, shard: str = "1GB"):
    """Saves a tiny checkpoint with its tokenizer; returns the transformers model."""
    model = make_model(variant, seed)
    model.save_pretrained(directory, max_shard_size=shard)
    write_tokenizer(Path(directory))
    return model


def edit_config(directory: Path, *drop: str, **changes) -> None:
    """Changes keys of a checkpoint's config.json, and drops others."""
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))

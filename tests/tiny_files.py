"""A tiny random Llama as files, written without torch: what the command line is tried on."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WIDTH, FFN, LAYERS, HEADS, KV, VOCAB, CONTEXT = 64, 96, 2, 4, 2, 264, 256

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
    "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "bos_token_id": 256,
    "eos_token_id": 257, "tie_word_embeddings": True, "torch_dtype": "float32",
}  # fmt: skip


def tensors(seed: int = 0, width: int = WIDTH) -> dict[str, np.ndarray]:
    """Random weights under the names of a Llama checkpoint."""
    rng = np.random.default_rng(seed)
    kv = width * KV // HEADS

    def linear(d_out, d_in):
        return (rng.normal(size=(d_out, d_in)) * d_in**-0.5).astype(np.float32)

    out = {
        "model.embed_tokens.weight": 0.3 * linear(VOCAB, width) * width**0.5,
        "model.norm.weight": np.exp(0.3 * rng.normal(size=width)).astype(np.float32),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{at}{norm}.weight"] = np.exp(rng.normal(size=width)).astype(np.float32)
        for name, shape in {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (FFN, width), "mlp.up_proj": (FFN, width),
            "mlp.down_proj": (width, FFN),
        }.items():  # fmt: skip
            out[f"{at}{name}.weight"] = linear(*shape)
    return out


def write_model(directory: Path, *, bos: bool = True, seed: int = 0, **config) -> Path:
    """A loadable directory; its tokenizer has a token per byte, "<s>" and "</s>"."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors(seed), str(directory / "model.safetensors"))
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": bos}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory

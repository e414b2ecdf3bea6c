"""Tiny GGUF files, written by hand from transformers models as llama.cpp's converter would."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
_PRE_NORM = {"post_attention_layernorm": "ffn_norm"}
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
# Their converters reorder the rotated channels.
_REORDERED = {"llama", "smollm3", "granite"}


def _permute(w: np.ndarray, heads: int) -> np.ndarray:
    """The order of rotated channels that llama.cpp keeps for the llama architecture."""
    halves = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:])
    return halves.swapaxes(1, 2).reshape(w.shape)


def tensors_of(model, arch: str) -> dict[str, np.ndarray]:
    """The tensors of a transformers model under llama.cpp's names and conventions."""
    config, out = model.config, {}
    names = _NAMES | (_SANDWICH if arch in {"gemma2", "gemma3", "olmo2"} else _PRE_NORM)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, kind = name.rsplit(".", 1)
        block = ""
        if module.endswith("mlp.experts"):
            array = value.numpy().copy()
            halves = dict(zip(("gate", "up"), np.split(array, 2, axis=1), strict=True))
            for part, one in (halves if kind == "gate_up_proj" else {"down": array}).items():
                out[f"blk.{module.split('.')[2]}.ffn_{part}_exps.weight"] = one
            continue
        if module.startswith("model.layers."):
            layer, module = module.removeprefix("model.layers.").split(".", 1)
            block = f"blk.{layer}."
        new, array = names[module], value.numpy().copy()
        if arch in _REORDERED and new in heads:
            array = _permute(array, heads[new])
        if arch.startswith("gemma") and new.endswith("norm"):
            array = array + 1
        out[f"{block}{new}.{kind}"] = array
    return out


def header_of(model, arch: str) -> dict:
    """The architecture's keys for a transformers model, without the tokenizer's."""
    c = model.config
    rope = c.rope_parameters
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    keys = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
    }
    if arch.startswith("gemma"):
        keys["attention.sliding_window"] = c.sliding_window
    if arch == "gemma2":
        keys["attn_logit_softcapping"] = c.attn_logit_softcapping
        keys["final_logit_softcapping"] = c.final_logit_softcapping
    if arch == "granite":
        keys["attention.scale"] = c.attention_multiplier
        keys["embedding_scale"] = c.embedding_multiplier
        keys["residual_scale"] = c.residual_multiplier
        keys["logit_scale"] = c.logits_scaling
    experts = getattr(c, "num_local_experts", 0)
    if experts:
        keys["expert_count"] = experts
        keys["expert_used_count"] = c.num_experts_per_tok
        keys["expert_feed_forward_length"] = getattr(c, "moe_intermediate_size", None)
    return {f"{arch}.{k}": v for k, v in keys.items() if v is not None}


def random_llama(width: int = 64) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and tensors of the Llama of `tiny_files`, for tests without torch."""
    from tiny_files import CONFIG, HEADS, VOCAB, tensors

    sizes = {"hidden_size": width, "head_dim": width // HEADS}
    rope = {"rope_theta": CONFIG["rope_theta"]}
    config = SimpleNamespace(**CONFIG | sizes, rope_parameters=rope)
    found = tensors(width=width).items()
    state = {name: SimpleNamespace(numpy=lambda w=w: w) for name, w in found}
    model = SimpleNamespace(config=config, state_dict=lambda: state)
    return header_of(model, "llama") | tokenizer_header(VOCAB), tensors_of(model, "llama")


def random_mixtral(experts: int = 4) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and tensors of a Mixtral of that Llama's sizes."""
    header, tensors = random_llama()
    rng = np.random.default_rng(1)
    for name in [name for name in tensors if ".ffn_" in name and "norm" not in name]:
        rows, columns = tensors.pop(name).shape
        stack = rng.normal(size=(experts, rows, columns)) * columns**-0.5
        tensors[name.replace(".weight", "_exps.weight")] = stack.astype(np.float32)
        if ".ffn_gate." in name:
            router = rng.normal(size=(experts, columns)).astype(np.float32)
            tensors[name.replace("ffn_gate", "ffn_gate_inp")] = router
    return header | {"llama.expert_count": experts, "llama.expert_used_count": 2}, tensors


def tokenizer_header(size: int) -> dict:
    """A byte-level vocabulary of that size."""
    from tokenizers import pre_tokenizers

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [*(f"<extra{i}>" for i in range(size - len(tokens) - 1)), "ab"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3] * (size - 257) + [1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
    }


# llama.cpp, which writes and reads them so, takes no other.
_TYPES = {"split.no": "uint16", "split.count": "uint16", "split.tensors.count": "int32"}


def _add(writer, key: str, value) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    kind = kinds[type(value)]
    getattr(writer, f"add_{_TYPES.get(key, kind) if kind == 'uint32' else kind}")(key, value)


def write_gguf(
    path: Path, arch: str, header: dict, tensors: dict, types=None, *, encoded: bool = False
) -> None:
    """Writes a GGUF file.

    `types` maps tensor names to quantized types; the others are F32. With `encoded`, tensors of
    such types are their bytes already.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in header.items():
        _add(writer, key, value)
    for name, array in tensors.items():
        told = (types or {}).get(name, "F32")
        kind = gguf.GGMLQuantizationType[told]
        data = array if encoded and name in (types or {}) else gguf.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_parts(
    stem: Path, header: dict, tensors: dict, *, count: int, first: int = 0
) -> list[Path]:
    """Writes a model as llama.cpp's gguf-split does; returns the parts' paths.

    The first part has the metadata and the first `first` tensors; the others share the rest.
    """
    names, paths = list(tensors), []
    for i in range(count):
        path = stem.with_name(f"{stem.name}-{i + 1:05}-of-{count:05}.gguf")
        split = {"split.no": i, "split.count": count, "split.tensors.count": len(tensors)}
        mine = names[:first] if not i else names[first + i - 1 :: count - 1]
        here = {name: tensors[name] for name in mine}
        write_gguf(path, "llama", (header if not i else {}) | split, here)
        paths.append(path)
    return paths

"""Small sound files of every kind that the package reads, for `fuzz_files.py` to damage."""

import io
import json
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import sentencepiece
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ttq_jax.checkpoint import load
from ttq_jax.checkpoint.assemble import _Leaf, _leaves
from ttq_jax.checkpoint.huggingface import read_config
from ttq_jax.checkpoint.store import save_conversation, save_offline
from ttq_jax.config import ModelConfig
from ttq_jax.models.family import Family
from ttq_jax.offline.calibrate import prepare
from ttq_jax.prefill import first_turn
from ttq_jax.quant.presets import preset
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.recipe_text import to_toml
from ttq_jax.quant.source import Source

_VOCAB = 264
_BASE = {
    "vocab_size": _VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 256, "eos_token_id": [257],
    "tie_word_embeddings": True, "torch_dtype": "float32", "transformers_version": "5.0.0",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _BASE | {
        "model_type": "llama", "hidden_act": "silu", "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen3": _BASE | {
        "model_type": "qwen3", "head_dim": 16, "use_sliding_window": True, "sliding_window": 8,
        "max_window_layers": 1, "tie_word_embeddings": False,
    },
    "gemma3": _BASE | {
        "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8,
        "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"],
    },
    "opt": {
        "model_type": "opt", "vocab_size": _VOCAB, "hidden_size": 32, "ffn_dim": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
        "word_embed_proj_dim": 16, "do_layer_norm_before": False, "bos_token_id": 256,
        "eos_token_id": 257,
    },
}  # fmt: skip

RTN = preset("rtn", bits=4, group_size=16)
CHAT = Recipe(moments=Source(decay=0.5), select="layers/q")

SWEEP = """
model = "smollm2"
corpus = ["mine=text.txt", "python=builtin:python"]
window = 256
prompt_tokens = 128
max_windows = 4

[[part]]
recipe = ["none", "rtn"]
bits = [3, 4]

[[part]]
recipe = "ttq"
"scale.alpha" = [0.25, 0.5]
moments.prior_tokens = 16.0
"""
_WIDTHS = '\n[[widths]]\nselect = "layers/0/down"\nbits = 5\ngroup_size = 32\n'


def _tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"he": 258, "ll": 259}
    tokenizer = Tokenizer(models.BPE(vocab, [("h", "e"), ("l", "l")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [
        {"id": 256 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, text in enumerate(("<s>", "</s>"))
    ]  # fmt: skip
    data["model"]["vocab"] |= {"<s>": 256, "</s>": 257}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))


def leaves_of(config: ModelConfig, family: Family, *, in_gguf: bool) -> list[_Leaf]:
    """The arrays of a model and their names in a file."""
    if in_gguf:
        return _leaves(config, family.gguf_modules, family.gguf_edits)
    named = {k: family.hf_prefixes[0] + v for k, v in family.hf_modules.items()}
    return _leaves(config, named | {"head": family.hf_heads[0]}, family.hf_edits)


def _tensors(leaves: list[_Leaf], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {name: leaf.stored_shape for leaf in leaves for name in leaf.names}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _checkpoint(folder: Path, config: dict[str, Any], *, shards: int = 1) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    _tokenizer(folder)
    family, made, _ = read_config(folder)
    tensors = _tensors(leaves_of(made, family, in_gguf=False), seed=len(folder.name))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    files = {name: f"model-{i % shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _vocabulary(arch: str) -> dict[str, Any]:
    """The tokenizer's keys: byte-level for Llama and Qwen3, SentencePiece for Gemma3."""
    key = "tokenizer.ggml."
    if arch != "gemma3":
        tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "he", "ll"]
        made: dict[str, Any] = {"model": "gpt2", "pre": "smollm", "merges": ["h e", "l l"]}
        kinds = [1] * 256 + [3, 3, 1, 1]
    else:
        tokens = ["<eos>", "<bos>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "h", "e", "he", "l"]
        kinds = [3, 3] + [6] * 256 + [1] * 5
        made = {"model": "llama", "scores": [-float(i) for i in range(len(tokens))],
                "unknown_token_id": 1, "add_space_prefix": False}  # fmt: skip
    made |= {"tokens": tokens, "token_type": kinds, "bos_token_id": tokens.index("<s>")
             if "<s>" in tokens else 1, "eos_token_id": 257 if arch != "gemma3" else 0,
             "add_bos_token": True}  # fmt: skip
    return {key + name: value for name, value in made.items()}


def _pieces(folder: Path) -> None:
    """A tokenizer.model in place of the tokenizer's other files."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["he hell heel hello"] * 9), model_writer=made, vocab_size=_VOCAB,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()


def _gguf(folder: Path, arch: str, source: Path, *, parts: int = 1) -> None:
    """A file of each third storage type, or as many parts."""
    family, config, _ = read_config(source)
    header = {
        "block_count": config.n_layers, "context_length": config.max_positions,
        "embedding_length": config.d_model, "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads, "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }  # fmt: skip
    header = {f"{arch}.{name}": value for name, value in header.items()} | _vocabulary(arch)
    if arch == "gemma3":
        header["gemma3.attention.sliding_window"] = 8
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    tensors = _tensors(leaves_of(config, family, in_gguf=True), seed=5)
    folder.mkdir()
    for part in range(parts):
        name = "model" if parts == 1 else f"model-{part + 1:05}-of-{parts:05}"
        writer = gguf.GGUFWriter(str(folder / f"{name}.gguf"), arch)
        split = {"split.no": part, "split.count": parts, "split.tensors.count": len(tensors)}
        said = ({} if part else header) | (split if parts > 1 else {})
        for key, value in said.items():
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)
        for i, (key, array) in enumerate(tensors.items()):
            if i % parts == part:
                type_ = ("F32", "Q8_0", "F16")[i // parts % 3] if array.ndim == 2 else "F32"
                kind = gguf.GGMLQuantizationType[type_]
                writer.add_tensor(key, gguf.quants.quantize(array, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def write_inputs(root: Path) -> None:
    """Writes all of them, each kind into a folder of its own."""
    for name, config in CONFIGS.items():
        _checkpoint(root / name, config)
        if name != "opt":
            _gguf(root / f"gguf_{name}", name, root / name)
    _gguf(root / "gguf_split", "llama", root / "llama", parts=3)
    _checkpoint(root / "sharded", CONFIGS["llama"], shards=3)
    _checkpoint(root / "sentencepiece", CONFIGS["llama"])
    _pieces(root / "sentencepiece")
    model = load(root / "llama")
    assert RTN is not None
    save_offline(root / "offline", model, RTN, prepare(model, RTN))
    moments = jax.tree.map(lambda a: a + 1, first_turn(model.params, model.config, CHAT))
    save_conversation(root / "conversation", model, CHAT, moments)
    (root / "recipe").mkdir()
    best = preset("best")
    assert best is not None
    (root / "recipe" / "recipe.toml").write_text(to_toml(best) + _WIDTHS)
    (root / "sweep").mkdir()
    (root / "sweep" / "sweep.toml").write_text(SWEEP)
    (root / "lines").mkdir()
    rows = [{"text": f"A text, déjà vu, number {i}.", "id": i, "size": 1.5} for i in range(8)]
    rows[3]["text"] = ["two", "texts\u2028in one"]
    lines = "\n".join(json.dumps(row, ensure_ascii=i % 2 > 0) for i, row in enumerate(rows))
    (root / "lines" / "corpus.jsonl").write_text(lines + "\n")
    (root / "rows").mkdir()
    kept = Path(__file__).parent / "results" / "protocols_smollm2" / "rows.jsonl"
    (root / "rows" / "rows.jsonl").write_bytes(kept.read_bytes())

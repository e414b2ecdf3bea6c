"""GGUF files: every storage type, every architecture, and what must be refused."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_same_logits
from tiny_gguf import header_of, tensors_of, tokenizer_header, write_gguf
from tiny_models import VARIANTS, VOCAB, make_model

from ttq_jax.checkpoint import CheckpointError, load

TOKENS = np.random.default_rng(0).integers(2, VOCAB, (2, 12))


CASES = {
    "llama-gqa-untied": ("llama", {}),
    "llama-mha-biases": ("llama", {}),
    "llama-mqa-tied": ("llama", {}),
    "llama-linear-rope": (
        "llama", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 3.0},
    ),
    # Mistral's files call themselves Llama's.
    "mistral-nemo": ("llama", {}),
    "qwen2": ("qwen2", {"qwen2.rope.dimension_count": 16}),
    "phi3": ("phi3", {"phi3.rope.dimension_count": 16}),
    "phi3-window-tied": ("phi3", {"phi3.attention.sliding_window": 5}),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
    "olmo2-tied-biases": ("olmo2", {}),
    "granite": ("granite", {}),
    "granite-untied-biases": ("granite", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-biases": ("qwen3", {}),
    "qwen3-moe": ("qwen3moe", {}),
    # Mixtral's files, too, call themselves Llama's.
    "mixtral": ("llama", {"llama.rope.dimension_count": 16}),
    "olmoe": ("olmoe", {}),
}  # fmt: skip


@pytest.mark.parametrize("variant", list(CASES))
def test_architectures_match_transformers(variant, tmp_path):
    arch, extra = CASES[variant]
    reference = make_model(variant)
    header = header_of(reference, arch) | tokenizer_header(VOCAB) | extra
    path = tmp_path / "m.gguf"
    write_gguf(path, arch, header, tensors_of(reference, arch))
    model = load(path)
    assert model.config.tie_embeddings == reference.config.tie_word_embeddings
    assert_same_logits(reference, model, TOKENS)


# Gemma3's header does not say what it takes for granted: every sixth layer is full, its own
# rotation has theta 10000, and queries are scaled by the head's width.
GEMMA = {
    "num_hidden_layers": 7,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]),
    "query_pre_attn_scalar": 16,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}


@pytest.mark.parametrize("period", [None, 6, 3, "list"])
def test_gemma3_matches_transformers(period, tmp_path, monkeypatch):
    changes, extra = dict(GEMMA), {}
    if period == 3:
        full, sliding = "full_attention", "sliding_attention"
        changes["layer_types"] = [sliding, sliding, full, sliding, sliding, full, sliding]
    if period is not None:
        flags = [kind == "sliding_attention" for kind in changes["layer_types"]]
        extra["gemma3.attention.sliding_window_pattern"] = flags if period == "list" else period
    kind, base = VARIANTS["gemma3"]
    monkeypatch.setitem(VARIANTS, "here", (kind, base | changes))
    reference = make_model("here")
    header = header_of(reference, "gemma3") | tokenizer_header(VOCAB) | extra
    header |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    path = tmp_path / "m.gguf"
    write_gguf(path, "gemma3", header, tensors_of(reference, "gemma3"))
    assert_same_logits(reference, load(path), TOKENS)


def test_gemma2_matches_transformers(tmp_path, monkeypatch):
    """Its header says neither which layers slide nor how queries are scaled."""
    kind, base = VARIANTS["gemma2"]
    monkeypatch.setitem(VARIANTS, "here", (kind, base | {"query_pre_attn_scalar": 16}))
    reference = make_model("here")
    header = header_of(reference, "gemma2") | tokenizer_header(VOCAB)
    write_gguf(tmp_path / "m.gguf", "gemma2", header, tensors_of(reference, "gemma2"))
    model = load(tmp_path / "m.gguf")
    assert model.config.sliding_layers == (True, False, True, False)
    assert_same_logits(reference, model, TOKENS)


def llama3_factors(head_dim, theta, factor, low, high, original):
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def test_llama3_scaling_is_recognized_from_its_factors(tmp_path, monkeypatch):
    kind, base = VARIANTS["llama-llama3-rope"]
    rope = base["rope_parameters"] | {"original_max_position_embeddings": 8192, "factor": 32.0}
    monkeypatch.setitem(VARIANTS, "here", (kind, base | {"rope_parameters": rope}))
    reference = make_model("here")
    factors = llama3_factors(16, 1e4, 32.0, 1.0, 4.0, 8192)
    assert factors.min() == 1 and factors.max() > 10
    header = header_of(reference, "llama") | tokenizer_header(VOCAB)
    tensors = tensors_of(reference, "llama") | {"rope_freqs.weight": factors}
    write_gguf(tmp_path / "m.gguf", "llama", header, tensors)
    model = load(tmp_path / "m.gguf")
    assert model.config.rope.scaling == "llama3"
    assert_same_logits(reference, model, TOKENS)
    tensors["rope_freqs.weight"] = factors**2
    write_gguf(tmp_path / "n.gguf", "llama", header, tensors)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not the rope scaling"):
        load(tmp_path / "n.gguf")


def test_quantized_experts_load_as_their_dequantized_weights(tmp_path):
    reference = make_model("olmoe")
    header = header_of(reference, "olmoe") | tokenizer_header(VOCAB)
    tensors = tensors_of(reference, "olmoe")
    names = [n for n in tensors if "_exps" in n]
    write_gguf(tmp_path / "q.gguf", "olmoe", header, tensors, dict.fromkeys(names, "Q8_0"))
    code, model = gguf.GGMLQuantizationType.Q8_0, load(tmp_path / "q.gguf")
    for part in ("gate", "up", "down"):
        for layer, got in enumerate(np.asarray(model.params["layers"][part]["kernel"])):
            stored = gguf.quants.quantize(tensors[f"blk.{layer}.ffn_{part}_exps.weight"], code)
            want = gguf.quants.dequantize(stored, code).swapaxes(1, 2)
            np.testing.assert_array_equal(got, want)


@pytest.fixture
def parts():
    reference = make_model("llama-gqa-untied")
    return header_of(reference, "llama") | tokenizer_header(VOCAB), tensors_of(reference, "llama")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantized_model_loads_as_its_dequantized_weights(kind, parts, tmp_path):
    header, tensors = parts
    names = [n for n in tensors if ".ffn_" in n and "norm" not in n] + ["token_embd.weight"]
    code = gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "q.gguf", "llama", header, tensors, dict.fromkeys(names, kind))
    rounded = {
        n: gguf.quants.dequantize(gguf.quants.quantize(t, code), code) if n in names else t
        for n, t in tensors.items()
    }
    write_gguf(tmp_path / "f.gguf", "llama", header, rounded)
    ours, expected = load(tmp_path / "q.gguf"), load(tmp_path / "f.gguf")
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(
            ours.params["layers"][name]["kernel"], expected.params["layers"][name]["kernel"]
        )
    np.testing.assert_array_equal(
        ours.params["embed"]["embedding"], expected.params["embed"]["embedding"]
    )


def refuse(path, message):
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_any_truncation_is_refused(parts, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", *parts)
    whole = path.read_bytes()
    assert len(whole) > 50_000
    for size in [5, 20, 100, 3000, 10_000, len(whole) // 2, len(whole) - 40]:
        path.write_bytes(whole[:size])
        refuse(path, "truncated|holds NaN")
    path.write_bytes(b"")
    refuse(path, "truncated")
    path.write_bytes(b"not a model at all, but long enough")
    refuse(path, "not a GGUF file")
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(16))
    refuse(path, "expected GGUF version 2 or 3, little-endian, got 1")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.logit_scale": 0.5}, r"llama\.logit_scale = 0\.5 is not implemented"),
        ({"llama.odd_key": 1}, r"unknown key llama\.odd_key: .* pass --ignore-key llama\.odd_key"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not implemented"),
        ({"llama.rope.scaling.type": "su"}, "'su' is not implemented"),
        ({"llama.expert_count": 8}, r"expected the key 'llama\.expert_used_count'"),
        ({"llama.expert_used_count": 2}, r"llama\.expert_used_count = 2 is not implemented"),
        (
            {"llama.expert_count": 8, "llama.expert_used_count": 2},
            r"missing tensors .*ffn_(gate_inp|\w+_exps)",
        ),
        (
            {
                "llama.expert_count": 8,
                "llama.expert_used_count": 2,
                "llama.expert_gating_func": 2,
            },
            r"llama\.expert_gating_func = 2 is not implemented",
        ),
        ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count = 8 is not implemented"),
        ({"llama.vocab_size": 1000}, r"llama\.vocab_size = 1000"),
        ({"split.count": 3}, "expected a whole model, but by its header it is part 0, counted"),
        (
            {"llama.attention.head_count": "four"},
            r"an integer from 1 to \d+, got 'four'",
        ),
        ({"llama.attention.head_count": 3}, "n_kv_heads must divide n_heads|expected shape"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre = 'tekken' is not implemented"),
    ],
)
def test_headers_that_would_change_the_model_are_refused(extra, message, parts, tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", parts[0] | extra, parts[1])
    refuse(tmp_path / "m.gguf", message)


def test_tensors_must_be_the_expected_ones(parts, tmp_path):
    header, tensors = parts
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", header, tensors | {"blk.0.odd.weight": np.ones(3, np.float32)})
    refuse(path, r"unknown tensor blk\.0\.odd\.weight")
    fewer = {k: v for k, v in tensors.items() if k != "blk.1.ffn_up.weight"}
    path = tmp_path / "n.gguf"
    write_gguf(path, "llama", header, fewer)
    refuse(path, r"missing tensor blk\.1\.ffn_up\.weight .*\(96, 64\)")
    path = tmp_path / "o.gguf"
    write_gguf(path, "llama", header, tensors | {"output_norm.weight": np.ones(3, np.float32)})
    refuse(path, r"output_norm\.weight: expected shape \(64,\), found \(3,\)")
    damaged = tensors["blk.2.attn_v.weight"].copy()
    damaged[3, 5] = np.nan
    path = tmp_path / "p.gguf"
    write_gguf(path, "llama", header, tensors | {"blk.2.attn_v.weight": damaged})
    refuse(path, r"blk\.2\.attn_v\.weight holds NaN or infinity")


def test_other_storage_types_are_refused_by_name(parts, tmp_path):
    header, tensors = parts
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", header, tensors, {"blk.0.ffn_up.weight": "F32"})
    raw = path.read_bytes()
    at = raw.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    path.write_bytes(
        raw[:at] + gguf.GGMLQuantizationType.Q8_K.to_bytes(4, "little") + raw[at + 4 :]
    )
    refuse(path, r"'blk\.0\.ffn_up\.weight' is stored as Q8_K, which .*expected one of F32")


def test_unknown_architecture_lists_the_supported_ones(parts, tmp_path):
    write_gguf(tmp_path / "m.gguf", "mamba", *parts)
    refuse(tmp_path / "m.gguf", "'mamba' is not supported in GGUF files; expected one of gemma2, ")


def test_bfloat16(parts, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", *parts)
    full, half = load(path), load(path, dtype="bfloat16")
    kernel = half.params["layers"]["q"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel, full.params["layers"]["q"]["kernel"].astype(jnp.bfloat16))

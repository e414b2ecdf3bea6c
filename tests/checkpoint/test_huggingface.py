"""Hugging Face directories: the old and new spellings, the wrapped Gemma3, and bad input."""

import json
import shutil
import struct

import jax
import numpy as np
import pytest
import torch
import transformers
from parity import assert_same_logits
from safetensors.torch import load_file, save_file
from tiny_models import (
    VARIANTS,
    edit_config,
    make_model,
    randomize,
    write_checkpoint,
    write_tokenizer,
)

from ttq_jax.checkpoint import CheckpointError, load
from ttq_jax.checkpoint.huggingface import read_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints by variant, written once."""
    made = {}

    def get(variant):
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp(variant)
            write_checkpoint(made[variant], variant)
        return made[variant]

    return get


@pytest.fixture
def copy(saved, tmp_path):
    """A checkpoint of its own for a test that changes it."""

    def get(variant="llama-gqa-untied"):
        return shutil.copytree(saved(variant), tmp_path / variant)

    return get


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refuse(directory, message):
    with pytest.raises(CheckpointError, match=message):
        load(directory)


# What old versions of transformers wrote instead of rope_parameters and dtype.
OLD_KEYS = {
    "llama-gqa-untied": {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float32"},
    "llama-linear-rope": {
        "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 3.0},
    },
    "llama-llama3-rope": {
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "qwen3": {"rope_theta": 10000.0, "rope_scaling": None},
    "gemma3": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
    "gemma3-two-thetas-softcaps": {
        "rope_theta": 5000.0, "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", list(OLD_KEYS))
def test_old_and_new_keys_mean_the_same(variant, copy):
    directory = copy(variant)
    new = read_config(directory)[1]
    edit_config(directory, "rope_parameters", "dtype", **OLD_KEYS[variant])
    assert read_config(directory)[1] == new


def test_gemma3_pattern_instead_of_layer_types(copy):
    directory = copy("gemma3")
    new = read_config(directory)[1]
    edit_config(directory, "layer_types", "_sliding_window_pattern", sliding_window_pattern=2)
    assert read_config(directory)[1] == new


def test_llama_2_needs_no_newer_keys(copy):
    directory = copy("llama-mha-biases")
    edit_config(
        directory, "rope_parameters", "head_dim", "num_key_value_heads", "mlp_bias",
        "attention_bias", pretraining_tp=1, max_length=4096,
    )  # fmt: skip
    config = read_config(directory)[1]
    assert (config.n_kv_heads, config.head_dim, config.rope.theta) == (4, 16, 10000.0)
    assert not config.qkv_bias


def test_text_of_qwen3_vl_is_transformers_own(tmp_path):
    """Its vision tensors are skipped by name, and its three axes of positions are one."""
    text = {
        "vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
        },
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    reference = transformers.Qwen3VLForConditionalGeneration(config).float().eval()
    randomize(reference, torch.Generator().manual_seed(0))
    reference.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model = load(tmp_path)
    assert (model.config.family, model.config.rope.theta) == ("qwen3", 5e6)
    assert any("left out: model.visual." in note for note in model.notes)
    tokens = np.random.default_rng(0).integers(2, 264, (2, 12))
    assert_same_logits(reference, model, tokens)


@pytest.mark.parametrize("layout", ["new", "old"])
def test_text_part_of_a_vision_model(layout, copy):
    directory = copy("gemma3")
    alone = load(directory)
    text = json.loads((directory / "config.json").read_text())
    del text["architectures"], text["tie_word_embeddings"]
    outer = {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text, "vision_config": {"hidden_size": 8}, "mm_tokens_per_image": 4,
        "boi_token_index": 1, "eoi_token_index": 2, "image_token_index": 3,
        "eos_token_id": [257, 258], "initializer_range": 0.02, "transformers_version": "4.50.0",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(outer))
    (directory / "generation_config.json").unlink(missing_ok=True)
    prefixes = {
        "new": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
        "old": ("language_model.model.", "vision_tower.", "multi_modal_projector."),
    }[layout]

    def wrap(tensors):
        for name in list(tensors):
            tensors[prefixes[0] + name.removeprefix("model.")] = tensors.pop(name)
        tensors[prefixes[1] + "x.weight"] = torch.ones(2)
        tensors[prefixes[2] + "x.weight"] = torch.ones(2)

    edit_tensors(directory, wrap)
    inside = load(directory)
    assert inside.config == alone.config
    assert inside.eos_ids == (257, 258)
    left_out = ", ".join(sorted(f"{prefix}x.weight" for prefix in prefixes[1:]))
    assert f"only the text model is read; left out: {left_out}" in inside.notes
    jax.tree.map(np.testing.assert_array_equal, inside.params, alone.params)
    text["odd_key"] = 1
    (directory / "config.json").write_text(json.dumps(outer))
    refuse(directory, r"unknown key text_config\.odd_key")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_files(kind, copy):
    directory = copy()
    edit_tensors(directory, lambda t: t.update({k: v.to(kind) for k, v in t.items()}))
    stored = load_file(directory / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    ours = load(directory).params["layers"]["up"]["kernel"]
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours[1].T, stored.float().numpy())


def test_dtype_and_progress(saved):
    seen = []
    model = load(saved("opt-350m"), dtype="bfloat16", progress=lambda *step: seen.append(step))
    assert {a.dtype.name for a in jax.tree.leaves(model.params)} == {"bfloat16"}
    assert seen[-1] == (seen[-1][1], seen[-1][1], "weights")
    assert seen == sorted(seen)
    with pytest.raises(CheckpointError, match="expected float32 or bfloat16, got 'int8'"):
        load(saved("opt-350m"), dtype="int8")


def test_end_of_text_tokens(copy):
    directory = copy()
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert load(directory).eos_ids == (5, 6, 257)
    (directory / "generation_config.json").unlink()
    assert load(directory).eos_ids == (257,)


def test_begin_of_text_follows_the_tokenizer(copy):
    directory = copy()
    assert load(directory).tokenizer.encode("a")[0] == 256
    assert load(directory).tokenizer.encode("a", add_bos=False)[0] != 256
    write_tokenizer(directory, add_bos_token=False)
    assert load(directory).tokenizer.encode("a")[0] != 256
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 257)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").unlink()
    ours = load(directory).tokenizer
    assert ours.encode("abcdef")[0] == 257
    assert len(ours.encode("abcdef")) == 7
    assert ours.decode(ours.encode("abcdef é")) == "abcdef é"


def test_tokenizer_of_another_model_is_refused(copy):
    directory = copy()
    edit_config(directory, vocab_size=200)
    edit_tensors(
        directory,
        lambda t: t.update({k: t[k][:200].clone() for k in t if "embed" in k or "lm_head" in k}),
    )
    refuse(directory, "the tokenizer has 258 tokens, the embedding only 200 rows")


def test_old_tokenizer_files_go_through_transformers(copy):
    directory = copy("opt")
    (directory / "tokenizer.json").unlink()
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "<s>", "</s>"])}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    settings = {
        "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "</s>",
        "eos_token": "</s>", "unk_token": "</s>",
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = load(directory).tokenizer
    assert ours.encode("ab") == [257, vocab["a"], vocab["b"]]
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (directory / name).unlink()
    refuse(directory, r"expected tokenizer\.json .*found none")


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("llama-gqa-untied", {"odd_key": 1}, "unknown key odd_key"),
        (
            "llama-gqa-untied",
            {"model_type": "mamba"},
            "'mamba' .*one of gemma2, gemma3, gemma3_t",
        ),
        ("llama-gqa-untied", {"model_type": None}, "architecture None"),
        ("llama-gqa-untied", {"hidden_act": "tanh"}, "hidden_act: expected one of .*'tanh'"),
        ("llama-gqa-untied", {"hidden_size": None}, "expected the key 'hidden_size', found none"),
        (
            "llama-gqa-untied",
            {"hidden_size": "wide"},
            "hidden_size: expected an integer from 1 to 2147483647, got 'wide'",
        ),
        (
            "llama-gqa-untied",
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            "rope_parameters.rope_type: rope scaling 'proportional' is not implemented",
        ),
        (
            "llama-gqa-untied",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "odd": 2.0}},
            r"unknown key rope_parameters\.odd",
        ),
        ("llama-gqa-untied", {"intermediate_size": 100}, r"expected shape \(\d+, \d+\), found"),
        ("llama-gqa-untied", {"num_hidden_layers": 4}, r"missing tensors model\.layers\.3\.\S+"),
        ("llama-gqa-untied", {"num_hidden_layers": 2}, r"unknown tensors model\.layers\.2\.\S+"),
        ("llama-mha-biases", {"attention_bias": False}, r"unknown tensors .*self_attn\.\w+\.bias"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "got chunked_attention"),
        (
            "qwen3",
            {"layer_types": ["full_attention"]},
            "layer_types: expected a list of 3 entries, got ",
        ),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
        ("opt", {"num_attention_heads": 5}, "must divide hidden_size, got 5 and 64"),
    ],
)
def test_config_that_cannot_be_served(variant, changes, message, copy):
    directory = copy(variant)
    edit_config(directory, **changes)
    refuse(directory, message)


def test_tensors_that_cannot_be_served(copy):
    directory = copy()
    name = "model.layers.1.self_attn.k_proj.weight"
    whole = load_file(directory / "model.safetensors")

    def write(**changes):
        tensors = whole | {k.replace("/", "."): v for k, v in changes.items()}
        save_file(
            {k: v for k, v in tensors.items() if v is not None}, directory / "model.safetensors"
        )

    key = name.replace(".", "/")
    write(**{key: None})
    refuse(directory, rf"missing tensor {name} \(expected {name} with shape \(32, 64\)\)")
    write(**{key: torch.zeros(3, 64)})
    refuse(directory, rf"tensor {name}: expected shape \(32, 64\), found \(3, 64\)")
    write(**{key: torch.full((32, 64), torch.inf)})
    refuse(directory, rf"tensor {name} holds NaN or infinity")
    write(**{key: torch.zeros(32, 64, dtype=torch.int8)})
    refuse(directory, rf"tensor '{name}' is stored as I8; expected F32, F16, BF16")
    write(**{"model/embed_tokens/weight": None})
    refuse(directory, r"missing tensor model\.embed_tokens\.weight \(expected")
    write(**{"model/embed_tokens/weight": None, "lm_head/weight": None})
    refuse(directory, "Check that this is a llama checkpoint")


def test_damaged_files(copy):
    directory = copy()
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for size in [3, 50, 2000, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        refuse(directory, "not a complete safetensors file")
    path.write_bytes(struct.pack("<Q", 20) + b"{this is not json at all")
    refuse(directory, "not a complete safetensors file")
    path.write_bytes(b"\xff" * 100)
    refuse(directory, "not a complete safetensors file")
    path.write_bytes(whole)
    (directory / "tokenizer.json").write_text("{")
    refuse(directory, r"tokenizer\.json: expected valid JSON")
    (directory / "config.json").write_text("{oops")
    refuse(directory, r"config\.json: expected valid JSON")
    (directory / "config.json").write_text("[]")
    refuse(directory, r"config\.json: its content: expected an object, got")
    (directory / "config.json").unlink()
    refuse(directory, r"config\.json: expected this file, found none")


def test_pickles_are_refused(copy):
    directory = copy()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refuse(directory, r"found only pytorch_model\.bin, which is a pickle.*can run any code")
    (directory / "pytorch_model.bin").unlink()
    refuse(directory, r"expected model\.safetensors .*found none")


def test_missing_shard(saved, tmp_path):
    make_model("opt").save_pretrained(tmp_path, max_shard_size="40KB")
    write_tokenizer(tmp_path)
    load(tmp_path)
    shard = max(tmp_path.glob("*.safetensors"))
    shard.unlink()
    refuse(tmp_path, f"lists {shard.name}, found no such file")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refuse(tmp_path, "expected the key 'weight_map', found none")


def test_every_variant_is_read_by_its_own_family(saved):
    for variant in VARIANTS:
        assert variant.replace("-", "_").startswith(read_config(saved(variant))[1].family)

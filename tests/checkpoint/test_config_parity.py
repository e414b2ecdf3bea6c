"""What config.json may say: a directory that loads has transformers' logits of that directory.

One tiny checkpoint a family is saved; tests edit its config.json and its tensors.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from parity import assert_same_logits, our_logits
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, write_checkpoint

from ttq_jax.checkpoint import CheckpointError, load


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
def edited(saved, tmp_path):
    """A checkpoint of its own with other keys in config.json."""

    def get(variant, *drop, **changes):
        directory = shutil.copytree(saved(variant), tmp_path / variant)
        edit_config(directory, *drop, **changes)
        return directory

    return get


def text(length=24, seed=1):
    return np.random.default_rng(seed).integers(2, 256, (1, length))


def assert_same(directory, tokens=None, **options):
    """Loads a directory here and there; returns our model."""
    tokens = text() if tokens is None else tokens
    model = load(directory, **options)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    )
    assert_same_logits(reference.eval(), model, tokens)
    return model


def refuse(directory, message, **options):
    with pytest.raises(CheckpointError, match=message):
        load(directory, **options)


LLAMA = "llama-gqa-untied"

WITHOUT_EFFECT = {
    "unsloth": {"unsloth_fixed": True, "unsloth_version": "2026.1.2"},
    "trainers": {"max_sequence_length": 2048, "badwordsids": [[1]], "model_max_length": 9},
    "dropout": {"hidden_dropout": 0.1, "attn_pdrop": 0.1, "embedding_dropout": 0.0},
    "tensor-parallel": {"pretraining_tp": 2},
    "unknown-null": {"sliding_window": None, "odd_key": None, "residual_multiplier": None},
    "neutral": {"use_sliding_window": False, "sliding_window": 4, "residual_multiplier": 1.0,
                "layer_types": ["full_attention"] * 3, "num_experts": 0},
    "nulls": {"rope_scaling": None, "head_dim": None, "quantization_config": None,
              "pretraining_tp": None},
}  # fmt: skip


@pytest.mark.parametrize("name", list(WITHOUT_EFFECT))
def test_keys_without_effect_load(name, edited):
    model = assert_same(edited(LLAMA, **WITHOUT_EFFECT[name]))
    assert model.notes == ()


@pytest.mark.parametrize(
    ("variant", "changes", "named"),
    [
        (LLAMA, {"residual_multiplier": 0.5}, "residual_multiplier = 0.5 is not implemented"),
        (LLAMA, {"sliding_window": 4}, "sliding_window = 4 is not implemented"),
        (LLAMA, {"num_local_experts": 8}, "num_local_experts = 8 is not implemented"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not implemented"),
        (LLAMA, {"no_rope_layers": [1, 0, 1]}, "no_rope_layers = .* is not implemented"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias = True is not implemented"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_window: .* need a window"),
        ("gemma3", {"sliding_window": None}, "sliding_window: .* need a window"),
    ],
)
def test_keys_that_change_the_model_are_refused_by_name(variant, changes, named, edited):
    directory = edited(variant, **changes)
    refuse(directory, named)
    refuse(directory, named, ignore_keys=list(changes))


def test_an_unknown_key_needs_a_word_from_the_user(edited):
    directory = edited(LLAMA, odd_key=1, other_key=[2])
    refuse(directory, "unknown keys odd_key, other_key: .* pass --ignore-key odd_key .*for each")
    refuse(directory, "unknown key other_key", ignore_keys=["odd_key"])
    model = assert_same(directory, ignore_keys=["odd_key", "other_key", "third", "use_cache"])
    assert model.notes == (
        "odd_key = 1 is ignored, as asked",
        "other_key = [2] is ignored, as asked",
        "--ignore-key use_cache has no effect: the key changes nothing anyway",
        "--ignore-key third has no effect: there is no such key",
    )
    refuse(
        directory, "--ignore-key hidden_size: this key counts",
        ignore_keys=["odd_key", "other_key", "hidden_size"],
    )  # fmt: skip


def test_an_unknown_key_inside_an_object_has_its_path(edited):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "odd": 1}
    directory = edited(LLAMA, rope_parameters=rope)
    refuse(directory, r"unknown key rope_parameters\.odd")
    assert load(directory, ignore_keys="rope_parameters.odd").config.rope.factor == 2
    refuse(directory, "this key counts", ignore_keys=["rope_parameters.odd", "rope_parameters"])


def test_a_null_window_is_none(edited):
    directory = edited(
        "qwen3", "layer_types", sliding_window=None, use_sliding_window=True, max_window_layers=1,
        max_position_embeddings=8192,
    )  # fmt: skip
    assert assert_same(directory).config.sliding_layers == ()


def test_an_absent_window_is_the_default(edited):
    directory = edited(
        "qwen3", "layer_types", "sliding_window", use_sliding_window=True, max_window_layers=1,
        max_position_embeddings=8192,
    )  # fmt: skip
    config = load(directory).config
    assert (config.sliding_window, config.sliding_layers) == (4096, (False, True, True))


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({k: v for k, v in tensors.items() if v is not None}, path, {"format": "pt"})


HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def test_only_the_head_of_a_tied_model_is_stored(edited):
    directory = edited("llama-mqa-tied")
    change_tensors(directory, lambda t: t.update({HEAD: t[TABLE], TABLE: None}))
    model = assert_same(directory)
    assert "head" not in model.params and model.notes == ()
    edit_config(directory, tie_word_embeddings=False)
    refuse(directory, r"missing tensor model\.embed_tokens\.weight")


def test_only_the_head_of_a_tied_opt_is_stored(edited):
    directory, table = edited("opt"), "model.decoder.embed_tokens.weight"
    change_tensors(directory, lambda t: t.update({HEAD: t[table], table: None}))
    assert_same(directory)


@pytest.mark.parametrize("variant", ["llama-mqa-tied", "gemma3"])
def test_a_head_of_its_own_beside_tied_embeddings_is_used(variant, edited):
    directory = edited(variant)
    change_tensors(directory, lambda t: t.update({HEAD: t[TABLE].clone()}))
    same = assert_same(directory)
    assert same.config.tie_embeddings and same.notes == ()
    change_tensors(directory, lambda t: t.update({HEAD: t[TABLE].flip(0).clone()}))
    other = assert_same(directory)
    assert not other.config.tie_embeddings
    assert other.notes == (
        f"tie_word_embeddings is true, but {HEAD} differs from {TABLE}: both are used",
    )


def test_without_a_head_the_embedding_serves(edited):
    directory = edited("llama-mqa-tied")
    tied = load(directory)
    edit_config(directory, tie_word_embeddings=False)
    model = load(directory)
    assert model.config == tied.config
    assert model.notes == (
        f"tie_word_embeddings is false, but there is no {HEAD}: {TABLE} serves as head",
    )
    np.testing.assert_array_equal(our_logits(model, text()), our_logits(tied, text()))


def test_derived_buffers_are_ignored_whatever_their_dtype(edited):
    directory = edited(LLAMA)
    attention = "model.layers.0.self_attn"
    buffers = {
        "rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64),
        f"{attention}.rotary_emb.inv_freq": torch.ones(8),
        f"{attention}.rotary_emb.cos_cached": torch.ones(1, 1, 9, 16),
        f"{attention}.rotary_emb.sin_cached": torch.ones(1, 1, 9, 16),
        "model.embed_tokens.embed_scale": torch.ones(()),
        "model.position_ids": torch.arange(9)[None],
        f"{attention}.masked_bias": torch.tensor(-1e9),
        f"{attention}.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
    }
    change_tensors(directory, lambda t: t.update(buffers))
    assert assert_same(directory).notes == ()
    change_tensors(directory, lambda t: t.update({"model.odd": torch.arange(3)}))
    refuse(directory, r"tensor 'model\.odd' is stored as I64")


def test_a_whole_file_beside_an_index_of_shards_that_are_gone(edited, saved):
    directory = edited(LLAMA)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {TABLE: "model-00001-of-00002.safetensors"}}))
    model = assert_same(directory)
    assert model.notes == (
        f"model.safetensors is read, as transformers does; {index.name} and its shards are left "
        "aside",
    )
    # An index that names the file is its own.
    index.write_text(json.dumps({"weight_map": {TABLE: "model.safetensors"}}))
    assert load(directory).notes == ()

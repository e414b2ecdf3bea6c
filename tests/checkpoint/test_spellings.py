"""config.json's two spellings of one setting: equal, they load; otherwise both are named."""

import json

import pytest
from tiny_files import write_model

from ttq_jax.checkpoint import CheckpointError
from ttq_jax.checkpoint.huggingface import read_config
from ttq_jax.config import ConfigError
from ttq_jax.models.family import Settings
from ttq_jax.models.gemma3 import hf_config

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_NO_ROPE = {"rope_theta": None}


@pytest.fixture
def read(tmp_path):
    """The config of a tiny Llama with other keys."""

    def get(**changes):
        return read_config(write_model(tmp_path / "m", **changes))[1]

    return get


@pytest.mark.parametrize(
    ("changes", "one", "other"),
    [
        (
            _NO_ROPE
            | {
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
                "rope_scaling": LINEAR,
            },
            "rope_parameters", "rope_scaling",
        ),
        (
            {"rope_parameters": LINEAR, "rope_scaling": LINEAR | {"factor": 2.0}},
            "rope_parameters", "rope_scaling",
        ),
        (
            {"rope_parameters": LINEAR, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_parameters", "rope_scaling",
        ),
        # transformers takes rope_scaling, and then the family's theta.
        (
            _NO_ROPE
            | {"rope_parameters": LINEAR | {"rope_theta": 5e5}, "rope_scaling": LINEAR},
            "rope_parameters", "rope_scaling",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": LINEAR | {"rope_theta": 5e5}},
            "rope_parameters.rope_theta", "rope_theta",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": LINEAR | {"rope_theta": 5e5}},
            "rope_scaling.rope_theta", "rope_theta",
        ),
        (
            {"rope_scaling": LINEAR | {"type": "yarn"}},
            "rope_scaling.rope_type", "rope_scaling.type",
        ),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 128},
            "rope_scaling.original_max_position_embeddings", "original_max_position_embeddings",
        ),
    ],
)  # fmt: skip
def test_spellings_that_disagree_are_both_named(changes, one, other, read):
    with pytest.raises(CheckpointError, match=r"two spellings of one setting and disagree") as e:
        read(**changes)
    assert f" {one} and {other} are two spellings" in str(e.value)


@pytest.mark.parametrize(
    ("changes", "same_as"),
    [
        ({"rope_parameters": LINEAR, "rope_scaling": LINEAR}, {"rope_scaling": LINEAR}),
        (
            {"rope_parameters": LINEAR, "rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_scaling": LINEAR},
        ),
        (
            {"rope_parameters": LINEAR | {"rope_theta": 10000}, "rope_scaling": LINEAR},
            {"rope_scaling": LINEAR},
        ),
        ({"rope_parameters": {}, "rope_scaling": LINEAR}, {"rope_scaling": LINEAR}),
        ({"rope_parameters": LINEAR, "rope_scaling": None}, {"rope_scaling": LINEAR}),
        ({"rope_scaling": LINEAR | {"type": "linear"}}, {"rope_scaling": LINEAR}),
        ({"rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [1]}}, {}),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None},
             "original_max_position_embeddings": 64},
            {"rope_scaling": LLAMA3},
        ),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, {}),
    ],
)  # fmt: skip
def test_spellings_that_agree_are_one(changes, same_as, read):
    assert read(**changes) == read(**same_as)


GEMMA = {
    "model_type": "gemma3_text", "vocab_size": 264, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "sliding_window": 4,
}  # fmt: skip
_SLIDING, _FULL = "sliding_attention", "full_attention"


def gemma(**changes):
    settings = Settings(GEMMA | changes)
    config = hf_config(settings)
    settings.finish()
    return config


@pytest.mark.parametrize(
    ("changes", "one", "other"),
    [
        (
            {"sliding_window_pattern": 2, "_sliding_window_pattern": 3},
            "_sliding_window_pattern", "sliding_window_pattern",
        ),
        # transformers reads the other one only.
        ({"_sliding_window_pattern": 3}, "_sliding_window_pattern", "sliding_window_pattern"),
        (
            {"sliding_window_pattern": 2, "layer_types": [_SLIDING] * 4},
            "layer_types", "sliding_window_pattern",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {_FULL: {"rope_theta": 1e6}}},
            "rope_parameters.full_attention.rope_theta", "rope_theta",
        ),
        (
            {"rope_local_base_freq": 1e3, "rope_parameters": {_SLIDING: {"rope_theta": 1e4}}},
            "rope_parameters.sliding_attention.rope_theta", "rope_local_base_freq",
        ),
        (
            {"rope_parameters": {_FULL: LINEAR}, "rope_scaling": LINEAR | {"factor": 8.0}},
            "rope_scaling.factor", "rope_parameters.full_attention.factor",
        ),
        (
            {"rope_parameters": {_FULL: {"rope_theta": 1e6}}, "rope_scaling": LINEAR},
            "rope_parameters.full_attention", "rope_scaling",
        ),
    ],
)  # fmt: skip
def test_gemma3s_spellings_that_disagree_are_both_named(changes, one, other):
    with pytest.raises(ConfigError, match="two spellings of one setting and disagree") as e:
        gemma(**changes)
    assert str(e.value).startswith(f"{one} and {other} are two spellings")


@pytest.mark.parametrize(
    ("changes", "same_as"),
    [
        ({"sliding_window_pattern": 2}, {"layer_types": [_SLIDING, _FULL] * 2}),
        (
            {"sliding_window_pattern": 2, "_sliding_window_pattern": 2},
            {"layer_types": [_SLIDING, _FULL] * 2},
        ),
        # transformers writes 6 there, whatever the layers are.
        (
            {"_sliding_window_pattern": 6, "layer_types": [_SLIDING, _FULL] * 2},
            {"sliding_window_pattern": 2},
        ),
        (
            {"rope_parameters": {_FULL: LINEAR}, "rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_scaling": LINEAR},
        ),
        (
            {"rope_local_base_freq": 1e3, "rope_theta": 1e5, "rope_scaling": LINEAR},
            {
                "rope_parameters": {
                    _FULL: LINEAR | {"rope_theta": 1e5}, _SLIDING: {"rope_theta": 1e3},
                },
            },
        ),
    ],
)  # fmt: skip
def test_gemma3s_spellings_that_agree_are_one(changes, same_as):
    assert gemma(**changes) == gemma(**same_as)


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [({}, {}, True), ({}, {"tie_word_embeddings": False}, True),
     ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, False),
     ({"tie_word_embeddings": False}, {}, False)],
)  # fmt: skip
def test_the_wrapper_says_whether_the_head_is_tied(outer, inner, tied):
    text = GEMMA | inner
    settings = Settings({"model_type": "gemma3", "text_config": text} | outer)
    assert hf_config(settings).tie_embeddings is tied


def test_a_key_inside_a_wrapper_is_ignored_by_its_path(tmp_path):
    text = {"text_config": GEMMA | {"odd": 1}, "model_type": "gemma3"}
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=r"unknown key text_config\.odd"):
        read_config(tmp_path)
    _, _, notes = read_config(tmp_path, ("text_config.odd", "more"))
    assert notes == [
        "text_config.odd = 1 is ignored, as asked",
        "--ignore-key more has no effect: there is no such key",
    ]


def test_a_note_is_said_once(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 2.0, "attn_factor": 0.9, "odd": 1}
    write_model(tmp_path, rope_scaling=yarn)
    _, _, notes = read_config(tmp_path, ("rope_scaling.odd",))
    assert [note.partition(" is ")[0] for note in notes] == [
        "rope_scaling.attn_factor = 0.9", "rope_scaling.odd = 1",
    ]  # fmt: skip

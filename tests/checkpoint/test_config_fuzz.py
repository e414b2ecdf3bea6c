"""Random config.json: what is accepted has transformers' logits, what is refused names its key."""

import copy
import functools
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import our_logits, their_logits
from tiny_models import write_checkpoint

from ttq_jax.checkpoint import CheckpointError, load

LENGTH, ORIGINAL = 48, 32
TOKENS = np.random.default_rng(4).integers(2, 256, (1, LENGTH))
FACTORS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
SCALINGS = [
    None, {}, {"rope_type": "default"}, {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 2}, {"rope_type": "linear"},
    {"rope_type": "linear", "type": "dynamic", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0}, {"type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": ORIGINAL},
    {"rope_type": "yarn", "factor": None, "beta_fast": 4.0, "attention_factor": 0.5},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
     "original_max_position_embeddings": ORIGINAL},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": ORIGINAL},
    {"rope_type": "axial"}, {"rope_type": 3}, "linear",
]  # fmt: skip
_WITH_THETA = [s | {"rope_theta": 1e4} for s in SCALINGS if isinstance(s, dict) and s]
_SLIDING, _FULL = "sliding_attention", "full_attention"

# Key -> values that files have, or might have.
COMMON = {
    "rms_norm_eps": [1e-5, 1e-3, None, "small"], "hidden_act": ["silu", "gelu", None, "odd"],
    "max_position_embeddings": [LENGTH - 8, 128, None], "head_dim": [16, None],
    "num_key_value_heads": [2, None], "tie_word_embeddings": [False, None, 1],
    "attention_bias": [False, None, True], "attention_dropout": [0.0, 0.1],
    "hidden_dropout": [0.1], "pretraining_tp": [1, 2, None], "quantization_config": [None, {}],
    "partial_rotary_factor": [1.0, 0.5, None], "residual_multiplier": [1.0, 0.5, None],
    "unsloth_fixed": [True], "max_sequence_length": [9], "odd_key": [None, 1, "x"],
    "use_cache": [True, False], "torch_dtype": ["bfloat16", None], "num_experts": [0, 4, None],
}  # fmt: skip
ROPE = {
    "rope_theta": [1e4, 5e5, None, "x"], "rope_scaling": SCALINGS,
    "rope_parameters": [*SCALINGS, *_WITH_THETA],
}  # fmt: skip
WINDOW = {
    "sliding_window": [None, 4, 0], "use_sliding_window": [True, False, None],
    "max_window_layers": [0, 1, 28], "layer_types": [None, [_SLIDING, _FULL, _FULL], [_FULL] * 3],
}  # fmt: skip
KEYS = {
    "llama-gqa-untied": COMMON | ROPE | WINDOW | {"mlp_bias": [False, None, True]},
    "qwen3": COMMON | ROPE | WINDOW,
    "gemma3-untied": COMMON
    | {
        "sliding_window": [None, 4, 5], "sliding_window_pattern": [2, 3, None],
        "_sliding_window_pattern": [6, 2], "rope_theta": [1e4, 1e6, None],
        "layer_types": [None, [_SLIDING, _FULL] * 2, [_SLIDING] * 4],
        # Beside Gemma3's defaults transformers 5.24 overlooks the old key `type`.
        "rope_local_base_freq": [1e2, None],
        "rope_scaling": [s for s in SCALINGS if "type" not in (s or ())],
        "rope_parameters": [
            None, {}, {_FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
            {_SLIDING: {"rope_type": "default", "rope_theta": 1e2}, _FULL: {"rope_theta": 1e4}},
            {"rope_type": "linear", "factor": 2.0},
        ],
        "query_pre_attn_scalar": [16, 20], "final_logit_softcapping": [1.5, None],
        "use_bidirectional_attention": [False, None, True],
        "hidden_activation": ["gelu_pytorch_tanh", "silu", None],
    },
    "mistral-window": COMMON | ROPE | {"sliding_window": [None, 4, 0]},
    "qwen2": COMMON | ROPE | WINDOW | {"use_mrope": [False, True, None]},
    "gemma2-no-caps-untied": COMMON
    | ROPE
    | {
        "sliding_window": [4, 5], "layer_types": [None, [_SLIDING, _FULL] * 2, [_SLIDING] * 4],
        "query_pre_attn_scalar": [16, 20], "final_logit_softcapping": [1.5, None],
        "attn_logit_softcapping": [2.0, None], "use_bidirectional_attention": [False, None, True],
        "hidden_activation": ["gelu_pytorch_tanh", "silu", None],
    },
    "phi3": COMMON
    | ROPE
    | {
        "sliding_window": [None, 4], "resid_pdrop": [0.1], "full_attn_mod": [1, 2, None],
        "interpolate_factor": [1, 2],
    },
    "qwen3-moe": COMMON
    | ROPE
    | {
        "num_experts": [8, 4, None], "num_local_experts": [8, 6, None],
        "num_experts_per_tok": [1, 3, 9, None], "norm_topk_prob": [True, False, None],
        "decoder_sparse_step": [1, 2, None], "mlp_only_layers": [[], [1], None],
        "router_aux_loss_coef": [0.1], "shared_expert_intermediate_size": [0, 64, None],
        "sliding_window": [None, 4], "use_sliding_window": [True, False, None],
    },
    "mixtral": COMMON
    | ROPE
    | {
        "num_experts": [4, 3, None], "num_local_experts": [4, 3, None],
        "num_experts_per_tok": [1, 2, None], "norm_topk_prob": [True, False, None],
        "router_jitter_noise": [0.0, 0.1], "sliding_window": [None, 4, 0],
    },
    "smollm3-list-sliding": COMMON
    | ROPE
    | WINDOW
    | {"no_rope_layers": [None, [1, 0, 1], [1] * 3, [0, 1]], "no_rope_layer_interval": [2, 4]},
    "olmo2": COMMON | ROPE | {"clip_qkv": [None, 8.0]},
    "granite-untied-biases": COMMON
    | ROPE
    | {
        "attention_multiplier": [0.1, 1.0, None], "embedding_multiplier": [3.0, None],
        "logits_scaling": [2, 1.5, None], "mlp_bias": [True, None],
    },
}  # fmt: skip
# Each family's; some hundreds find nothing that these do not.
EXAMPLES = 12
# Of the keys that say which weights there are, the message may compare sizes.
OF_WEIGHTS = {
    "attention_bias", "mlp_bias", "head_dim", "num_key_value_heads", "num_experts",
    "num_local_experts",
}  # fmt: skip


@functools.cache
def base(variant):
    """A checkpoint without the keys that are drawn, and its transformers model."""
    directory = Path(tempfile.mkdtemp())
    model = write_checkpoint(directory, variant)
    return directory, model


@pytest.fixture(scope="module", autouse=True)
def _no_checkpoints_left():
    yield
    for variant in KEYS:
        for file in base(variant)[0].iterdir():
            file.unlink()
        base(variant)[0].rmdir()


def logits_of(raw, weights):
    """transformers' logits of a config.json with these weights."""
    # Head and embedding are two in these weights, which decides, as in `from_pretrained`.
    untied = copy.deepcopy(raw) | {"tie_word_embeddings": False}
    config = transformers.AutoConfig.for_model(**untied)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    model.load_state_dict(weights)
    return their_logits(model, TOKENS)


def check(variant, changes):
    directory, reference = base(variant)
    path = directory / "config.json"
    saved = path.read_text()
    raw = {k: v for k, v in json.loads(saved).items() if k != "rope_parameters"} | changes
    try:
        path.write_text(json.dumps(raw))
        model = load(directory)
    except CheckpointError as error:
        inside = [key for value in changes.values() if isinstance(value, dict) for key in value]
        named = any(key in str(error) for key in (*changes, *inside))
        assert named or (OF_WEIGHTS & set(changes) and "configuration" in str(error)), (
            changes,
            error,
        )
        return
    finally:
        path.write_text(saved)
    weights = reference.state_dict()
    try:
        theirs = logits_of(raw, weights)
    except Exception:
        # Some keys may not be null there, which is no setting here.
        nulls = {key for key, value in changes.items() if value is None}
        theirs = logits_of({k: v for k, v in raw.items() if k not in nulls}, weights)
    # Nothing is compiled: each config would be another program.
    with jax.disable_jit():
        ours = our_logits(model, TOKENS)
    np.testing.assert_allclose(
        ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max(), err_msg=str(changes)
    )


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(KEYS))
def test_any_config(variant):
    one = st.sampled_from(sorted(KEYS[variant])).flatmap(
        lambda key: st.tuples(st.just(key), st.sampled_from(KEYS[variant][key]))
    )

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
    )
    @given(st.lists(one, min_size=1, max_size=4, unique_by=lambda pair: pair[0]))
    def run(pairs):
        check(variant, dict(pairs))

    run()

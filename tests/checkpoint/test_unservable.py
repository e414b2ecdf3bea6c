"""What is no plain model says what it is and what to do instead."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_files import write_model

from ttq_jax.checkpoint import CheckpointError, load

DO = r"Load the unquantized original"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"\(GPTQ, 4 bits; quantiz"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"\(AWQ, 4 bits; "),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            r"\(bitsandbytes; ",
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "x"}},
            r"\(compressed-tensors; ",
        ),
        ({"quantization_config": {"quant_method": "odd"}}, r"\('odd'; "),
        ({"quantization_config": {"bits": 4}}, r"\({'bits': 4}, 4 bits; "),
        (
            {"quantization": {"group_size": 64, "bits": 4},
             "quantization_config": {"group_size": 64, "bits": 4}},
            r"\(MLX, 4 bits; ",
        ),
    ],
)  # fmt: skip
def test_quantized_by_its_config(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message + ".*" + DO):
        load(write_model(tmp_path, **changes))


def test_empty_keys_say_nothing(tmp_path):
    model = load(write_model(tmp_path, quantization_config={}, quantization=None))
    assert model.notes == ()


@pytest.mark.parametrize(
    ("file", "tensors", "message"),
    [
        ("quantize_config.json", {"qweight": np.int32, "scales": np.float16}, "GPTQ; quantize_c"),
        (
            "hf_quant_config.json",
            {"weight": np.uint8, "weight_scale": np.float32},
            "ModelOpt; hf_",
        ),
        (None, {"weight": np.uint8, "weight.absmax": np.float32}, r"\(tensor .*absmax"),
    ],
)
def test_quantized_by_its_tensors(file, tensors, message, tmp_path):
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    at = "model.layers.0.mlp.up_proj."
    del stored[f"{at}weight"]
    save_file(stored | {at + n: np.ones((8, 8), kind) for n, kind in tensors.items()}, path)
    if file:
        (tmp_path / file).write_text(json.dumps({"bits": 4}))
    with pytest.raises(CheckpointError, match=message + ".*" + DO):
        load(tmp_path)


def test_a_quantizers_file_beside_plain_weights_says_nothing(tmp_path):
    write_model(tmp_path)
    (tmp_path / "quantize_config.json").write_text("{}")
    assert load(tmp_path).notes == ()


def test_an_adapter_names_its_base(tmp_path):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(CheckpointError, match=r"a LORA adapter to 'org/base', not a model\. Merge"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a LoRA adapter, not a model"):
        load(tmp_path)
    # Beside a whole model it was left by the training.
    assert load(write_model(tmp_path)).notes == ()

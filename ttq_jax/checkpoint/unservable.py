"""Directories without plain weights: quantized checkpoints and adapters, each by its name."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.errors import shown
from ttq_jax.foreign import is_file, read_json

# What quantizers call their tensors: codes, scales, statistics.
_PACKED = (
    ".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv",
    ".input_scale", ".absmax", ".quant_map", ".weight_format", ".scales", ".SCB",
)  # fmt: skip
_NAMES = {
    "gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "fp8": "FP8", "hqq": "HQQ",
    "compressed-tensors": "compressed-tensors", "modelopt": "NVIDIA ModelOpt", "mxfp4": "MXFP4",
    "torchao": "torchao", "quanto": "Quanto", "eetq": "EETQ", "aqlm": "AQLM", "quark": "Quark",
    "auto-round": "AutoRound", "exl2": "ExLlamaV2", "exl3": "ExLlamaV3",
}  # fmt: skip
_BESIDE = {"quantize_config.json": "GPTQ", "hf_quant_config.json": "NVIDIA ModelOpt"}
_DO = (
    "Load the unquantized original, which its model card names: its weights are needed to quantize "
    "them for each prompt"
)


def check_whole_model(directory: Path) -> None:
    """Refuses a directory that holds an adapter and no model.

    Args:
      directory: with or without config.json.

    Raises:
      CheckpointError: it is an adapter's.
    """
    adapter = directory / "adapter_config.json"
    if not is_file(adapter) or (directory / "config.json").exists():
        return
    found = read_json(adapter, CheckpointError, {"peft_type?": object})
    base = found.get("base_model_name_or_path")
    base = f" to {shown(base)}" if isinstance(base, str) and base else ""
    raise CheckpointError(
        f"{directory}: this is a {found.get('peft_type') or 'LoRA'} adapter{base}, not a model. "
        "Merge it into its base model, as with peft's merge_and_unload() and save_pretrained(DIR), "
        "and load the result"
    )


def check_unquantized(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuses a model whose config.json says that its weights are quantized.

    Args:
      directory: of the model.
      config: its config.json.

    Raises:
      CheckpointError: they are; the message says by what.
    """
    for key in ("quantization_config", "quantization"):
        found = config.get(key)
        if not found:
            continue
        inside = found if isinstance(found, Mapping) else {}
        method, bits = inside.get("quant_method"), inside.get("bits")
        # MLX writes both keys, without a method.
        name = "MLX" if "quantization" in config else shown(method or found)
        name = _NAMES.get(method, name) if isinstance(method, str) else name
        width = f", {bits} bits" if isinstance(bits, int) else ""
        raise CheckpointError(
            f"{directory}: the weights are already quantized ({name}{width}; {key} in config.json)."
            f" {_DO}"
        )


def check_plain(directory: Path, names: Iterable[str]) -> None:
    """Refuses a model whose tensors are those of a quantizer.

    Args:
      directory: of the model.
      names: of its tensors.

    Raises:
      CheckpointError: they are.
    """
    packed = next((name for name in names if name.endswith(_PACKED)), None)
    if packed is None:
        return
    beside = [f"{kind}; {file}" for file, kind in _BESIDE.items() if is_file(directory / file)]
    raise CheckpointError(
        f"{directory}: the weights are already quantized ({', '.join([*beside, 'tensor '])}"
        f"{shown(packed)}). {_DO}"
    )

"""Chooses the implementation that serves a problem, and gives the reason, by one pure function.

The choice is made while a program is traced, from shapes, dtypes and the device that it is traced
for. Nothing is tried out, and no fallback is silent: the reason comes with the choice, and
`ttq kernels` prints both for every projection of a model.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from types import ModuleType
from typing import Any

import jax

from pallas_kernels.problem import Problem
from pallas_kernels.tiles import DENSE_ROWS, MOSAIC_ROWS

KERNELS = ("packed_matmul", "quantize_pack", "prefill_quantize")
IMPLEMENTATIONS = ("tpu", "triton", "mosaic_gpu", "xla", "interpret")
"""What a caller may force. "interpret" simulates the TPU kernel on the CPU, very slowly."""

_MODULES = {
    ("packed_matmul", "tpu"): "pallas_kernels.tpu.packed_matmul",
    ("quantize_pack", "tpu"): "pallas_kernels.tpu.quantize_pack",
    ("prefill_quantize", "tpu"): "pallas_kernels.tpu.prefill_quantize",
    ("packed_matmul", "triton"): "pallas_kernels.gpu.packed_matmul",
    ("quantize_pack", "triton"): "pallas_kernels.gpu.quantize_pack",
    ("prefill_quantize", "triton"): "pallas_kernels.gpu.prefill_quantize",
    ("packed_matmul", "mosaic_gpu"): "pallas_kernels.gpu.packed_matmul_sm90",
}
_RUNS_ON = {"tpu": "tpu", "triton": "gpu", "mosaic_gpu": "gpu", "interpret": "cpu"}

# What running devices call themselves, most specific first.
_DEVICE_KINDS = (
    ("TPU v5 lite", "v5e"),
    ("TPU v5e", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6", "v6e"),
    ("TPU v4", "v4"),
    ("TPU7x", "tpu7x"),
    ("TPU v7", "tpu7x"),
    ("H100", "h100"),
    ("H200", "h100"),
    ("GH200", "h100"),
    ("A100", "a100"),
    ("A30", "a100"),
    ("L4", "l4"),
    (r"RTX 40\d\d", "l4"),
    ("T4", "t4"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What a program is traced for.

    Attributes:
      platform: "cpu", "tpu" or "gpu", in jax's words.
      chip: "v5e", "h100", … where the device kind is a known one, else None.
    """

    platform: str
    chip: str | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """A decision.

    Attributes:
      implementation: one of `IMPLEMENTATIONS`.
      reason: why this one; for a fallback, why the Pallas kernel cannot serve.
      fallback: whether this platform has a Pallas kernel that cannot serve the problem.
    """

    implementation: str
    reason: str
    fallback: bool = False


def chip_of(device_kind: str) -> str | None:
    """Our short name of a device kind, None for an unknown one."""
    # Whole words at the end: an L40 is no L4, a T400 no T4.
    found = (chip for kind, chip in _DEVICE_KINDS if re.search(rf"\b{kind}(?!\d)", device_kind))
    return next(found, None)


def current_target() -> Target:
    """The device that is traced for: the abstract one that is set, else jax's default device."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.config.values["jax_default_device"]
        if isinstance(device, str):
            device = jax.devices(device)[0]
        device = device or jax.devices()[0]
    platform = {"cuda": "gpu"}.get(device.platform, device.platform)
    chip = chip_of(device.device_kind)
    if chip is None and float(getattr(device, "compute_capability", None) or 8) < 8:
        # A GPU that Triton does not support is served like a T4.
        chip = "t4"
    return Target(platform=platform, chip=chip)


def module_of(kernel: str, implementation: str) -> ModuleType:
    """The module that implements a kernel; imported here, because Pallas is slow to import.

    Args:
      kernel: one of `KERNELS`.
      implementation: one of `IMPLEMENTATIONS`.

    Returns:
      A module with a function named like the kernel, and `refusal` unless it is plain XLA.
    """
    if implementation == "xla":
        return importlib.import_module("pallas_kernels.xla")
    own = "tpu" if implementation == "interpret" else implementation
    return importlib.import_module(_MODULES[kernel, own])


def refusal(problem: Problem, implementation: str, target: Target) -> str | None:
    """Why an implementation cannot serve a problem there.

    Args:
      problem: the problem.
      implementation: one of `IMPLEMENTATIONS`.
      target: where it would run.

    Returns:
      The reason; None if it can.
    """
    if implementation == "xla":
        return None
    if implementation != "interpret" and (problem.kernel, implementation) not in _MODULES:
        return f"there is no {implementation} kernel for {problem.kernel}"
    needed = _RUNS_ON[implementation]
    if target.platform != needed:
        runs = "the TPU simulator runs" if implementation == "interpret" else (
            f"{implementation} kernels run"
        )  # fmt: skip
        return f"{runs} on a {needed.upper()}, this is a {target.platform.upper()}"
    return module_of(problem.kernel, implementation).refusal(problem, target.chip)


def choose(problem: Problem, target: Target, implementation: str | None = None) -> Choice:
    """Chooses the implementation for a problem.

    Args:
      problem: the problem.
      target: what the program is traced for, see `current_target`.
      implementation: forces one of `IMPLEMENTATIONS`; None decides.

    Returns:
      The decision.

    Raises:
      ValueError: the name is unknown, or the forced implementation cannot serve.
    """
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation: expected None or one of {', '.join(IMPLEMENTATIONS)}, "
                f"got {implementation!r}"
            )
        why = refusal(problem, implementation, target)
        if why is not None:
            raise ValueError(
                f"implementation={implementation!r} cannot serve this {problem.kernel}: {why}; "
                "pass implementation=None to let it be chosen"
            )
        return Choice(implementation, "asked for")
    if target.platform == "tpu":
        candidates = ["tpu"]
    elif target.platform == "gpu":
        candidates = ["triton"]
        if problem.kernel == "packed_matmul":
            wins = problem.m >= MOSAIC_ROWS.get(target.chip or "", 2**31)
            candidates.insert(0 if wins else 1, "mosaic_gpu")
    else:
        return Choice("xla", f"plain XLA is the tuned implementation for a {target.platform}")
    limits = DENSE_ROWS.get(target.chip or "", (2**31, 2**31))
    limit = limits[0 if problem.group_size >= 128 else 1]
    if problem.kernel == "packed_matmul" and problem.m > limit:
        return Choice(
            "xla", f"more than {limit} rows: unpacking once and a dense product are faster"
        )
    refused: list[str] = []
    for name in candidates:
        why = refusal(problem, name, target)
        if why is None:
            return Choice(name, "; ".join(refused) or f"the kernel for {target.chip or name}")
        refused.append(f"{name}: {why}")
    return Choice("xla", "; ".join(refused), fallback=True)

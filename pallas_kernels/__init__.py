"""Kernels for matrices of packed low-bit weights: arrays in, arrays out, nothing of ttq_jax."""

from pallas_kernels.choice import Choice, Target, choose, current_target
from pallas_kernels.grid import CodedPairs, CodedScales
from pallas_kernels.layout import PLANES, unpack
from pallas_kernels.problem import Problem
from pallas_kernels.sharded import (
    Split,
    by_columns,
    dequantize,
    mesh_sizes,
    pack,
    packed_matmul,
    prefill_quantize,
    quantize_pack,
)

__all__ = [
    "PLANES",
    "Choice",
    "CodedPairs",
    "CodedScales",
    "Problem",
    "Split",
    "Target",
    "by_columns",
    "choose",
    "current_target",
    "dequantize",
    "mesh_sizes",
    "pack",
    "packed_matmul",
    "prefill_quantize",
    "quantize_pack",
    "unpack",
]

"""Kernels for matrices of packed low-bit weights: arrays in, arrays out, nothing of ttq_jax."""

from pallas_kernels.choice import Choice, Target, choose, current_target
from pallas_kernels.dispatch import packed_matmul, prefill_quantize, quantize_pack
from pallas_kernels.grid import CodedPairs, CodedScales
from pallas_kernels.layout import PLANES, pack, unpack
from pallas_kernels.problem import Problem
from pallas_kernels.reference import dequantize

__all__ = [
    "PLANES",
    "Choice",
    "CodedPairs",
    "CodedScales",
    "Problem",
    "Target",
    "choose",
    "current_target",
    "dequantize",
    "pack",
    "packed_matmul",
    "prefill_quantize",
    "quantize_pack",
    "unpack",
]

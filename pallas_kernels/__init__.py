"""Kernels for matrices of packed low-bit weights: arrays in, arrays out, nothing of ttq_jax."""

from pallas_kernels.layout import PLANES, pack, unpack
from pallas_kernels.reference import dequantize, packed_matmul

__all__ = ["PLANES", "dequantize", "pack", "packed_matmul", "unpack"]

"""Kernels for NVIDIA GPUs: Pallas' Triton backend for all of them, Mosaic GPU for Hopper."""

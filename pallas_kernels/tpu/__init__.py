"""Kernels for TPUs (Pallas, Mosaic)."""

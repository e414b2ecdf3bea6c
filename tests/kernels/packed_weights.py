"""Random packed weights, and the float64 oracle of what they stand for."""

import jax.numpy as jnp
import numpy as np

EPS = float(np.finfo(np.float32).eps)


def random_weight(seed, bits, group_size, n_group, n, scale_dtype="float32", zero_dtype="float32"):
    """(codes, scales, zeros); zeros are None for zero_dtype None."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (n_group * group_size, n), dtype=np.uint8)
    scales = jnp.asarray(rng.uniform(0.01, 1, (n_group, n)), scale_dtype)
    zeros = None
    if zero_dtype is not None:
        top = 2**bits - 1
        values = rng.integers(0, top, (n_group, n), endpoint=True)
        if zero_dtype != "uint8":
            values = values + rng.uniform(-0.5, 0.5, (n_group, n))
        zeros = jnp.asarray(values, zero_dtype)
    return codes, scales, zeros


def oracle_weight(codes, scales, zeros, bits, group_size):
    """``s (q - z)`` and ``s (q + |z|)``, the latter to bound rounding."""
    s = np.repeat(np.asarray(scales, np.float64), group_size, -2)
    z = 2.0 ** (bits - 1) if zeros is None else np.asarray(zeros, np.float64)
    z = z if zeros is None else np.repeat(z, group_size, -2)
    return s * (codes - z), np.abs(s) * (codes + np.abs(z))

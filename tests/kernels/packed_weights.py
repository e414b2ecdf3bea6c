"""Random packed weights, and the float64 oracle of what they stand for."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.grid import CodedPairs, CodedScales

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


def coded_weight(seed, bits, group_size, n_group, n, columns_dtype="bfloat16", symmetric=False):
    """As `random_weight`, with scales and zero points of eight bits, both ends among them."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (n_group * group_size, n), dtype=np.uint8)
    scales = rng.integers(1, 255, (n_group, n), dtype=np.uint8, endpoint=True)
    scales[:, 0] = np.arange(n_group) % 2 * 254 + 1
    columns = jnp.asarray(2.0 ** rng.uniform(-20, 4, n), columns_dtype)
    zeros = rng.integers(0, 255, (n_group, n), dtype=np.uint8, endpoint=True)
    return (
        codes,
        CodedScales(jnp.asarray(scales), columns),
        None if symmetric else jnp.asarray(zeros),
    )


def paired_weight(seed, bits, group_size, n_group, n, columns_dtype="bfloat16"):
    """As `coded_weight`, with both in the halves of a byte."""
    codes, scales, zeros = coded_weight(seed, bits, group_size, n_group, n, columns_dtype)
    u = 1 + np.asarray(scales.codes) % 15  # both ends, as there
    return codes, CodedPairs(jnp.asarray(u * 16 + np.asarray(zeros) % 16), scales.columns), None


def stored_grid(scales, zeros, bits):
    """Scales and zero points in float64, as the layout defines what is stored."""
    if isinstance(scales, CodedPairs):
        u, z = np.divmod(np.asarray(scales.codes, np.float64), 16)
        return u * np.asarray(scales.columns, np.float64)[..., None, :], z * 2.0 ** (bits - 4)
    z = None if zeros is None else np.asarray(zeros, np.float64)
    if not isinstance(scales, CodedScales):
        return np.asarray(scales, np.float64), z
    codes, columns = (np.asarray(a, np.float64) for a in (scales.codes, scales.columns))
    return codes * columns[..., None, :], None if z is None else z / 2 ** (8 - bits)


def oracle_weight(codes, scales, zeros, bits, group_size):
    """``s (q - z)`` and ``s (q + |z|)``, the latter to bound rounding."""
    s, z = stored_grid(scales, zeros, bits)
    s = np.repeat(s, group_size, -2)
    z = 2.0 ** (bits - 1) if z is None else np.repeat(z, group_size, -2)
    return s * (codes - z), np.abs(s) * (codes + np.abs(z))

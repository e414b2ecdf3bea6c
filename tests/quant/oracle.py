"""The method restated in plain NumPy, float64 where it matters; shares no code with the package."""

import numpy as np


def bf16(x):
    """Round to nearest even bfloat16, as float64."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def stored(x, dtype):
    if dtype == "bfloat16":
        return bf16(x)
    return np.asarray(x, dtype).astype(np.float64)


def fit_group(g, bits, symmetric, zero_point="integer", dtype="float32", shrink=1.0):
    """Scale and zero point of a group g[rows, d_out], per column; 0 is in the range."""
    low = np.minimum(np.min(g, 0), 0) * shrink
    high = np.maximum(np.max(g, 0), 0) * shrink
    if symmetric:
        s = stored(np.maximum(-low, high) / (2 ** (bits - 1) - 1), dtype)
        s = np.where(s > 0, s, 1)
        return s, np.full_like(s, 2.0 ** (bits - 1))
    s = stored((high - low) / (2**bits - 1), dtype)
    s = np.where(s > 0, s, 1)
    z = -low / s
    if zero_point == "integer":
        return s, np.clip(np.round(z), 0, 2**bits - 1)
    return s, stored(z, dtype)


def round_coded(w, bits, rows, symmetric, zero_point="float", dtype="float32", width=8):
    """As `round_groups`, scales as c[j] u[g, j] and zero points in units of 2^(bits-width), u and
    they in `width` bits."""
    most = 2**width - 1
    groups = [np.asarray(w[i : i + rows], np.float64) for i in range(0, w.shape[0], rows)]
    exact = {"bits": bits, "symmetric": symmetric, "zero_point": "float", "dtype": "float64"}
    full = [fit_group(g, **exact)[0] * np.any(g, 0) for g in groups]
    c = stored(np.max(full, 0) / most, dtype)
    c = np.where(c > 0, c, 1)
    out = []
    for g in groups:
        u = np.clip(np.round(fit_group(g, **exact)[0] / c), 1, most)
        z = np.full(u.shape, 2.0 ** (bits - 1))
        if not symmetric:
            z = -np.minimum(np.min(g, 0), 0) / (c * u)
            whole = np.clip(np.round(z), 0, 2**bits - 1)
            part = np.clip(np.round(z * 2.0 ** (width - bits)), 0, most) * 2.0 ** (bits - width)
            z = whole if zero_point == "integer" else part
        q = np.clip(np.round(g / (c * u) + z), 0, 2**bits - 1)
        out.append(c * u * (q - z))
    return np.concatenate(out)


def round_groups(w, bits, rows, symmetric, zero_point="integer", dtype="float32", shrink=1.0):
    """Quantize-dequantize of w[d_in, d_out] in groups of `rows` along d_in."""
    out = np.empty_like(w, dtype=np.float64)
    for start in range(0, w.shape[0], rows):
        g = np.asarray(w[start : start + rows], np.float64)
        s, z = fit_group(g, bits, symmetric, zero_point, dtype, shrink)
        q = np.clip(np.round(g / s + z), 0, 2**bits - 1)
        out[start : start + rows] = s * (q - z)
    return out

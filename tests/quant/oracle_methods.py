"""Published methods restated in plain NumPy float64; shares no code with the package.

The grid (`oracle.fit_group`) is ours, everything else is as published.
"""

import numpy as np
from oracle import fit_group


def unit_upper(h):
    """(U, D) with H = U diag(D) Uᵀ and U unit upper triangular, column by column from the last."""
    h = np.array(h, np.float64)
    n = len(h)
    u, d = np.eye(n), np.zeros(n)
    for j in range(n - 1, -1, -1):
        later = slice(j + 1, n)
        d[j] = h[j, j] - np.sum(u[j, later] ** 2 * d[later])
        for i in range(j):
            u[i, j] = (h[i, j] - np.sum(u[i, later] * u[j, later] * d[later])) / d[j]
    return u, d


def gptq(w, h, *, bits, rows, symmetric, zero_point="integer", percdamp=0.01, block=128,
         static_groups=True, act_order=False, stale=False):  # fmt: skip
    """GPTQ (Frantar et al., 2022) as auto-gptq and gptqmodel have it.

    Args:
      w: [d_in, d_out]; the published code holds its transpose.
      h: [d_in, d_in], any positive multiple of Σ x xᵀ.
      rows: of a group.
      block: columns (here rows) between two lazy updates of the rest.
      stale: fit a group's scale on arrival to the weights as the last lazy update left them, as
        the published code does; otherwise with the errors of the block so far. They are the same
        where every group begins a block.

    Returns:
      (codes, dequantized weights), float64.
    """
    w = np.array(w, np.float64).T
    h = np.array(h, np.float64)
    n = w.shape[1]
    fit = lambda g: fit_group(g, bits, symmetric, zero_point)  # noqa: E731
    grids = [fit(w[:, i : i + rows].T) for i in range(0, n, rows)]
    perm = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(n)
    w, h = w[:, perm], h[perm][:, perm]
    h = h + percdamp * np.mean(np.diag(h)) * np.eye(n)
    lower = np.linalg.cholesky(h)
    inverse = np.linalg.inv(lower).T @ np.linalg.inv(lower)
    hinv = np.linalg.cholesky(inverse).T
    codes, out = np.zeros_like(w), np.zeros_like(w)
    for i1 in range(0, n, block):
        i2 = min(i1 + block, n)
        w1, err1 = w[:, i1:i2].copy(), np.zeros((len(w), i2 - i1))
        for i in range(i2 - i1):
            at = i1 + i
            if not static_groups and at % rows == 0:
                arrived = w[:, at : at + rows].copy()
                if not stale:
                    end = min(at + rows, i2) - at
                    arrived[:, :end] = w1[:, i : i + end]
                    assert end == min(rows, n - at), "a group straddles two lazy blocks"
                grids[at // rows] = fit(arrived.T)
            s, z = grids[perm[at] // rows]
            q = np.clip(np.round(w1[:, i] / s + z), 0, 2**bits - 1)
            codes[:, at], out[:, at] = q, s * (q - z)
            err = (w1[:, i] - out[:, at]) / hinv[at, at]
            w1[:, i:] -= np.outer(err, hinv[at, at:i2])
            err1[:, i] = err
        w[:, i2:] -= err1 @ hinv[i1:i2, i2:]
    back = np.argsort(perm)
    return codes[:, back].T, out[:, back].T


def hqq(w, *, bits, rows, zero_point, p=0.7, beta=10.0, kappa=1.01, steps=20):
    """HQQ's half-quadratic solver (Badri & Shaji, 2023), keeping each group's best zero point.

    Returns:
      (codes, zero points [n_group, d_out], dequantized weights), d_in a whole number of groups.
    """
    w = np.array(w, np.float64).reshape(-1, rows, w.shape[1])
    grids = [fit_group(g, bits, False, zero_point) for g in w]
    s, z = (np.stack([grid[i] for grid in grids])[:, None] for i in (0, 1))
    top = 2**bits - 1
    keep = (lambda z: np.clip(np.round(z), 0, top)) if zero_point == "integer" else np.float32
    quantized = lambda z: np.clip(np.round(w / s + z), 0, top)  # noqa: E731
    norm = lambda z: np.sum(np.abs(w - s * (quantized(z) - z)) ** p, axis=1, keepdims=True)  # noqa: E731
    best, least = z, norm(z)
    for i in range(steps):
        q = quantized(z)
        x = w - s * (q - z)
        with np.errstate(divide="ignore"):
            threshold = np.abs(x) ** (p - 1) / (beta * kappa**i)
        e = np.sign(x) * np.maximum(np.abs(x) - threshold, 0)
        z = np.mean(q - (w - e) / s, axis=1, keepdims=True)
        kept = keep(z).astype(np.float64)
        error = norm(kept)
        best, least = np.where(error < least, kept, best), np.minimum(error, least)
    q = quantized(best)
    return q.reshape(-1, w.shape[2]), best[:, 0], (s * (q - best)).reshape(-1, w.shape[2])

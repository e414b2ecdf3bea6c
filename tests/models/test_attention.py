"""Attention against a plain NumPy restatement, in one block of queries and in several."""

import jax.numpy as jnp
import numpy as np
import pytest

from ttq_jax.models.attention import QUERY_BLOCK, attend


def by_hand(q, k, v, q_pos, k_pos, valid, window, scale, cap):
    out = np.zeros(q.shape)
    share = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        s = k[b, :, n // share] @ q[b, t, n] * scale
        s = cap * np.tanh(s / cap) if cap else s
        back = q_pos[b, t] - k_pos[b]
        seen = valid[b] & (back >= 0) & (back < window)
        p = np.where(seen, np.exp(s - s[seen].max()), 0) if seen.any() else np.ones(len(s))
        out[b, t, n] = p / p.sum() @ v[b, :, n // share]
    return out


@pytest.mark.parametrize("length", [20, QUERY_BLOCK + 1, 2 * QUERY_BLOCK])
@pytest.mark.parametrize(("window", "cap"), [(10**6, None), (7, 3.0)])
def test_attention_is_numpys(length, window, cap):
    rng = np.random.default_rng(0)
    shape = (2, length, 4, 8)
    q = rng.normal(size=shape).astype(np.float32)
    k, v = (rng.normal(size=(2, length, 2, 8)).astype(np.float32) for _ in range(2))
    valid = np.ones((2, length), bool)
    valid[0, :5], valid[1, -5:] = False, False
    positions = np.maximum(np.cumsum(valid, 1) - 1, 0).astype(np.int32)
    got = attend(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(v),
        q_positions=jnp.asarray(positions), k_positions=jnp.asarray(positions),
        k_valid=jnp.asarray(valid), window=jnp.asarray(window), scale=0.3, cap=cap,
    )  # fmt: skip
    want = by_hand(q, k, v, positions, positions, valid, window, 0.3, cap)
    # What a padding query sees is nobody's business.
    np.testing.assert_allclose(np.asarray(got)[valid], want[valid], atol=1e-5)

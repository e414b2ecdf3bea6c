"""Attention's kernel on a GPU, against plain JAX: what `check_gpu_kernels.py` asks of it."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ttq_jax.models.attention import attend
from ttq_jax.models.triton_attention import attend_prompt

CASES = (("bfloat16", 128, 1024), ("float16", 64, 1024), ("bfloat16", 96, 2048),
         ("float16", 80, 1024))  # fmt: skip
"""Dtype, head width and tokens of what is checked."""

TIMED = (("bfloat16", 128, 1024), ("bfloat16", 128, 4096), ("bfloat16", 64, 4096))
"""What is measured, with Llama-3-8B's heads: 32 of queries, 8 of keys."""

LIMIT = 0.02
"""On the difference from float32, over the largest value: both sides round to 8 bits or more."""


def operands(
    dtype: str, width: int, length: int, heads: int, kv_heads: int
) -> tuple[Array, Array, Array, Array]:
    """Two prompts: one padded on the left, one on the right; (q, k, v, valid)."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, length, n, width)), dtype)
        for n in (heads, kv_heads, kv_heads)
    )
    valid = np.ones((2, length), bool)
    valid[0, : length // 3], valid[1, -length // 5 :] = False, False
    return q, k, v, jnp.asarray(valid)


def plain(q: Array, k: Array, v: Array, valid: Array, *, scale: float) -> Array:
    """The same by `attend`, which no kernel serves."""
    positions = jnp.maximum(jnp.cumsum(valid, 1, dtype=jnp.int32) - 1, 0)
    far = jnp.int32(np.iinfo(np.int32).max)
    return attend(
        q, k, v, q_positions=positions, k_positions=positions, k_valid=valid, window=far,
        scale=scale, cap=None,
    )  # fmt: skip


def check(dtype: str, width: int, length: int, run: Callable[..., Array]) -> dict[str, Any]:
    """A record of one case, as `kernel_checks.run_checks` makes them."""
    record: dict[str, Any] = {
        "kernel": "attention", "implementation": "triton", "kind": f"heads of {width}",
        "dtype": dtype, "m": length,
    }  # fmt: skip
    try:
        q, k, v, valid = operands(dtype, width, length, 4, 2)
        got = jax.jit(partial(run, scale=width**-0.5))(q, k, v, valid)
        wide = (each.astype(jnp.float32) for each in (q, k, v))
        with jax.default_matmul_precision("highest"):
            want = jax.jit(partial(plain, scale=width**-0.5))(*wide, valid)
        got, want = (np.asarray(each, np.float32)[np.asarray(valid)] for each in (got, want))
        error = float(np.abs(got - want).max() / np.abs(want).max())
        return record | {"ok": error <= LIMIT, "error": error, "limit": LIMIT}
    except Exception as e:
        text = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        return record | {"ok": False, "error": text, "limit": None}


def run_checks(run: Callable[..., Array] = attend_prompt) -> list[dict[str, Any]]:
    """A record per case."""
    return [check(*case, run) for case in CASES]


def measure(
    dtype: str, width: int, length: int, *, run: Callable[..., Array] = attend_prompt,
    heads: tuple[int, int] = (32, 8), turns: int = 5,
) -> dict[str, Any]:  # fmt: skip
    """Microseconds of the kernel and of plain XLA, in turns; the median of each."""
    inputs = operands(dtype, width, length, *heads)
    sides = {
        name: jax.jit(partial(of, scale=width**-0.5))
        for name, of in (("kernel", run), ("xla", plain))
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(side(*inputs))
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    times = {name: round(statistics.median(each) * 1e6, 1) for name, each in seconds.items()}
    return {
        "kernel": "attention", "dtype": dtype, "head_dim": width, "m": length, "rows": 2,
        "heads": heads, "microseconds": times,
        "speedup_vs_xla": round(times["xla"] / times["kernel"], 3),
    }  # fmt: skip

"""Kernels against the oracle, on whatever device is there: what `check_gpu_kernels.py` runs first.

Nothing here is particular to a GPU: the caller gives the calls to be checked.
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import PLANES, CodedPairs, CodedScales, grid, pack, reference
from pallas_kernels.choice import Problem

LAYERS = 2
ZERO_POINTS = ("float", "none", "integer")
SEARCH = (1.0, 0.85, 0.7)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison with the oracle.

    `kind`: "exact" (every number is a small multiple of a power of two, so is every sum), "real"
    (within the rounding bound), "search" (a clip search, with importance and low rank), "vmap x"
    and "vmap w" (exact, a batch of activations or of weights).
    """

    kernel: str
    kind: str
    bits: int
    group_size: int
    zero_point: str
    dtype: str
    m: int
    k: int
    n: int
    quantized: bool = False
    implementation: str = "triton"
    scales: str = "float"

    @property
    def grid(self) -> dict[str, Any]:
        """Static arguments of all kernels."""
        return {"bits": self.bits, "group_size": self.group_size}

    @property
    def rounding(self) -> dict[str, Any]:
        """Static arguments of the quantizers."""
        shrinks = SEARCH if self.kind == "search" else (1.0,)
        return self.grid | {
            "zero_point": self.zero_point, "store_dtype": "bfloat16", "shrinks": shrinks,
            "scales": self.scales,
        }  # fmt: skip


def checks(rows: tuple[int, ...], groups: tuple[int, ...], k: int, n: int) -> list[Check]:
    """Every width with every row count; zero points, groups and dtypes rotate.

    Args:
      rows: of x; the larger half is for `prefill_quantize` too.
      groups: sizes that divide `k`.
      k: rows of the weight.
      n: columns.
    """
    out: list[Check] = []
    dtypes = ("bfloat16", "float16", "bfloat16", "float32")

    def add(i: int, **facts: Any) -> None:
        rest: dict[str, Any] = {
            "group_size": groups[i % len(groups)], "zero_point": ZERO_POINTS[i % 3],
            "dtype": dtypes[i // 3 % 4], "k": k, "n": n,
        }  # fmt: skip
        out.append(Check(**(rest | facts)))

    for b, bits in enumerate(PLANES):
        for i, m in enumerate(rows):
            add(b + i, kernel="packed_matmul", kind="exact", bits=bits, m=m)
        for i, m in enumerate((rows[len(rows) // 2], rows[-1])):
            add(b + i, kernel="packed_matmul", kind="real", bits=bits, m=m)
        for i in range(3):
            add(b + i + i // 3, kernel="quantize_pack", kind="exact", bits=bits, m=0)
        for i, quantized in enumerate((False, True)):
            m = rows[(b + 3 * i) % len(rows)]
            add(b + i, kernel="prefill_quantize", kind="exact", bits=bits, m=m, quantized=quantized)
    for i, bits in enumerate((3, 4)):
        add(2 * i, kernel="quantize_pack", kind="search", bits=bits, m=0)
        for kind in ("vmap x", "vmap w"):
            add(i, kernel="packed_matmul", kind=kind, bits=bits, m=rows[i])
        m = rows[-1]
        add(i, kernel="prefill_quantize", kind="exact", bits=bits, m=m)
    for b, bits in enumerate(PLANES):
        coded = partial(add, 2 * b, scales="coded", bits=bits)
        for kind in ("exact", "real"):
            for m in (rows[0], rows[len(rows) // 2]):
                coded(kernel="packed_matmul", kind=kind, m=m)
        # Their weights reach 255 steps: only float32 holds them.
        coded(kernel="quantize_pack", kind="exact", m=0, dtype="float32")
    for quantized in (False, True):
        coded(kernel="prefill_quantize", kind="exact", bits=4, m=rows[2], dtype="float32",
              quantized=quantized)  # fmt: skip
    for b, bits in enumerate(b for b in PLANES if b < 8):
        paired = partial(add, b, scales="coded4", zero_point="float", bits=bits)
        for kind in ("exact", "real"):
            paired(kernel="packed_matmul", kind=kind, m=rows[b % len(rows)])
        paired(kernel="quantize_pack", kind="exact", m=0, dtype="float32")
        paired(kernel="prefill_quantize", kind="exact", m=rows[2], dtype="float32",
               quantized=bool(b % 2))  # fmt: skip
    return out


def packed_operands(check: Check, seed: int) -> tuple[Any, ...]:
    """``(x, planes, scales, zeros)``, weights stacked over layers."""
    rng = np.random.default_rng(seed)
    x: Any
    scales: Any
    zeros: Any
    k, n, groups = check.k, check.n, check.k // check.group_size
    codes = jnp.asarray(rng.integers(0, 2**check.bits, (LAYERS, k, n), np.uint8))
    shape = (LAYERS, groups, n)
    if check.kind == "real":
        x = rng.standard_normal((check.m, k))
        scales = rng.uniform(0.01, 1, shape)
    else:
        x = rng.integers(-2, 3, (check.m, k))
        scales = 2.0 ** rng.integers(-1, 2, shape)
    zeros = rng.integers(0, 2**check.bits, shape)
    kinds = {"none": None, "float": jnp.bfloat16, "integer": jnp.uint8}
    if check.scales != "float":
        whole, most = check.kind != "real", 255 if check.scales == "coded" else 15
        u = rng.integers(1, most, shape, endpoint=True) if not whole else 2 * scales
        columns = rng.uniform(0.01, 1, (LAYERS, n)) if not whole else np.full((LAYERS, n), 0.5)
        columns, kinds["float"] = jnp.asarray(columns, jnp.bfloat16), jnp.uint8
        # In what zero points count in: a whole number of codes, but for pairs at 5 bits.
        zeros = np.floor(zeros * (most + 1) / 2**check.bits)
        stored = CodedScales(jnp.asarray(u, jnp.uint8), columns)
        if check.scales == "coded4":
            stored, kinds["float"] = (
                CodedPairs(jnp.asarray(16 * u + zeros, jnp.uint8), columns),
                None,
            )
    else:
        stored = jnp.asarray(scales, jnp.bfloat16)
    kind = kinds[check.zero_point]
    return (
        jnp.asarray(x, check.dtype), pack(codes, bits=check.bits), stored,
        None if kind is None else jnp.asarray(zeros, kind),
    )  # fmt: skip


def weight_operands(check: Check, seed: int) -> tuple[jax.Array, jax.Array]:
    """``(w, channel_scale)`` whose grids have power-of-two steps and no weight midway.

    A GPU's division may be an ulp off: scales of a few digits, stored in bfloat16, hide that, and
    only a tie would show it in the codes.
    """
    rng = np.random.default_rng(seed)
    k, n, top = check.k, check.n, 2**check.bits - 1
    groups = k // check.group_size
    zero = rng.integers(0, top, (LAYERS, groups, 1, n), endpoint=True)
    if check.scales == "coded4" and check.bits == 5:
        zero -= zero % 2  # four bits count in two codes
    low, high = -zero, top - zero
    if check.zero_point == "none":
        low, high = np.full_like(zero, 1 - 2 ** (check.bits - 1)), 0 * zero + top // 2
    units = rng.integers(low, high, (LAYERS, groups, check.group_size, n), endpoint=True)
    units[:, :, :1], units[:, :, 1:2] = low, high
    d = 2.0 ** rng.integers(0, 2, k)
    steps = 2.0 ** rng.integers(-1, 1, (LAYERS, groups, 1, n))
    if check.scales != "float":
        # Multiples of what is then the column's number, a power of two.
        most = 127.5 if check.scales == "coded" else 7.5
        steps = np.where(np.arange(groups)[:, None, None] == 0, most, steps)
    w = (units * steps).reshape(LAYERS, k, n) / d[:, None]
    return jnp.asarray(w, check.dtype), jnp.asarray(d, jnp.float32)


def different(got: Any, want: Any) -> float:
    """Share of elements that are not equal; 2 if dtypes or shapes differ."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    if any(a.dtype != b.dtype or a.shape != b.shape for a, b in pairs):
        return 2.0
    wrong = sum(int(jnp.sum(a != b)) for a, b in pairs)
    return wrong / max(1, sum(a.size for a, _ in pairs))


def check_matmul(check: Check, call: Callable[..., Any], seed: int) -> tuple[float, float]:
    """``(error, limit)`` of one product."""
    x, planes, scales, zeros = packed_operands(check, seed)
    # The last group is padding from its second half on.
    d_in = check.k - check.group_size // 2
    x = x[:, :d_in]
    run = jax.jit(partial(call, **check.grid))
    weight = (planes, scales, zeros)
    layers = [jax.tree.map(lambda a, i=i: a[i], weight) for i in range(LAYERS)]
    oracle = jax.jit(partial(reference.packed_matmul, problem=problem_of(check)))
    if check.kind == "vmap x":
        batch = jnp.stack([x, -x, x + x])
        got = jax.vmap(lambda x: run(x, *weight, layer=jnp.int32(1)))(batch)
        return different(got, oracle(batch, *layers[1]).astype(x.dtype)), 0.0
    if check.kind == "vmap w":
        got = jax.vmap(lambda w: run(x, *w))(weight)
        want = jnp.stack([oracle(x, *w) for w in layers]).astype(x.dtype)
        return different(got, want), 0.0
    got = run(x, *weight, layer=jnp.int32(LAYERS - 1))
    want = oracle(x, *layers[-1])
    if check.kind == "exact":
        return different(got, want.astype(x.dtype)), 0.0
    # The sizes of what is added: s (q + z), and 128 more of each for the kernel of a few rows.
    s, z = grid.read(scales, zeros, bits=check.bits)
    z = jnp.broadcast_to(z, s.shape) + (256 if check.m <= 2 else 0)
    size = reference.dequantize(planes, s, -z, **check.grid)[-1, :d_in]
    eps = float(jnp.finfo(jnp.float32).eps)
    # Tensor cores cut off where others round: an eps each of k products and sums, in both results.
    bound = 2 * (check.k + 8) * eps * (jnp.abs(x.astype(jnp.float32)) @ size)
    bound = bound + float(jnp.finfo(x.dtype).eps) * jnp.abs(want)
    return float(jnp.max(jnp.abs(got.astype(jnp.float32) - want) / bound)), 1.0


def check_packing(check: Check, call: Callable[..., Any], seed: int) -> tuple[float, float]:
    """``(error, limit)`` of one packing."""
    w, d = weight_operands(check, seed)
    run = jax.jit(partial(call, **check.rounding))
    if check.kind == "exact":
        got = run(w, d, layer=jnp.int32(1))
        return different(got, reference.quantize_pack(w[1], d, problem=problem_of(check))), 0.0
    rng = np.random.default_rng(seed)
    h, down, up = (
        jnp.asarray(a, jnp.float32)
        for a in (rng.gamma(0.5, size=check.k), rng.normal(size=(check.k, 5)),
                  rng.normal(size=(5, check.n)))
    )  # fmt: skip
    w = jnp.asarray(rng.standard_normal(w.shape), check.dtype)
    target = (w[1].astype(jnp.float32) - jnp.matmul(down, up, precision="highest")) * d[:, None]

    def error(packed: Any) -> float:
        """The weighed error of each group, summed: what the search makes least."""
        wrong = jnp.square(reference.dequantize(*packed, **check.grid) - target)
        return float(jnp.sum(h[:, None] * wrong))

    got = error(run(w, d, h, (down, up), layer=jnp.int32(1)))
    want = error(reference.quantize_pack(w[1], d, h, (down, up), problem=problem_of(check)))
    # Codes differ only where two are as near as float32 can tell; the errors then hardly do.
    eps = float(jnp.finfo(jnp.float32).eps)
    return abs(got - want) / want, (check.k + 8) * eps


def check_prefill(check: Check, call: Callable[..., Any], seed: int) -> tuple[float, float]:
    """``(error, limit)`` of one fused prefill."""
    w, d = weight_operands(check, seed)
    whole = np.random.default_rng(seed + 1).integers(-2, 3, (check.m, check.k))
    # Whole after the division by D too.
    x = jnp.asarray(whole * np.asarray(d), check.dtype)
    static = check.rounding | {"quantized": check.quantized}
    got = jax.jit(partial(call, **static))(x, w, d, layer=jnp.int32(1))
    y, packed = reference.prefill_quantize(x, w[1], d, problem=problem_of(check))
    return different(got, (y.astype(x.dtype), packed)), 0.0


CHECKS = {
    "packed_matmul": check_matmul, "quantize_pack": check_packing,
    "prefill_quantize": check_prefill,
}  # fmt: skip


def problem_of(check: Check) -> Problem:
    """The problem that the choice of an implementation sees."""
    packs = check.kernel != "packed_matmul"
    return Problem(
        kernel=check.kernel, m=check.m, d_in=check.k, n=check.n, bits=check.bits,
        group_size=check.group_size, zero_point=check.zero_point, dtype=check.dtype,
        rank=5 if check.kind == "search" else 0, shrinks=check.rounding["shrinks"] if packs else (),
        quantized=check.quantized, scaled=packs, scales=check.scales,
    )  # fmt: skip


def run_checks(
    all_checks: list[Check], calls: Callable[[str, str], Callable[..., Any]]
) -> list[dict[str, Any]]:
    """Runs checks; one that raises fails with its message.

    Args:
      all_checks: what to run.
      calls: ``(kernel, implementation) -> public call`` with the implementation bound.

    Returns:
      A record per check with "ok", "error" and "limit".
    """
    records = []
    for i, check in enumerate(all_checks):
        record = dataclasses.asdict(check)
        try:
            call = calls(check.kernel, check.implementation)
            error, limit = CHECKS[check.kernel](check, call, i)
            record |= {"ok": bool(error <= limit), "error": error, "limit": limit}
        except Exception as e:
            text = " ".join(f"{type(e).__name__}: {e}".split())[:300]
            record |= {"ok": False, "error": text, "limit": None}
        records.append(record)
        if not record["ok"] or (i + 1) % 10 == 0:
            state = "" if record["ok"] else f", MISMATCH in {failure_line(record)}"
            log(f"  {i + 1} of {len(all_checks)} checks{state}")
    return records


FIELDS = ("kernel", "implementation", "kind", "bits", "group_size", "zero_point", "scales",
          "dtype", "m", "quantized", "error", "limit")  # fmt: skip


def failure_line(record: dict[str, Any]) -> str:
    return " ".join(f"{name}={record.get(name, '')}" for name in FIELDS)


def failure_table(records: list[dict[str, Any]]) -> str:
    """What disagrees, a line each under a header."""
    rows = [FIELDS, *(tuple(str(r.get(f, "")) for f in FIELDS) for r in records if not r["ok"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(FIELDS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )

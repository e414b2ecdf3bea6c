"""Kernels measured on the device that is there, next to what they compete with.

A measured program runs a loop on the device, so that the host's part is paid once per hundreds of
calls. Two things would make such a loop measure nothing: results that do not depend on the step
(the compiler computes them once), and a weight that stays in the cache. So each step waits for the
one before through an optimization barrier, and reads another weight of a stack that is larger than
any cache. The contenders take turns; a time is the median over the turns.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import choose, current_target
from ttq_jax.bench import Case, dense_product
from ttq_jax.chips import CHIPS, ChipError

_CACHE = {"gpu": 256e6, "tpu": 512e6, "cpu": 256e6}
_SPEED = {"gpu": 1.5e12, "tpu": 0.8e12, "cpu": 2e9}
_SECONDS = {"gpu": 0.02, "tpu": 0.02, "cpu": 0.2}


@dataclasses.dataclass(frozen=True)
class _Contender:
    """A program that runs `steps` calls, and its arguments."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    steps: int

    def seconds(self) -> float:
        start = time.perf_counter()
        jax.block_until_ready(self.run(*self.arguments))
        return (time.perf_counter() - start) / self.steps


def _steps(size: float, work: float, platform: str) -> int:
    """Calls per measurement, from the bytes and operations of one."""
    flops = {"gpu": 2e14, "tpu": 1e14, "cpu": 3e10}[platform]
    return max(2, min(2000, int(_SECONDS[platform] / max(size / _SPEED[platform], work / flops))))


def _random(shape: Any, depth: int, seed: int) -> jax.Array:
    """A stack of random operands, made on the device; scales are small and positive."""
    key, full = jax.random.key(seed), (depth, *shape.shape)
    if shape.dtype == jnp.uint8:
        return jax.random.bits(key, full, jnp.uint8)
    return (jax.random.uniform(key, full, jnp.float32, 0.5, 1.5) / 64).astype(shape.dtype)


def _indexed(call: Callable[..., Any], x: Any, stack: Any, depth: int, steps: int) -> _Contender:
    """Calls that find their weight in a stack: ``call(x, stack, layer)``."""

    def body(i: Any, carry: Any) -> Any:
        (x, stack), before = carry
        x, stack, _ = jax.lax.optimization_barrier((x, stack, before))
        return (x, stack), call(x, stack, i % depth)

    @jax.jit
    def run(x: Any, stack: Any) -> Any:
        first = call(x, stack, jnp.int32(0))
        return jax.lax.fori_loop(1, steps, body, ((x, stack), first))[1]

    return _Contender(run, (x, stack), steps)


def _apart(call: Callable[..., Any], x: Any, weights: list[Any], steps: int) -> _Contender:
    """Calls on separate weights, as a product reads a dense one without copying it."""
    # A loop of one turn would be inlined, and its calls merged with the first ones.
    turns = max(3, steps // len(weights))

    def body(_: Any, carry: Any) -> Any:
        (x, weights), made = carry
        outs: list[Any] = []
        for w in weights:
            x, w, _ = jax.lax.optimization_barrier((x, w, outs[-1] if outs else made[-1]))
            outs.append(call(x, w))
        return (x, weights), outs

    @jax.jit
    def run(x: Any, weights: list[Any]) -> Any:
        first = [call(x, w) for w in weights]
        return jax.lax.fori_loop(1, turns, body, ((x, weights), first))[1]

    return _Contender(run, (x, weights), turns * len(weights))


def _contenders(case: Case, platform: str) -> dict[str, _Contender]:
    """The kernel, the dense product, and plain XLA on the same packed arrays."""
    size, dense_size = case.floor_bytes(), case.dense_bytes()
    work = 2.0 * case.m * case.k * case.n
    depth = int(np.clip(_CACHE[platform] // size, 2, 64))
    apart = int(np.clip(_CACHE[platform] // dense_size, 2, 8))
    x_shape, weight = case.operands()
    x = tuple(_random(s, 1, 0)[0] for s in x_shape)
    stack = jax.tree.map(lambda s: _random(s, depth, 1), weight)
    steps = _steps(size, work, platform)

    def kernel(implementation: str | None) -> Callable[..., Any]:
        def call(x: Any, stack: Any, layer: Any) -> Any:
            if case.kernel != "packed_matmul":
                stack = (stack[0], stack[1][0])
            return case.run(x, stack, layer=layer, implementation=implementation)

        return call

    def unpacked(x: Any, stack: Any, layer: Any) -> Any:
        from pallas_kernels.xla import dense_matmul

        planes, scales, zeros = stack
        return dense_matmul(x[0], planes, scales, zeros, layer, **case.static)

    packed = case.kernel == "packed_matmul"
    made = {
        "kernel": _indexed(kernel(None), x, stack, depth, steps),
        "xla": _indexed(unpacked if packed else kernel("xla"), x, stack, depth, steps),
    }
    if case.kernel != "quantize_pack":
        dense = jax.ShapeDtypeStruct((case.k, case.n), jnp.dtype(case.dtype))
        weights = [_random(dense, 1, i)[0] for i in range(apart)]
        steps = _steps(dense_size, work, platform)
        made["dense"] = _apart(lambda x, w: dense_product(x[0], w), x, weights, steps)
    return made


def measure(
    cases: Sequence[Case],
    platform: str,
    *,
    turns: int = 5,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Times kernels on the present device.

    Args:
      cases: what to run.
      platform: "gpu", "tpu" or "cpu"; it must be jax's default device.
      turns: measurements of each contender.
      progress: called with (done, in all).

    Returns:
      A record per case, microseconds per call by contender among it. Where a case does not run, its
      numbers are None and `note` says why; a fallback to plain XLA is noted too.

    Raises:
      ChipError: the device is not there.
    """
    try:
        device = jax.devices(platform)[0]
    except RuntimeError as e:
        raise ChipError(
            f"--chip {platform} measures on a {platform.upper()}, and jax finds none here "
            f"({' '.join(str(e).split())[:200]}); choose the name of a TPU to estimate instead"
        ) from e
    records = []
    with jax.default_device(device):
        target = current_target()
        # A chip of the same kind with another memory would be held to the wrong bandwidth.
        chip = CHIPS.get(target.chip or "")
        if chip is not None and chip.name != device.device_kind:
            chip = None
        for i, case in enumerate(cases):
            if platform == "cpu":
                # Nobody computes in bfloat16 there; a "bf16" column would be a straw man.
                case = dataclasses.replace(case, dtype="float32")
            choice = choose(case.problem, target)
            note = choice.reason if choice.fallback else ""
            times: dict[str, float] = {}
            try:
                times = _measured(_contenders(case, platform), turns)
            except Exception as e:
                # Whatever a compiler or a device says: the rest of a sweep is worth having.
                note = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
            record = _record(case, times, chip.bandwidth if chip else None)
            record |= {"block": choice.implementation, "chip": target.chip or target.platform}
            records.append(record | ({"note": note} if note else {}))
            progress(i + 1, len(cases))
    return records


def _measured(contenders: dict[str, _Contender], turns: int) -> dict[str, float]:
    """Median seconds per call of each contender, after a warm-up."""
    for contender in contenders.values():
        contender.seconds()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, contender in contenders.items():
            times[name].append(contender.seconds())
    return {name: statistics.median(t) for name, t in times.items()}


def _record(case: Case, times: dict[str, float], bandwidth: float | None) -> dict[str, Any]:
    """A case's numbers; without times, the same keys."""
    took, dense, xla = (times.get(name) for name in ("kernel", "dense", "xla"))
    floor = case.floor_bytes() / bandwidth if bandwidth else None
    over_dense = round(dense / took, 3) if dense and took else None
    return case.facts() | {
        "cycles": None,
        "floor_cycles": None,
        "fraction_of_floor": round(floor / max(took, floor), 4) if floor and took else None,
        "speedup_vs_bf16": over_dense if case.dtype == "bfloat16" else None,
        "dtype": case.dtype,
        "speedup_vs_dense": over_dense,
        "speedup_vs_xla": round(xla / took, 3) if xla and took else None,
        "microseconds": {name: round(1e6 * t, 2) for name, t in times.items()},
    }

"""Times of kernels on this machine's device, beside those of what they compete with.

A measured program runs a loop on the device, so that the host's part is paid once per hundreds of
calls. Two things would spoil such a measurement: results that do not depend on the step
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
from ttq_jax.chips.absent import CHIPS, ChipError
from ttq_jax.chips.comparison import Case, dense_product

_CACHE = {"gpu": 256e6, "tpu": 512e6, "cpu": 256e6}
_SPEED = {"gpu": 1.5e12, "tpu": 0.8e12, "cpu": 2e9}
_SECONDS = {"gpu": 0.02, "tpu": 0.02, "cpu": 0.2}


# The measured program unrolls its copies, which compile slowly; 16 of the smallest dense weights of
# interest (1024 x 2048) still exceed a cache.
_MOST_COPIES, _MOST_LAYERS = 16, 64


@dataclasses.dataclass(frozen=True)
class Contender:
    """A program that runs `steps` calls, and its arguments.

    Attributes:
      run: the program.
      arguments: arrays, on the device.
      steps: how many calls a run makes.
    """

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    steps: int

    def seconds(self) -> float:
        """Of one call, the mean over a run; the first run compiles."""
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


def _indexed(call: Callable[..., Any], x: Any, stack: Any, depth: int, steps: int) -> Contender:
    """Calls that find their weight in a stack: ``call(x, stack, layer)``."""

    def body(i: Any, carry: Any) -> Any:
        (x, stack), before = carry
        x, stack, _ = jax.lax.optimization_barrier((x, stack, before))
        return (x, stack), call(x, stack, i % depth)

    @jax.jit
    def run(x: Any, stack: Any) -> Any:
        first = call(x, stack, jnp.int32(0))
        return jax.lax.fori_loop(1, steps, body, ((x, stack), first))[1]

    return Contender(run, (x, stack), steps)


def _apart(call: Callable[..., Any], x: Any, weights: list[Any], steps: int) -> Contender:
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

    return Contender(run, (x, weights), turns * len(weights))


def over_stack(
    calls: dict[str, Callable[..., Any]], x: Any, weight: Any, *,
    size: float, work: float, platform: str,
) -> dict[str, Contender]:  # fmt: skip
    """Loops of calls that find their weight in one stack, which outgrows the caches.

    Args:
      calls: by name, ``call(x, stack, layer)`` with ``layer`` int32[].
      x: a tree of shapes, what every call reads; arrays in their place are random.
      weight: the same of one layer of the stack.
      size: bytes that a call moves.
      work: floating point operations of a call.
      platform: "gpu", "tpu" or "cpu"; jax's default device is one.

    Returns:
      A contender per call.
    """
    depth = int(np.clip(_CACHE[platform] // size, 2, _MOST_LAYERS))
    x = jax.tree.map(lambda s: _random(s, 1, 0)[0], x)
    stack = jax.tree.map(lambda s: _random(s, depth, 1), weight)
    steps = _steps(size, work, platform)
    return {name: _indexed(call, x, stack, depth, steps) for name, call in calls.items()}


def over_copies(
    call: Callable[..., Any], x: Any, weight: Any, *, size: float, work: float, platform: str
) -> Contender:
    """A loop of ``call(x, weight)`` over separate weights, which together outgrow the caches.

    Args:
      call: what is measured.
      x: see `over_stack`, as the arguments after it.
      weight: of one call.
      size: bytes that a call moves.
      work: floating point operations of a call.
      platform: "gpu", "tpu" or "cpu".

    Returns:
      The contender.
    """
    count = int(np.clip(_CACHE[platform] // size, 2, _MOST_COPIES))
    x = jax.tree.map(lambda s: _random(s, 1, 0)[0], x)
    made = [jax.tree.map(lambda s, i=i: _random(s, 1, i)[0], weight) for i in range(count)]
    return _apart(call, x, made, _steps(size, work, platform))


def _contenders(case: Case, platform: str) -> dict[str, Contender]:
    """The kernel, the dense product, and plain XLA on the same packed arrays."""
    x, weight = case.operands()
    work = 2.0 * case.m * case.k * case.n

    def kernel(implementation: str | None) -> Callable[..., Any]:
        def call(x: Any, stack: Any, layer: Any) -> Any:
            if case.kernel != "packed_matmul":
                stack = (stack[0], stack[1][0])
            return case.run(x, stack, layer=layer, implementation=implementation)

        return call

    def unpacked(x: Any, stack: Any, layer: Any) -> Any:
        from pallas_kernels.xla import dense_matmul

        planes, scales, zeros = stack
        return dense_matmul(x[0], planes, scales, zeros, layer, problem=case.problem)

    packed = case.kernel == "packed_matmul"
    calls = {"kernel": kernel(None), "xla": unpacked if packed else kernel("xla")}
    made = over_stack(calls, x, weight, size=case.floor_bytes(), work=work, platform=platform)
    if case.kernel != "quantize_pack":
        dense = jax.ShapeDtypeStruct((case.k, case.n), jnp.dtype(case.dtype))
        made["dense"] = over_copies(
            lambda x, w: dense_product(x[0], w), x, dense,
            size=case.dense_bytes(), work=work, platform=platform,
        )  # fmt: skip
    return made


def device_of(platform: str) -> jax.Device:
    """The device that measurements are made on.

    Args:
      platform: "gpu", "tpu" or "cpu".

    Returns:
      The first one.

    Raises:
      ChipError: there is none.
    """
    try:
        return jax.devices(platform)[0]
    except RuntimeError as e:
        raise ChipError(
            f"--chip {platform} measures on a {platform.upper()}, but jax finds none here "
            f"({' '.join(str(e).split())[:200]}); name a TPU to estimate instead"
        ) from e


def measure(
    cases: Sequence[Case],
    platform: str,
    *,
    turns: int = 5,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Times kernels on this machine's device.

    Args:
      cases: what to run.
      platform: "gpu", "tpu" or "cpu"; it must be jax's default device.
      turns: measurements of each contender.
      progress: called with (done, in all).

    Returns:
      A record per case, microseconds per call by contender among it. Where a case does not run, its
      numbers are None and `note` says why; a fallback to plain XLA is noted too.

    Raises:
      ChipError: there is no such device.
    """
    device = device_of(platform)
    records = []
    with jax.default_device(device):
        target = current_target()
        # A chip of the same kind with another memory would be held to the wrong bandwidth.
        chip = CHIPS.get(target.chip or "")
        if chip is not None and chip.name != device.device_kind:
            chip = None
        for i, case in enumerate(cases):
            if platform == "cpu":
                # CPUs are slow in bfloat16; a comparison with it would flatter the kernel.
                case = dataclasses.replace(case, dtype="float32")
            choice = choose(case.problem, target)
            note = choice.reason if choice.fallback else ""
            times: dict[str, float] = {}
            try:
                times = _measured(_contenders(case, platform), turns)
            except Exception as e:
                # Any error of a compiler or a device: the rest of a sweep is still worth having.
                note = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
            record = _record(case, times, chip.bandwidth if chip else None)
            record |= {"block": choice.implementation, "chip": target.chip or target.platform}
            records.append(record | ({"note": note} if note else {}))
            progress(i + 1, len(cases))
    return records


def take_turns(contenders: dict[str, Contender], turns: int) -> dict[str, list[float]]:
    """Measures contenders in turns, after a warm-up of each.

    Args:
      contenders: by name.
      turns: measurements of each, >= 1.

    Returns:
      Per contender, seconds per call in every turn.
    """
    for contender in contenders.values():
        contender.seconds()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, contender in contenders.items():
            times[name].append(contender.seconds())
    return times


def _measured(contenders: dict[str, Contender], turns: int) -> dict[str, float]:
    """Median seconds per call of each contender."""
    return {name: statistics.median(t) for name, t in take_turns(contenders, turns).items()}


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

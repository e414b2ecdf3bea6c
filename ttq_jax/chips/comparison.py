"""What `ttq bench kernels` compares: kernels, problems, and the floor that memory sets.

The floor of a kernel is the time to move every byte that is stored, once, at the memory's full
bandwidth: planes, scales and zero points as they are stored, activations in and out, and for the
quantizers the bfloat16 weight. The bfloat16 product has such a floor too, so that both times of a
speed-up include the wait for memory.

Cycles and bandwidth are of one jax device. That is a whole chip on v5e, v6e (one core) and v5p (two
cores: the estimate is of the slower one, a grid's parallel axis and XLA's products are split over
both, and 4096² x 4096 estimates as 540 thousand cycles where both cores' peak needs 524); on tpu7x
it is one of a chip's two cores, with its half of the bandwidth.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import PLANES, Problem, Target, packed_matmul, prefill_quantize, quantize_pack
from pallas_kernels.choice import module_of, refusal
from pallas_kernels.grid import put_together
from ttq_jax.chips.absent import chip as find_chip
from ttq_jax.chips.cycles import CompileError
from ttq_jax.chips.cycles import estimate as estimate_program

KERNELS = ("packed_matmul", "quantize_pack", "prefill_quantize")

Shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem of one kernel; scales and zero points, or columns of scales, are bfloat16.

    Attributes:
      kernel: one of `KERNELS`.
      bits: width of a code.
      group_size: rows that share a scale.
      symmetric: no zero points.
      m: rows of activations; 0 for `quantize_pack`.
      k: rows of the weight.
      n: its columns.
      dtype: of activations and dense weights.
      scales: how they are stored, one of `pallas_kernels.grid.SCALES`.
    """

    kernel: str
    bits: int
    group_size: int
    symmetric: bool
    m: int
    k: int
    n: int
    dtype: str = "bfloat16"
    scales: str = "float"

    @property
    def static(self) -> dict[str, Any]:
        """The kernel's static arguments."""
        static: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        if self.kernel != "packed_matmul":
            zero_point = "none" if self.symmetric else "float"
            static |= {
                "zero_point": zero_point, "store_dtype": "bfloat16", "scales": self.scales
            }  # fmt: skip
        return static

    @property
    def problem(self) -> Problem:
        """The problem by which an implementation is chosen."""
        quantizes = self.kernel != "packed_matmul"
        return Problem(
            kernel=self.kernel, m=self.m, d_in=self.k, n=self.n, bits=self.bits,
            group_size=self.group_size, zero_point="none" if self.symmetric else "float",
            dtype=self.dtype, shrinks=(1.0,) if quantizes else (), scaled=quantizes,
            scales=self.scales,
        )  # fmt: skip

    def packed_shapes(self) -> tuple[Any, Any, Any]:
        """Planes, scales and zero points."""
        planes = tuple(Shape((self.k * w // 8, self.n), jnp.uint8) for w in PLANES[self.bits])
        p = self.problem
        kept: Any = Shape((self.k // self.group_size, self.n), jnp.dtype(p.scale_dtype))
        columns: Any = Shape((self.n,), jnp.bfloat16) if p.coded else None
        return planes, put_together(kept, columns, p.scales), kept if p.zero_dtype else None

    def operands(self) -> tuple[tuple[Any, ...], Any]:
        """``(activations, weight)``: a tuple of none or one, and a tree of shapes."""
        x = (Shape((self.m, self.k), jnp.dtype(self.dtype)),)
        if self.kernel == "packed_matmul":
            return x, self.packed_shapes()
        weight = Shape((self.k, self.n), jnp.dtype(self.dtype))
        scale = Shape((self.k,), jnp.float32)
        return (() if self.kernel == "quantize_pack" else x), (weight, scale)

    def run(self, x: tuple[Any, ...], weight: Any, **options: Any) -> Any:
        """The public call on such operands; `options` may hold layer and implementation."""
        call: Any = {
            "packed_matmul": packed_matmul, "quantize_pack": quantize_pack,
            "prefill_quantize": prefill_quantize,
        }[self.kernel]  # fmt: skip
        return call(*x, *weight, **self.static, **options)

    def floor_bytes(self) -> int:
        """Every stored byte once."""
        wide = jnp.dtype(self.dtype).itemsize
        size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self.packed_shapes()))
        if self.kernel != "quantize_pack":
            size += wide * self.m * (self.k + self.n)
        if self.kernel != "packed_matmul":
            size += wide * self.k * self.n + 4 * self.k
        return size

    def facts(self) -> dict[str, Any]:
        """The fields of a record that describe the problem."""
        facts = dataclasses.asdict(self)
        del facts["dtype"]
        return facts

    def dense_bytes(self) -> int:
        """The same of a bfloat16 product of that shape."""
        return 2 * (self.k * self.n + self.m * (self.k + self.n))


def dense_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """The bfloat16 product that kernels are compared with.

    Args:
      x: ``[m, k]``.
      w: ``[k, n]``.

    Returns:
      ``[m, n]`` in x's dtype, summed in float32.
    """
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def dense_shapes(case: Case) -> tuple[Any, Any]:
    """Operands of `dense_product`; one row where the case has none."""
    m = max(case.m, 1)
    return Shape((m, case.k), jnp.bfloat16), Shape((case.k, case.n), jnp.bfloat16)


_DEFAULTS: dict[str, dict[str, Any]] = {
    "packed_matmul": {"bits": (2, 3, 4, 5, 8), "group_size": (128, 32), "m": (1, 16)},
    "quantize_pack": {"bits": (3, 4), "group_size": (128, 32), "m": (0,)},
    "prefill_quantize": {"bits": (4,), "group_size": (128, 32), "m": (512, 2048)},
}


def sweep(
    *,
    kernels: Sequence[str] | None = None,
    bits: Sequence[int] | None = None,
    group_sizes: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    shapes: Sequence[tuple[int, int]] | None = None,
    symmetric: bool = False,
    scales: str = "float",
) -> list[Case]:
    """The problems to measure; what is None takes each kernel's own default.

    Args:
      kernels: some of `KERNELS`.
      bits: widths of a code.
      group_sizes: rows that share a scale.
      rows: of activations; `quantize_pack` has none.
      shapes: ``(k, n)``.
      symmetric: no zero points.
      scales: how they are stored.

    Returns:
      Cases, kernel by kernel.

    Raises:
      ValueError: a group size that does not divide a shape, another number out of range, or a grid
        that its scales cannot be stored with.
    """
    cases = []
    for kernel in kernels or KERNELS:
        axes = _DEFAULTS[kernel]
        ms = (0,) if kernel == "quantize_pack" else rows or axes["m"]
        # Four bits of scale and zero point go with at most 5 of code.
        widths = bits or [b for b in axes["bits"] if scales != "coded4" or b <= 5]
        for (k, n), b, g, m in itertools.product(
            shapes or ((4096, 4096),), widths, group_sizes or axes["group_size"], ms
        ):
            whole = b in PLANES and k >= 8 and n >= 1 and k % 8 == 0
            if not whole or g < 8 or g % 8 or k % g or (m < 1 and kernel != "quantize_pack"):
                raise ValueError(
                    f"expected bits of {sorted(PLANES)}, a group size that is a multiple of 8 and "
                    "divides K, and at least 1 row, got "
                    f"bits {b}, group size {g}, {m} rows, K x N = {k}x{n}"
                )
            cases.append(Case(
                kernel=kernel, bits=b, group_size=g, symmetric=symmetric, m=m, k=k, n=n,
                scales=scales,
            ))  # fmt: skip
            _ = cases[-1].problem  # refuses a grid that cannot be stored
    return cases


def estimate(
    cases: Sequence[Case],
    chip: str,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Cycles of kernels on a TPU that is not there, by its compiler's own simulation.

    Args:
      cases: what to compile.
      chip: a TPU of `chips.CHIPS` with a `bytes_per_cycle`.
      progress: called with (done, in all).

    Returns:
      A record per case. Where there is no estimate, its numbers are None and `note` says why.
      `prefill_quantize` has the ratio to a bfloat16 product of its shape too.

    Raises:
      ChipError: the chip is unknown, has no estimate, or its compiler is not installed.
    """
    per_cycle = find_chip(chip).bytes_per_cycle or 1.0
    dense: dict[tuple[int, int, int], float | None] = {}
    records = []
    for i, case in enumerate(cases):
        cycles, block, note = kernel_cycles(case, chip)
        key = (max(case.m, 1), case.k, case.n)
        if cycles is not None and key not in dense:
            plain, _, why = cycles_of(chip, dense_product, dense_shapes(case))
            dense[key] = plain and max(plain, case.dense_bytes() / per_cycle)
            note = note or (f"the bfloat16 product: {why}" if why else "")
        record = _record(case, cycles, per_cycle, dense.get(key))
        record |= {"block": block, "chip": chip}
        records.append(record | ({"note": note} if note else {}))
        progress(i + 1, len(cases))
    return records


def _record(
    case: Case, cycles: int | None, per_cycle: float, bfloat16: float | None
) -> dict[str, Any]:
    """A case's numbers; times are never less than what memory allows."""
    floor = case.floor_bytes() / per_cycle
    took = None if cycles is None else max(cycles, floor)
    record = case.facts() | {
        "cycles": cycles,
        "floor_cycles": round(floor),
        "fraction_of_floor": round(floor / took, 4) if took else None,
        "speedup_vs_bf16": round(bfloat16 / took, 3) if took and bfloat16 else None,
    }
    if case.kernel == "prefill_quantize":
        ratio = round(took / bfloat16, 4) if took and bfloat16 else None
        record["ratio_to_matmul"] = ratio
    return record


def kernel_cycles(case: Case, chip: str) -> tuple[int | None, str, str]:
    """Cycles of a kernel on a TPU that is not there.

    Args:
      case: what to compile.
      chip: see `estimate`.

    Returns:
      Cycles or None, its blocks, and a note: why there are none, or what limits them.

    Raises:
      ChipError: see `estimate`.
    """
    why = refusal(case.problem, "tpu", Target(platform="tpu", chip=chip))
    if why is not None:
        return None, "", why

    x, weight = case.operands()
    at: dict[str, Any] = {"implementation": "tpu"}
    if case.kernel == "packed_matmul":
        # As a model keeps it: out of a stack, nothing is laid out anew.
        weight = jax.tree.map(lambda a: Shape((1, *a.shape), a.dtype), weight)
        at["layer"] = 0

    def call(x: Any, weight: Any) -> Any:
        return case.run(x, weight, **at)

    return cycles_of(chip, call, (x, weight), block_note(case), kernel=case.kernel)


def cycles_of(
    chip: str, fn: Callable[..., Any], shapes: Any, note: Callable[[], str] = str, kernel: str = ""
) -> tuple[int | None, str, str]:
    """Cycles of any program on a TPU that is not there, its operations one after another.

    Args:
      chip: see `estimate`.
      fn: the program.
      shapes: its arguments.
      note: called where it is traced.
      kernel: cycles count only if there are some of an operation named like it.

    Returns:
      Cycles or None, what `note` returned, and a note: why there are none, or what limits them.

    Raises:
      ChipError: see `estimate`.
    """
    try:
        found = estimate_program(chip, fn, *shapes, note=note)
    except CompileError as e:
        return None, "", " ".join(str(e).split())[:200]
    if not any(name.startswith(kernel) for name in found.cycles):
        return None, found.note, "the compiler's profiler gave no estimate"
    why = "the compiler's profiler aborted after the kernel" if found.aborted else ""
    return sum(found.cycles.values()), found.note, why


def block_note(case: Case) -> Callable[[], str]:
    """Names the blocks that a TPU kernel takes; to be called where the program is traced."""

    def note() -> str:
        made = module_of(case.kernel, "tpu").default_blocks(case.problem)
        return " ".join(f"{name}={value}" for name, value in vars(made).items())

    return note

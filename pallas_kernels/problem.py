"""What a kernel is asked to do, in one hashable value: all shapes, dtypes and options.

It is made once, by the public calls, and checked where it is made. Everything behind them takes
its arrays and this: the choice of an implementation, the kernels, and their references.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grid import SCALES, ZERO_POINTS, kind_of, zero_unit
from pallas_kernels.layout import check_packing
from pallas_kernels.search import MOST_REFITS

FLOATS = ("float32", "bfloat16", "float16")
"""What activations, weights, scales and float zero points may be."""

COLUMN_TYPES = ("float32", "bfloat16")
"""What the columns' numbers may be where scales are coded: a float16 has no room below 6e-5."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One call of a kernel, without its numbers.

    Attributes:
      kernel: "packed_matmul", "quantize_pack" or "prefill_quantize".
      m: rows of activations; 0 for `quantize_pack`.
      d_in: input channels.
      n: output channels.
      bits: width of a code.
      group_size: rows that share a scale, a multiple of 8.
      zero_point: one of `grid.ZERO_POINTS`.
      dtype: of the activations; of the weight for `quantize_pack`.
      store_dtype: of scales and float zero points; of the columns' numbers if scales are coded.
      scales: one of `grid.SCALES`.
      rank: of the low-rank term, 0 for none.
      shrinks: factors in (0, 1] on a group's range to choose from; none for `packed_matmul`.
      refits: of each range's scale and zero point to its codes, 0 to 100; see `search`.
      quantized: `prefill_quantize` multiplies with the quantized weight.
      scaled: there is a channel scale.
      out_dtype: of the product, one of `FLOATS`; None is `dtype`.
      row_axes: mesh axes that the other rows of a column are on; () if all are here.

    Raises:
      ValueError: an option that is none.
    """

    kernel: str
    m: int
    d_in: int
    n: int
    bits: int
    group_size: int
    zero_point: str
    dtype: str
    store_dtype: str = "bfloat16"
    scales: str = "float"
    rank: int = 0
    shrinks: tuple[float, ...] = ()
    refits: int = 0
    quantized: bool = False
    scaled: bool = False
    out_dtype: str | None = None
    row_axes: tuple[str, ...] = ()

    def __post_init__(self):
        # Any row count serves, it is padded to whole groups: the check is of the two numbers.
        whole = 8 * max(self.group_size, 1)
        check_packing(bits=self.bits, k=whole, group_size=self.group_size)
        types = COLUMN_TYPES if self.coded else FLOATS
        options = (
            ("scales", SCALES), ("zero_point", ZERO_POINTS), ("store_dtype", types),
            ("out_dtype", (None, *FLOATS)),
        )  # fmt: skip
        for name, known in options:
            if getattr(self, name) not in known:
                among = ", ".join(map(str, known))
                raise ValueError(f"{name}: expected one of {among}, got {getattr(self, name)!r}")
        if self.scales == "coded4" and (self.zero_point != "float" or self.bits == 8):
            raise ValueError(
                "scales 'coded4': expected zero_point 'float' and bits of 2 to 5, got "
                f"{self.zero_point!r} and {self.bits}; 'coded' has the others"
            )
        packs = self.kernel != "packed_matmul"
        if (packs and not self.shrinks) or not all(0 < s <= 1 for s in self.shrinks):
            raise ValueError(
                f"shrinks: expected factors in (0, 1], got {self.shrinks}; 1 is the full range"
            )
        if not 0 <= self.refits <= MOST_REFITS:
            raise ValueError(
                f"refits: expected 0 (none) to {MOST_REFITS}, got {self.refits}; after 2 to 4 "
                "little is left to gain"
            )

    @property
    def k(self) -> int:
        """Rows of codes: input channels, padded to whole groups."""
        return -(-self.d_in // self.group_size) * self.group_size

    @property
    def coded(self) -> bool:
        """Whether scales are multiples of a number of their column."""
        return self.scales != "float"

    @property
    def grid(self) -> dict[str, Any]:
        """How scales and zero points are stored, as the functions of `grid` take it."""
        names = ("bits", "zero_point", "scales", "store_dtype")
        return {name: getattr(self, name) for name in names}

    @property
    def zero_dtype(self) -> str | None:
        """What an array of zero points is stored in; None where there is none."""
        if self.zero_point == "none" or self.scales == "coded4":
            return None
        return "uint8" if self.coded or self.zero_point == "integer" else self.store_dtype

    @property
    def scale_dtype(self) -> str:
        """What a group's scale is stored in."""
        return "uint8" if self.coded else self.store_dtype

    @property
    def zero_unit(self) -> float:
        """What a stored zero point counts in, see `grid.zero_unit`."""
        return zero_unit(self.bits, self.scales)

    @property
    def y_dtype(self) -> str:
        """What a product is returned in."""
        return self.out_dtype or self.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of a number of `dtype`."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def searched(self) -> bool:
        """Whether errors are measured: of more than one range, or before and after a refit."""
        return len(self.shrinks) > 1 or self.refits > 0


def _rank(low_rank: tuple[Any, Any] | None) -> int:
    return 0 if low_rank is None else low_rank[0].shape[-1]


def matmul_problem(
    x: Any, scales: Any, zeros: Any, low_rank: tuple[Any, Any] | None = None, *, bits: int,
    group_size: int, out_dtype: jax.typing.DTypeLike | None = None,
) -> Problem:  # fmt: skip
    """The problem of a `packed_matmul`.

    Args:
      x: ``[..., d_in]``.
      scales: `grid.Scales`, ``[..., k // group_size, n]``.
      zeros: likewise, or None.
      low_rank: ``(A, B)`` or None.
      bits: width of a code.
      group_size: rows that share a scale.
      out_dtype: of the product; None is x's.

    Returns:
      The problem; `store_dtype` is float16 if anything stored is.
    """
    kind = kind_of(scales)
    kept = scales if kind == "float" else scales.columns
    stored = {a.dtype.name for a in (kept, zeros) if a is not None}
    zero_point = "integer" if "uint8" in stored and kind == "float" else "float"
    if zeros is None and kind != "coded4":
        zero_point = "none"
    return Problem(
        kernel="packed_matmul", m=math.prod(x.shape[:-1]), d_in=x.shape[-1], n=kept.shape[-1],
        bits=bits, group_size=group_size, zero_point=zero_point,
        dtype=x.dtype.name, rank=_rank(low_rank), scales=kind,
        store_dtype="float16" if "float16" in stored else kept.dtype.name,
        out_dtype=None if out_dtype is None else jnp.dtype(out_dtype).name,
    )  # fmt: skip


def rounding_problem(
    w: Any, channel_scale: Any = None, low_rank: tuple[Any, Any] | None = None, x: Any = None, *,
    bits: int, group_size: int, zero_point: str, store_dtype: jax.typing.DTypeLike,
    scales: str = "float", shrinks: tuple[float, ...] = (1.0,), refits: int = 0,
    quantized: bool = False, row_axes: tuple[str, ...] = (),
) -> Problem:  # fmt: skip
    """The problem of a `prefill_quantize`, or of a `quantize_pack` without x.

    Args:
      w: ``[..., d_in, n]``.
      channel_scale: ``[d_in]`` or None.
      low_rank: ``(A, B)`` or None.
      x: ``[..., d_in]`` or None.
      bits: width of a code.
      group_size: rows that share a scale.
      zero_point: see `Problem`, as the arguments after it.
      store_dtype: see `Problem`.
      scales: see `Problem`.
      shrinks: see `Problem`.
      refits: see `Problem`.
      quantized: see `Problem`.
      row_axes: see `Problem`.

    Returns:
      The problem.
    """
    d_in, n = w.shape[-2:]
    return Problem(
        kernel="quantize_pack" if x is None else "prefill_quantize",
        m=0 if x is None else math.prod(x.shape[:-1]), d_in=d_in, n=n, bits=bits,
        group_size=group_size, zero_point=zero_point, dtype=(w if x is None else x).dtype.name,
        store_dtype=jnp.dtype(store_dtype).name, scales=scales, rank=_rank(low_rank),
        shrinks=tuple(map(float, shrinks)), refits=refits, quantized=quantized,
        scaled=channel_scale is not None, row_axes=row_axes,
    )  # fmt: skip

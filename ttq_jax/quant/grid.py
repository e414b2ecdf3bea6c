"""The quantization grid: bits, groups, zero points. Its arithmetic is in `pallas_kernels.grid`."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import grid as formula
from pallas_kernels import search
from pallas_kernels.reference import searched
from ttq_jax.config import ConfigError
from ttq_jax.errors import check_fields, shown

BITS = (2, 3, 4, 5, 8)
STORE_DTYPES = ("bfloat16", "float16", "float32")
SCALES = formula.SCALES
CodedPairs = formula.CodedPairs
CodedScales = formula.CodedScales
kind_of = formula.kind_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A quantization grid.

    Attributes:
      bits: width of a code: 2, 3, 4, 5 or 8.
      group_size: input channels that share a scale: a positive multiple of 8, or -1 for all of
        them.
      symmetric: whether no zero point is stored.
      zero_point: "float" (stored like a scale: both ends of a group's range are on the grid) or
        "integer" (whole: 0 is on the grid; AutoAWQ's and GPTQ's convention).
      scales: "float"; "coded": scales and zero points take eight bits each, and every column one
        number that its scales are multiples of; or "coded4": four bits each, together in a byte.
        That needs a zero point of "float" and at most 5 bits.
      store_dtype: type of scales, float zero points, channel scales and low-rank factors; of the
        columns' numbers where scales are coded.
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    zero_point: str = "float"
    scales: str = "float"
    store_dtype: str = "bfloat16"

    def __post_init__(self):
        check_fields(self, ConfigError)
        if self.bits not in BITS:
            raise ConfigError(f"bits: expected one of {', '.join(map(str, BITS))}, got {self.bits}")
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise ConfigError(
                f"group size: expected a positive multiple of 8, or -1 for all input channels, "
                f"got {self.group_size}"
            )
        if self.zero_point not in {"integer", "float"}:
            raise ConfigError(
                f"zero point: expected 'integer' or 'float', got {shown(self.zero_point)}"
            )
        if self.scales not in SCALES:
            raise ConfigError(
                f"scales: expected one of {', '.join(SCALES)}, got {shown(self.scales)}"
            )
        if self.scales == "coded4" and (self.kind != "float" or self.bits == 8):
            raise ConfigError(
                "scales 'coded4': expected a zero point of 'float', not symmetric, and at most 5 "
                f"bits, got {'symmetric' if self.symmetric else shown(self.zero_point)} and "
                f"{self.bits} bits; set scales to 'coded' for other grids"
            )
        if self.scales != "float" and self.store_dtype == "float16":
            raise ConfigError(
                "coded scales: expected store_dtype bfloat16 or float32, got 'float16', in which "
                "the columns' numbers would lose their last bits; or set scales to 'float'"
            )
        if self.store_dtype not in STORE_DTYPES:
            raise ConfigError(
                f"store dtype: expected one of {', '.join(STORE_DTYPES)}, got "
                f"{shown(self.store_dtype)}"
            )

    def rows_per_group(self, d_in: int) -> int:
        """The group size at a number of input channels: never more than these, padded.

        Args:
          d_in: input channels.

        Returns:
          A multiple of 8.
        """
        whole = -(-d_in // 8) * 8
        return whole if self.group_size == -1 else min(self.group_size, whole)

    def packing(self, d_in: int) -> dict[str, Any]:
        """The grid as the kernels' keyword arguments.

        Args:
          d_in: input channels.

        Returns:
          bits, group_size, zero_point, scales and store_dtype.
        """
        return {
            "bits": self.bits,
            "group_size": self.rows_per_group(d_in),
            "zero_point": self.kind,
            "scales": self.scales,
            "store_dtype": self.store_dtype,
        }

    @property
    def kind(self) -> str:
        """The zero point as the kernels name it: "none", "float" or "integer"."""
        return "none" if self.symmetric else self.zero_point


def split_groups(w: Float[Array, " d_in *rest"], rows: int) -> Float[Array, "n_group rows *rest"]:
    """Groups along the first axis, padded with zeros to a whole number of groups."""
    padding = -w.shape[0] % rows
    w = jnp.pad(w, [(0, padding)] + [(0, 0)] * (w.ndim - 1))
    return w.reshape(-1, rows, *w.shape[1:])


def store(x: Array, dtype: str) -> Array:
    """Float32 in the dtype that it is stored in.

    What reads it as float32 within one program gets the numbers that are stored; a bare `astype`
    does not promise that, see `pallas_kernels.grid.as_stored`.
    """
    return formula.as_stored(x, dtype).astype(dtype)


def _stored(grid: Grid) -> dict[str, Any]:
    packing = grid.packing(8)
    del packing["group_size"]
    return packing


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ColumnGrid(Grid):
    """A grid for one weight, whose coded scales are multiples of a number per column.

    Attributes:
      columns: float32[1, d_out] with the values that are stored; None where scales are not coded.
    """

    columns: Any = None

    def of(self, columns: slice) -> "ColumnGrid":
        """The grid of some of the columns."""
        if self.columns is None:
            return self
        return dataclasses.replace(self, columns=self.columns[:, columns])


def for_weight(grid: Grid, groups: Float[Array, "n_group rows d_out"]) -> ColumnGrid:
    """The grid of a whole weight, to `fit` any of its groups.

    Args:
      grid: the recipe's.
      groups: the weight, float32.

    Returns:
      The same grid with the weight's columns.
    """
    columns = None
    if grid.scales != "float":
        low, high = jnp.min(groups, axis=1), jnp.max(groups, axis=1)
        columns = formula.column_scales(low, high, **_stored(grid))
    return with_columns(grid, columns)


def with_columns(grid: Grid, columns: Float[Array, "1 d_out"] | None) -> ColumnGrid:
    """The grid of a weight whose columns' numbers are known, see `ColumnGrid`."""
    fields = {f.name: getattr(grid, f.name) for f in dataclasses.fields(Grid)}
    return ColumnGrid(**fields, columns=columns)


def fit_range(
    low: Float[Array, "n_group d_out"], high: Float[Array, "n_group d_out"], grid: Grid
) -> tuple[Float[Array, "n_group d_out"], Float[Array, "n_group d_out"]]:
    """Scales and zero points of ranges.

    Args:
      low: smallest weight of each group, float32.
      high: largest.
      grid: from `for_weight`.

    Returns:
      (scales, zeros), float32 with the values that are stored.
    """
    return formula.fit(low, high, _columns(grid), **_stored(grid))


def _columns(grid: Grid) -> Array | None:
    """What coded scales are multiples of; None where they are not coded."""
    columns = grid.columns if isinstance(grid, ColumnGrid) else None
    assert (columns is None) == (grid.scales == "float"), "coded: pass what for_weight made"
    return columns


def fit(
    groups: Float[Array, "n_group rows d_out"], grid: Grid
) -> tuple[Float[Array, "n_group d_out"], Float[Array, "n_group d_out"]]:
    """Scales and zero points of each group's whole range, see `fit_range`."""
    return fit_range(jnp.min(groups, axis=1), jnp.max(groups, axis=1), grid)


def fit_scales(scales: Float[Array, "n_group d_out"], grid: Grid) -> Float[Array, "n_group d_out"]:
    """Positive scales as the grid stores them; float32. Coded: the grid is from `for_weight`."""
    return search.fit_scales(scales, _columns(grid), **_stored(grid))


def fit_zeros(zeros: Float[Array, "n_group d_out"], grid: Grid) -> Float[Array, "n_group d_out"]:
    """Zero points, in units of codes, as a grid with zero points stores them; float32."""
    return formula.fit_zeros(zeros, **_stored(grid))


def search_ranges(
    groups: Float[Array, "n_group rows n"],
    importance: Float[Array, "n_group rows"],
    grid: Grid,
    shrinks: tuple[float, ...],
    refits: int = 0,
) -> tuple[Float[Array, "n_group n"], Float[Array, "n_group n"]]:
    """The clip search as plain JAX, for roundings without a kernel.

    Args:
      groups: scaled weights, float32.
      importance: h, what a squared error costs.
      grid: from `for_weight`.
      shrinks: factors on a group's range; the first of equally good ones wins.
      refits: see `ClipSearch`.

    Returns:
      (scales, zeros), float32 with the values that are stored.
    """
    low, high = jnp.min(groups, axis=1), jnp.max(groups, axis=1)
    if len(shrinks) == 1 and not refits:
        return fit_range(low * shrinks[0], high * shrinks[0], grid)
    return searched(
        groups, importance[..., None], low, high, shrinks=shrinks, refits=refits,
        columns=_columns(grid), **_stored(grid),
    )  # fmt: skip


def write(
    scales: Float[Array, "n_group d_out"], zeros: Float[Array, "n_group d_out"], grid: ColumnGrid
) -> tuple[Any, Array | None]:
    """Scales and zero points as `QuantizedLinear` holds them.

    Args:
      scales: with the values that are stored, as from `fit`.
      zeros: likewise.
      grid: the one that they were fitted with.

    Returns:
      (scales, zeros).
    """
    return formula.write(scales, zeros, grid.columns, **_stored(grid))


def encode(
    groups: Float[Array, "n_group rows d_out"],
    scales: Float[Array, "n_group d_out"],
    zeros: Float[Array, "n_group d_out"],
    grid: Grid,
) -> Float[Array, "n_group rows d_out"]:
    """The nearest code of each weight (round to nearest).

    Args:
      groups: weights, float32.
      scales: from `fit`.
      zeros: from `fit`.
      grid: the grid.

    Returns:
      Whole numbers in [0, 2^bits − 1], float32.
    """
    return formula.encode(groups, scales[:, None], zeros[:, None], bits=grid.bits)


def decode(
    codes: Float[Array, "n_group rows d_out"],
    scales: Float[Array, "n_group d_out"],
    zeros: Float[Array, "n_group d_out"],
) -> Float[Array, "n_group rows d_out"]:
    """What the codes stand for, float32: s (q − z)."""
    return formula.decode(codes, scales[:, None], zeros[:, None])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearest:
    """Round to nearest over each group's full range."""

    powers: ClassVar[tuple[float, ...]] = ()
    span: ClassVar[int] = 0
    shrinks: ClassVar[tuple[float, ...]] = (1.0,)  # the whole range
    refits: ClassVar[int] = 0

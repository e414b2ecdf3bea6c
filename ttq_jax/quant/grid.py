"""The grid: group ranges -> scales and zero points -> codes.

    asymmetric   s = (max − min) / (2^b − 1),      z = −min / s,    w ≈ s (q − z)
    symmetric    s = max|w| / (2^(b−1) − 1),       z = 2^(b−1)

The range always contains 0, so that exact zeros (and the padding) stay exact and a constant group
is well defined. Scales are rounded to their storage type *before* the codes are chosen: the codes
make up for that rounding, and the packed weight is exactly what the error was measured on.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from ttq_jax.config import ConfigError

BITS = (2, 3, 4, 5, 8)
STORE_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Static description of the codes' grid.

    Attributes:
      bits: width of a code, one of `BITS`.
      group_size: rows of a column that share a scale: a positive multiple of 8, or -1 for the
        whole row.
      symmetric: no zero point is stored.
      zero_point: "float" (stored like a scale: both ends of a group's range are on the grid) or
        "integer" (uint8: 0 is on the grid; AutoAWQ's and GPTQ's convention).
      store_dtype: type of scales, float zero points, channel scales and low-rank factors.
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    zero_point: str = "float"
    store_dtype: str = "bfloat16"

    def __post_init__(self):
        if self.bits not in BITS:
            raise ConfigError(f"bits: expected one of {', '.join(map(str, BITS))}, got {self.bits}")
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise ConfigError(
                f"group size: expected a positive multiple of 8, or -1 for the whole row, "
                f"got {self.group_size}"
            )
        if self.zero_point not in {"integer", "float"}:
            raise ConfigError(f"zero point: expected 'integer' or 'float', got {self.zero_point!r}")
        if self.store_dtype not in STORE_DTYPES:
            raise ConfigError(
                f"store dtype: expected one of {', '.join(STORE_DTYPES)}, got {self.store_dtype!r}"
            )

    def rows_per_group(self, d_in: int) -> int:
        """The group size in rows for a width: never more than the whole (padded) row.

        Args:
          d_in: input channels.

        Returns:
          A multiple of 8.
        """
        whole = -(-d_in // 8) * 8
        return whole if self.group_size == -1 else min(self.group_size, whole)


def split_groups(w: Float[Array, "d_in *rest"], rows: int) -> Float[Array, "n_group rows *rest"]:
    """Groups along the first axis, padded with zeros to a whole number of groups."""
    padding = -w.shape[0] % rows
    w = jnp.pad(w, [(0, padding)] + [(0, 0)] * (w.ndim - 1))
    return w.reshape(-1, rows, *w.shape[1:])


def store(x: Array, grid: Grid) -> Array:
    """X in the type that small per-group and per-channel numbers are stored in."""
    return x.astype(grid.store_dtype)


def fit(
    groups: Float[Array, "n_group rows d_out"], grid: Grid, shrink: float | Array = 1.0
) -> tuple[Float[Array, "n_group d_out"], Array | None]:
    """Scales and zero points from each group's range.

    Args:
      groups: weights, float32.
      grid: the grid.
      shrink: factor on the range, in (0, 1]; values outside the shrunk range saturate.

    Returns:
      (scales, zeros) as stored; zeros is None if symmetric, uint8 if integer.
    """
    low = jnp.minimum(jnp.min(groups, axis=1), 0.0) * shrink
    high = jnp.maximum(jnp.max(groups, axis=1), 0.0) * shrink
    top = 2**grid.bits - 1
    if grid.symmetric:
        step = jnp.maximum(-low, high) / (2 ** (grid.bits - 1) - 1)
    else:
        step = (high - low) / top
    scales = store(step, grid)
    # An all-zero group, or a range below the storage type's smallest number, is exactly 0.
    scales = jnp.where(scales > 0, scales, jnp.ones_like(scales))
    if grid.symmetric:
        return scales, None
    zeros = -low / scales.astype(jnp.float32)
    if grid.zero_point == "integer":
        return scales, jnp.clip(jnp.round(zeros), 0, top).astype(jnp.uint8)
    return scales, store(zeros, grid)


def _zero(zeros: Array | None, grid: Grid) -> Array | float:
    return 2.0 ** (grid.bits - 1) if zeros is None else zeros.astype(jnp.float32)[:, None]


def encode(
    groups: Float[Array, "n_group rows d_out"], scales: Array, zeros: Array | None, grid: Grid
) -> UInt8[Array, "n_group rows d_out"]:
    """The nearest code of each weight (round to nearest).

    Args:
      groups: weights, float32.
      scales: from `fit`.
      zeros: from `fit`.
      grid: the grid.

    Returns:
      Codes in [0, 2^bits − 1].
    """
    steps = groups / scales.astype(jnp.float32)[:, None]
    codes = jnp.clip(jnp.round(steps + _zero(zeros, grid)), 0, 2**grid.bits - 1)
    return codes.astype(jnp.uint8)


def decode(
    codes: UInt8[Array, "n_group rows d_out"], scales: Array, zeros: Array | None, grid: Grid
) -> Float[Array, "n_group rows d_out"]:
    """What the codes stand for, float32: s (q − z)."""
    return scales.astype(jnp.float32)[:, None] * (codes.astype(jnp.float32) - _zero(zeros, grid))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearest:
    """Round to nearest over each group's full range."""

    @property
    def powers(self) -> tuple[float, ...]:
        """No moments are read."""
        return ()

    def __call__(
        self,
        groups: Float[Array, "n_group rows d_out"],
        importance: Float[Array, "n_group rows"] | None,
        grid: Grid,
    ) -> tuple[UInt8[Array, "n_group rows d_out"], Array, Array | None]:
        """(codes, scales, zeros)."""
        del importance
        scales, zeros = fit(groups, grid)
        return encode(groups, scales, zeros, grid), scales, zeros

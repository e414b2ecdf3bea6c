"""Rounding with clip search: narrow a group's range where that lowers the output error.

Each group and column picks, from a few shrink factors of its range, the one with the smallest
activation-weighted error Σ_i h_i (w_i − ŵ_i)², h_i = E[x_i²]/D_i² (Lin et al., 2023, AutoAWQ's
search, there on layer outputs). The full range is always a candidate, so by this measure the search
is never worse than no search.

A range is a guess at the scale and the zero point. For the codes it leads to, the best ones are a
weighted line fit of the weights over the codes (Lloyd's iteration on an even grid; llama.cpp fits
its K-quants so). *Refits* alternate the two: fit, round again, keep it where the error fell.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from ttq_jax.config import ConfigError
from ttq_jax.errors import check_fields
from ttq_jax.quant.grid import (
    Grid,
    decode,
    encode,
    fit_range,
    fit_scales,
    fit_zeros,
    split_groups,
)

# One factor is tried after the other, and all are listed before.
_MOST_STEPS = 10_000


def shrink_factors(steps: int, smallest: float) -> tuple[float, ...]:
    """Evenly spaced factors on a group's range, from 1 down.

    Args:
      steps: how many, 1 to 10000.
      smallest: the last one, in (0, 1].

    Returns:
      The factors; (1,) for one step.

    Raises:
      ConfigError: a value outside its range.
    """
    if not 1 <= steps <= _MOST_STEPS or not 0 < smallest <= 1:
        raise ConfigError(
            f"clip search: expected steps >= 1, at most {_MOST_STEPS}, and 0 < smallest <= 1, got "
            f"{steps} and {smallest}"
        )
    step = (1.0 - smallest) / max(steps - 1, 1)
    return tuple(1.0 - i * step for i in range(steps))


def check_refits(refits: int) -> None:
    """Refuses a number of refits that is none.

    Args:
      refits: see `ClipSearch`.

    Raises:
      ConfigError: it is below 0 or above 100.
    """
    if not 0 <= refits <= 100:
        raise ConfigError(
            f"refits: expected 0 (none) to 100, got {refits}; after 2 to 4 little is left to gain"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipSearch:
    """Nearest rounding after a search over the groups' ranges.

    Attributes:
      steps: shrink factors tried, >= 1; the defaults are AutoAWQ's (1, 0.95, …, 0.55).
      smallest: the last factor tried, in (0, 1].
      refits: how often each candidate's scale and zero point are fitted to its codes, 0 to 100;
        on a symmetric grid the scale alone. No kernel does that: it is plain JAX.
    """

    steps: int = 10
    smallest: float = 0.55
    refits: int = 0
    powers: ClassVar[tuple[float, ...]] = (2.0,)  # weighs the error
    span: ClassVar[int] = 0

    def __post_init__(self):
        check_fields(self, ConfigError)
        shrink_factors(self.steps, self.smallest)
        check_refits(self.refits)

    @property
    def shrinks(self) -> tuple[float, ...]:
        """The factors on a group's range that are tried, the whole range first."""
        return shrink_factors(self.steps, self.smallest)

    def round(
        self, w: Float[Array, "d_in n"], gram: Float[Array, "d_in 1 1"] | None, grid: Grid
    ) -> tuple[UInt8[Array, "k n"], Float[Array, "n_group n"], Float[Array, "n_group n"]]:
        """Codes of a scaled weight, see `SecondOrder.round`.

        Args:
          w: D · W.
          gram: E[x²] of x / D, a Gram matrix in blocks of one channel; None weighs all alike.
          grid: the codes' grid.

        Returns:
          (codes, scales, zeros).
        """
        rows = grid.rows_per_group(w.shape[0])
        groups = split_groups(w, rows)
        h = jnp.ones(w.shape[0], jnp.float32) if gram is None else gram[:, 0, 0]
        scales, zeros = search_ranges(
            groups, split_groups(h, rows), grid, self.shrinks, self.refits
        )
        codes = encode(groups, scales, zeros, grid).astype(jnp.uint8)
        return codes.reshape(-1, w.shape[1]), scales, zeros


class _Fit(NamedTuple):
    """A scale and a zero point per group, and the weighted error that they leave."""

    scales: Array
    zeros: Array
    error: Array


def search_ranges(
    groups: Float[Array, "n_group rows n"],
    importance: Float[Array, "n_group rows"],
    grid: Grid,
    shrinks: tuple[float, ...],
    refits: int = 0,
) -> tuple[Float[Array, "n_group n"], Float[Array, "n_group n"]]:
    """The search as plain JAX, for roundings without a kernel.

    Args:
      groups: scaled weights, float32.
      importance: h, what a squared error costs.
      grid: the codes' grid.
      shrinks: factors on a group's range; the first of equally good ones wins.
      refits: see `ClipSearch`.

    Returns:
      (scales, zeros), float32 with the values that are stored.
    """
    low, high = jnp.min(groups, axis=1), jnp.max(groups, axis=1)
    first = fit_range(low * shrinks[0], high * shrinks[0], grid)
    if len(shrinks) == 1 and not refits:
        return first

    def measured(scales: Array, zeros: Array) -> _Fit:
        wrong = groups - decode(encode(groups, scales, zeros, grid), scales, zeros)
        error = jnp.einsum("gr,grn->gn", importance, jnp.square(wrong), precision="highest")
        return _Fit(scales, zeros, error)

    def refit(_: Array, best: _Fit) -> _Fit:
        codes = encode(groups, best.scales, best.zeros, grid)
        fitted = fit_codes(groups, importance, codes, best.scales, best.zeros, grid)
        return _better(best, measured(*fitted))

    # One candidate after the other, not vmapped: one candidate's temporaries at a time.
    def candidate(best: _Fit, shrink: Array) -> tuple[_Fit, None]:
        found = measured(*fit_range(low * shrink, high * shrink, grid))
        if refits:
            found = jax.lax.fori_loop(0, refits, refit, found)
        return _better(best, found), None

    start = _Fit(*first, jnp.full_like(low, jnp.inf))
    best, _ = jax.lax.scan(candidate, start, jnp.asarray(shrinks, jnp.float32))
    return best.scales, best.zeros


def _better(old: _Fit, new: _Fit) -> _Fit:
    """The new one where its error is smaller."""
    less = new.error < old.error
    return _Fit(*(jnp.where(less, n, o) for n, o in zip(new, old, strict=True)))


def fit_codes(
    groups: Float[Array, "n_group rows n"],
    importance: Float[Array, "n_group rows"],
    codes: Float[Array, "n_group rows n"],
    scales: Float[Array, "n_group n"],
    zeros: Float[Array, "n_group n"],
    grid: Grid,
) -> tuple[Float[Array, "n_group n"], Float[Array, "n_group n"]]:
    """The line w ≈ s (q − z) with the least weighted squares, as the grid stores it.

    Of 2×2 normal equations the slope s is solved first and rounded to what is stored. The zero
    point is the best one for that stored scale, rounded in turn.

    Args:
      groups: w, float32.
      importance: of each row's square.
      codes: q.
      scales: kept where the codes determine none: one code only, or rows that weigh nothing.
      zeros: the same; kept on a symmetric grid, too.
      grid: from `for_weight`.

    Returns:
      (scales, zeros), float32 with the values that are stored.
    """
    # Counted from the zero point, so that no mean is far from 0 and no difference cancels.
    q = codes - zeros[:, None]

    def total(of: Array) -> Array:
        return jnp.einsum("gr,grn->gn", importance, of, precision="highest")

    qq, qw = total(jnp.square(q)), total(q * groups)
    mean_q = mean_w = jnp.zeros_like(qq)
    if not grid.symmetric:
        weight = jnp.sum(importance, axis=1)[:, None]
        weight = jnp.where(weight > 0, weight, 1.0)
        sum_q, sum_w = total(q), total(groups)
        mean_q, mean_w = sum_q / weight, sum_w / weight
        qq, qw = qq - sum_q * mean_q, qw - sum_q * mean_w
    solved = (qq > 0) & (qw > 0)
    slope = jnp.where(solved, qw, 1.0) / jnp.where(solved, qq, 1.0)
    fitted = jnp.where(solved, fit_scales(slope, grid), scales)
    if grid.symmetric:
        return fitted, zeros
    return fitted, jnp.where(solved, fit_zeros(zeros + mean_q - mean_w / fitted, grid), zeros)

"""Which scale and zero point a group gets: the best of some ranges, each fitted to its codes.

A range is a guess at the scale and the zero point. For the codes that it leads to, the best ones
are a line fit of the weights over the codes, w ≈ s (q − z), with the least Σ h (w − s (q − z))². A
*refit* makes that fit and rounds again, and is kept where the error fell (Lloyd's iteration on an
even grid; llama.cpp fits its K-quants so).

As in `grid`, the same lines run inside Pallas kernels and outside. They see what is known of each
group, one number per group and column; how a sum over a group's rows is made is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import grid
from pallas_kernels.grid import Nearest, Stored

MOST_REFITS = 100
"""After 2 to 4 little is left to gain."""

Measure = Callable[[jax.Array, jax.Array, bool], tuple[jax.Array, tuple[jax.Array, ...]]]
"""``(scales, zeros, refitted)`` to the error, and where it is refitted the sums of `terms`."""


class Found(NamedTuple):
    """A scale and a zero point per group, what they leave, and what a refit needs.

    Attributes:
      scales: float32.
      zeros: float32.
      error: Σ h (w − ŵ)².
      sums: of `terms`; () where no refit follows.
    """

    scales: jax.Array
    zeros: jax.Array
    error: jax.Array
    sums: tuple[jax.Array, ...] = ()


def _better(old: Any, new: Any) -> Any:
    """The new one where its error is smaller."""
    less = new.error < old.error
    return jax.tree.map(lambda n, o: jnp.where(less, n, o), new, old)


def best(
    low: jax.Array,
    high: jax.Array,
    shrink: Callable[[Any], Any],
    tried: int,
    refits: int,
    measure: Measure,
    weights: tuple[jax.Array, jax.Array] | None,
    **form: Any,
) -> tuple[jax.Array, jax.Array]:
    """Tries ranges one after the other, and refits each.

    Args:
      low: float32, the smallest weight of each group.
      high: likewise, the largest.
      shrink: the index of a range, int32, to the factor on ``low`` and ``high``.
      tried: how many there are; the first of equally good ones wins.
      refits: of each, 0 for none.
      measure: see `Measure`.
      weights: Σ h and Σ h w of each group; None where nothing is refitted, or the grid has no
        zero points.
      **form: what `grid.fit` takes beside the ranges.

    Returns:
      ``(scales, zeros)``, float32 with the values that are stored.
    """

    def refit(old: Found, last: bool) -> Found:
        fitted = fit_line(old.sums, weights, old.scales, old.zeros, **form)
        if last:
            old = old._replace(sums=())
        return _better(old, Found(*fitted, *measure(*fitted, not last)))

    def attempt(i: Any, least: Found) -> Found:
        factor = shrink(i)
        fitted = grid.fit(low * factor, high * factor, **form)
        found = Found(*fitted, *measure(*fitted, refits > 0))
        if refits > 1:
            found = lax.fori_loop(0, refits - 1, lambda _, old: refit(old, False), found)
        if refits:
            found = refit(found, True)
        return _better(least, found)

    start = Found(jnp.ones_like(low), jnp.zeros_like(low), jnp.full_like(low, jnp.inf))
    least = lax.fori_loop(0, tried, attempt, start)
    return least.scales, least.zeros


def terms(
    w: jax.Array, codes: jax.Array, zeros: jax.Array, h: jax.Array | None, *, zero_point: str
) -> tuple[jax.Array, ...]:
    """What `fit_line` needs the sums of, over each group's rows.

    Args:
      w: float32 weights.
      codes: theirs, float32.
      zeros: zero points, broadcast against them.
      h: what a squared error costs, likewise; None is 1.
      zero_point: see `grid.fit`.

    Returns:
      h q², h q w, and with zero points h q, where q counts from the zero point: so no mean is far
      from 0 and no difference cancels.
    """
    q = codes - zeros
    weighed = q if h is None else h * q
    squares = weighed * q, weighed * w
    return squares if zero_point == "none" else (*squares, weighed)


def fit_line(
    sums: tuple[jax.Array, ...],
    weights: tuple[jax.Array, jax.Array] | None,
    s: jax.Array,
    z: jax.Array,
    columns: jax.Array | None = None,
    **form: Any,
) -> tuple[jax.Array, jax.Array]:
    """The line w ≈ s (q − z) with the least weighted squares, as the grid stores it.

    Of 2×2 normal equations the slope s is solved first and rounded to what is stored. The zero
    point is the best one for that stored scale, rounded in turn.

    Args:
      sums: of `terms`.
      weights: see `best`.
      s: the codes' scales; kept where they determine none: one code only, or rows that weigh
        nothing.
      z: their zero points; likewise, and kept on a symmetric grid, too.
      columns: see `grid.fit`.
      **form: what `grid.fit` takes beside them.

    Returns:
      ``(scales, zeros)``, float32 with the values that are stored.
    """
    qq, qw, *of_zero = sums
    mean_q = mean_w = jnp.zeros_like(qq)
    if of_zero:
        assert weights is not None, "a fit with zero points needs them"
        weight, sum_w = weights
        weight = jnp.where(weight > 0, weight, 1.0)
        mean_q, mean_w = of_zero[0] / weight, sum_w / weight
        qq, qw = qq - of_zero[0] * mean_q, qw - of_zero[0] * mean_w
    solved = (qq > 0) & (qw > 0)
    slope = jnp.where(solved, qw, 1.0) / jnp.where(solved, qq, 1.0)
    fitted = jnp.where(solved, fit_scales(slope, columns, **form), s)
    if not of_zero:
        return fitted, z
    return fitted, jnp.where(solved, grid.fit_zeros(z + mean_q - mean_w / fitted, **form), z)


def fit_scales(
    wanted: jax.Array,
    columns: jax.Array | None = None,
    *,
    scales: str,
    store_dtype: jax.typing.DTypeLike,
    nearest: Nearest = jnp.round,
    stored: Stored = grid.as_stored,
    **_: Any,
) -> jax.Array:
    """Scales as they are stored.

    Args:
      wanted: float32, positive.
      columns: see `grid.fit`, as the arguments after it.
      scales: see there.
      store_dtype: see there.
      nearest: see there.
      stored: see there.
      **_: what else `grid.fit` takes.

    Returns:
      float32, the nearest of the values that can be stored.
    """
    if columns is None:
        found = stored(wanted, store_dtype)
        return jnp.where(found > grid.SMALLEST, found, 1.0)
    return jnp.clip(nearest(wanted / columns), 1.0, grid.most(scales)) * columns

"""The search of `pallas_kernels.search` over a block's groups inside a TPU kernel, with refits.

A loop: unrolled, as the search without refits is, it would be too much code for the compiler. What
is known once a group comes out of long chains of few operations, so that each step of the loop
takes enough groups to hide them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import grid, search
from pallas_kernels.grid import Nearest
from pallas_kernels.tpu.blocks import LANES, SUBLANES, Rounding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refits:
    """One block's search: emits the operations of a kernel.

    Attributes:
      spec: what is rounded.
      residual: ``[1, rows, columns]``: all scaled weights of the block.
      ranges: two refs, ``[steps, padded_groups, columns]``: the groups' least and largest weights,
        and in their places afterwards scales and zero points.
      slot: which of the steps.
      of_columns: see `Rounder`.
      sums: scratch, ``[4, columns / 128, 8 * together, 128]``.
      weight: the first row of a group to what a squared error of its rows costs; None is 1.
      nearest: see `grid.fit`, for weights.
    """

    spec: Rounding
    residual: Any
    ranges: tuple[Any, Any]
    slot: Any
    of_columns: Any
    sums: Any
    weight: Callable[[Any], jax.Array | None]
    nearest: Nearest

    def emit(self) -> None:
        """The grids of all groups."""
        s = self.spec
        whole, rest = divmod(s.groups, s.together)

        def some(i: Any, _: None) -> None:
            self._some(pl.multiple_of(i * s.together, SUBLANES), s.together)

        if whole == 1:
            self._some(0, s.together)
        else:
            lax.fori_loop(0, whole, some, None)
        if rest:
            self._some(whole * s.together, rest)

    def _some(self, first: Any, groups: int) -> None:
        """The grids of some groups."""
        s = self.spec
        form = s.grid | {"stored": as_stored}
        form["columns"] = None if self.of_columns is None else self.of_columns[...]
        places = pl.ds(first, groups)
        low, high = (ref[self.slot, places, :] for ref in self.ranges)
        weights = None
        if s.zero_point != "none":
            weights = self._over_rows(first, groups, _of_weights)

        def measure(scales: jax.Array, zeros: jax.Array, refitted: bool) -> Any:
            def parts(kept: jax.Array, h: Any, at: Any) -> tuple[jax.Array, ...]:
                scale, zero = scales[at], zeros[at]
                codes = grid.encode(kept, scale, zero, bits=s.bits, nearest=self.nearest)
                error = jnp.square(kept - grid.decode(codes, scale, zero))
                error = error if h is None else h * error
                if not refitted:
                    return (error,)
                return error, *search.terms(kept, codes, zero, h, zero_point=s.zero_point)

            error, *sums = self._over_rows(first, groups, parts)
            return error, tuple(sums)

        found = search.best(
            low, high, self._shrink, len(s.shrinks), s.refits, measure, weights, **form
        )
        for ref, value in zip(self.ranges, found, strict=True):
            ref[self.slot, places, :] = value

    def _shrink(self, i: Any) -> Any:
        """A factor on the ranges, by its index."""
        first, *others = self.spec.shrinks
        factor = jnp.float32(first)
        for at, other in enumerate(others, 1):
            factor = jnp.where(i == at, jnp.float32(other), factor)
        return factor

    def _over_rows(
        self, first: Any, groups: int, parts: Callable[..., tuple[jax.Array, ...]]
    ) -> tuple[Any, ...]:
        """Sums over the rows of some groups, ``[groups, columns]``.

        Args:
          first: of the block's groups.
          groups: how many.
          parts: a group's weights in one register's lanes, h or None, and where these are, to what
            is summed.

        Returns:
          The sums.
        """
        g, count = self.spec.group_size, 0
        columns = range(self.spec.columns // LANES)
        for column in columns:
            lanes = slice(column * LANES, (column + 1) * LANES)
            for t in range(groups):
                row = (first + t) * g
                row = row if isinstance(row, int) else pl.multiple_of(row, SUBLANES)
                kept = self.residual[0, pl.ds(row, g), lanes]
                found = parts(kept, self.weight(row), (slice(t, t + 1), lanes))
                count = len(found)
                for i, part in enumerate(found):
                    total = jnp.sum(part.reshape(g // SUBLANES, SUBLANES, LANES), 0)
                    self.sums[i, column, t * SUBLANES : (t + 1) * SUBLANES, :] = total

        def across(i: int, column: int) -> jax.Array:
            # A load with a stride transposes for free: no shuffles.
            rows = (pl.ds(row, groups, stride=SUBLANES) for row in range(SUBLANES))
            return reduced([self.sums[i, column, at, :] for at in rows], jnp.add)

        return tuple(
            jnp.concatenate([across(i, column) for column in columns], axis=1) for i in range(count)
        )


def _of_weights(kept: jax.Array, h: jax.Array | None, _: Any) -> tuple[jax.Array, jax.Array]:
    """What `search.best` wants the sums of."""
    return (jnp.ones_like(kept), kept) if h is None else (h, h * kept)


def reduced(rows: list[jax.Array], combine: Callable[..., jax.Array]) -> jax.Array:
    """All of them combined, a power of two, in pairs.

    Args:
      rows: of one shape.
      combine: two to one.

    Returns:
      One of that shape.
    """
    while len(rows) > 1:
        rows = [combine(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    return rows[0]


def as_stored(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`grid.as_stored` of float32 and bfloat16, which Mosaic cannot translate, on the bits.

    Converted there and back, the simulator's XLA would drop both.

    Args:
      x: float32, finite.
      dtype: float32 or bfloat16.

    Returns:
      As x.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return x
    bits = lax.bitcast_convert_type(x, jnp.int32)
    odd = lax.shift_right_logical(bits, jnp.int32(16)) & jnp.int32(1)
    return lax.bitcast_convert_type((bits + jnp.int32(0x7FFF) + odd) & jnp.int32(-65536), x.dtype)

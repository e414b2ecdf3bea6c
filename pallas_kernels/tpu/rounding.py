"""Rounding a block of a weight to codes inside a TPU kernel, in pieces that a matmul can hide.

The insight: on the vector unit a weight costs eight operations (widen, scale, two comparisons,
multiply, add, round, narrow), all else is amortized over a group or a word. Rounding is an
addition: ``v + 1.5 * 2**23`` holds the integer nearest to v in its low bits, so narrowing the bits
to bytes yields codes without any conversion.

A block of ``rows`` is rounded in *batches* of up to eight groups, so that the grid of a batch is
computed on full registers, in three passes: `Rounder.measure` finds each group's range,
`Rounder.fit` its scale and zero point, `Rounder.encode` the codes. Coded scales are multiples of a
number of their column: where a block has all of it, every group is measured before the first is
fitted, and `Rounder.find_columns` stands between. So it is with refits, which `Rounder.refit` makes
before the first code. When a column of blocks is complete, `Rounder.pack` merges the bytes of codes
into bit planes, four codes to the operation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import grid
from pallas_kernels.layout import PLANES
from pallas_kernels.tpu.blocks import LANES, SUBLANES, Rounding
from pallas_kernels.tpu.refit import Refits, as_stored, reduced
from pallas_kernels.tpu.schedule import Piece

_NEAREST = 1.5 * 2.0**23
_EXACT = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounder:
    """One block's rounding: emits the operations of a kernel.

    Attributes:
      spec: what to round.
      zero: int32[], 0, unknown to the compiler.
      step: int32[], which block of the column.
      w: ``[rows, columns]``.
      channel_scale: ``[k / 128, 128]`` or None.
      importance: likewise.
      down: ``[rows, rank]`` or None.
      up: ``[rank, columns]`` or None.
      of_columns: ``float32[1, columns]``, see `grid.column_scales`: written where this block has
        all of a column, else read; None if scales are not coded.
      planes: the column's planes, written by `pack`.
      scales: the column's scales, written by `pack`.
      zeros: the column's zero points, written by `pack`; None where there is no array of them.
      rounded: ``[rows, columns]``: what the codes stand for is left there; or None.
      scratch: as `Rounding.scratch` describes.
    """

    spec: Rounding
    zero: Any
    step: Any
    w: Any
    channel_scale: Any
    importance: Any
    down: Any
    up: Any
    of_columns: Any
    planes: tuple[Any, ...]
    scales: Any
    zeros: Any
    rounded: Any
    scratch: tuple[Any, ...]

    @property
    def arena(self) -> Any:
        """``int32[columns / 128, rows, 128]``: eight rows of zeros, ranges, codes."""
        return self.scratch[0]

    def _at(self, row: Any, rows: int, stride: int = 1) -> Any:
        """Rows of the arena below the zeros, where the compiler cannot tell which."""
        start = pl.multiple_of(self.zero, SUBLANES) + SUBLANES + row
        return pl.ds(start, rows) if stride == 1 else pl.ds(start, rows, stride=stride)

    def _code_row(self, row: Any) -> Any:
        return row + 2 * SUBLANES * SUBLANES

    def token(self) -> jax.Array:
        """Zeros ``int32[8, columns]`` that, to the compiler, depend on all pieces before."""
        zeros = self.arena[0, :SUBLANES, :]
        return jnp.concatenate([zeros] * (self.spec.columns // LANES), axis=1)

    def prepare(self) -> None:
        """Once for all columns: turns what is given per row from lanes to sublanes."""
        self.arena[0, :SUBLANES, :] = jnp.zeros((SUBLANES, LANES), jnp.int32)
        for given, source, target in (
            (self.spec.scaled, self.channel_scale, self.scratch[5]),
            (self.spec.weighed, self.importance, self.scratch[6]),
        ):
            if given:
                _turn(source, target)

    def _lanes(self) -> Iterator[tuple[int, slice]]:
        for column in range(self.spec.columns // LANES):
            yield column, slice(column * LANES, (column + 1) * LANES)

    def _per_row(self, which: int, row: Any) -> jax.Array:
        g = self.spec.group_size
        start = row if self.spec.steps == 1 else pl.multiple_of(self.step * self.spec.rows + row, 8)
        return self.scratch[which][pl.ds(start, g), :]

    def present(self, row: Any, rows: int) -> jax.Array:
        """Which of the block's rows from ``row`` on are rows of the weight: bool ``[rows, 1]``."""
        index = lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
        return index < self.spec.d_in - self.step * self.spec.rows - row

    def _kept(self, batch: int, t: int) -> tuple[int, slice]:
        """Where `measure` leaves a group's weights."""
        slot, row = (0, batch * SUBLANES + t) if self.spec.keeps_all else (batch % 2, t)
        return slot, slice(row * self.spec.group_size, (row + 1) * self.spec.group_size)

    def measure(self, batch: int, t: int) -> None:
        """Scales group ``t`` of a batch, keeps it, and its range by sublanes."""
        s, g = self.spec, self.spec.group_size
        row = (batch * SUBLANES + t) * g
        residual = self.w[row : row + g, :].astype(jnp.float32)
        if s.rank:
            residual -= jnp.dot(
                self.down[row : row + g, :], self.up[...],
                precision=_EXACT, preferred_element_type=jnp.float32,
            )  # fmt: skip
        factor = self._per_row(5, row) if s.scaled else None
        for column, lanes in self._lanes():
            part = residual[:, lanes]
            if s.d_in < s.k:
                part = jnp.where(self.present(row, g), part, 0.0)
            if factor is not None:
                part *= factor
            self.scratch[1][(*self._kept(batch, t), lanes)] = part
            stacked = part.reshape(g // SUBLANES, SUBLANES, LANES)
            for side, extreme in enumerate((jnp.min(stacked, 0), jnp.max(stacked, 0))):
                at = self._at((side * SUBLANES + t) * SUBLANES, SUBLANES)
                self.arena[column, at, :] = pltpu.bitcast(extreme, jnp.int32)

    def _across(self, side: int, groups: int, column: int, combine: Callable) -> jax.Array:
        """Reduces sublanes: row t of the result is group t's."""
        # A load with a stride transposes for free: no shuffles.
        rows = [
            pltpu.bitcast(
                self.arena[column, self._at(side * SUBLANES * SUBLANES + i, groups, SUBLANES), :],
                jnp.float32,
            )
            for i in range(SUBLANES)
        ]
        return reduced(rows, combine)

    def _ranges(self, batch: int, column: int) -> tuple[jax.Array, jax.Array]:
        """The least and the largest weights of a batch's groups."""
        groups = min(SUBLANES, self.spec.groups - batch * SUBLANES)
        return (
            self._across(0, groups, column, jnp.minimum),
            self._across(1, groups, column, jnp.maximum),
        )

    def _places(self, batch: int) -> slice:
        return slice(batch * SUBLANES, min((batch + 1) * SUBLANES, self.spec.groups))

    @property
    def _slot(self) -> Any:
        """Which of the column's blocks' grids is this one's."""
        return 0 if self.spec.steps == 1 else self.step

    def keep_ranges(self, batch: int) -> None:
        """Leaves a batch's ranges where its grid will be."""
        for column, lanes in self._lanes():
            for target, side in zip(self.scratch[3:5], self._ranges(batch, column), strict=True):
                target[self._slot, self._places(batch), lanes] = side

    def find_columns(self) -> None:
        """What the scales of each column are multiples of, once all its ranges are kept."""
        s = self.spec
        low, high = (self.scratch[i][0, : s.groups, :] for i in (3, 4))
        self.of_columns[...] = grid.column_scales(low, high, **s.grid, stored=as_stored)

    def fit(self, batch: int) -> None:
        """The grids of a batch."""
        s = self.spec
        groups = min(SUBLANES, s.groups - batch * SUBLANES)
        fit: Any = functools.partial(grid.fit, **s.grid, stored=as_stored)
        for column, lanes in self._lanes():
            if s.finds_columns:
                low, high = (self.scratch[i][0, self._places(batch), lanes] for i in (3, 4))
            else:
                low, high = self._ranges(batch, column)
            shrink: Any = s.shrinks[0]
            within = fit
            if self.of_columns is not None:
                within = functools.partial(fit, columns=self.of_columns[:, lanes])
            if s.searched:
                shrink = self._search(batch, groups, column, low, high, within)
            if s.searched or shrink != 1.0:
                low, high = low * shrink, high * shrink
            scales, zeros = within(low, high)
            self.scratch[3][self.step, self._places(batch), lanes] = scales
            self.scratch[4][self.step, self._places(batch), lanes] = zeros
            self._open(batch, lanes, scales, zeros)

    def _open(self, batch: int, lanes: slice, scales: jax.Array, zeros: jax.Array) -> None:
        """Leaves a batch's grid for its codes."""
        for i, value in enumerate((1.0 / scales, zeros, scales)):
            self.scratch[2][i, batch % 2, : len(scales), lanes] = value

    def open(self, batch: int) -> None:
        """The grid of a batch that `refit` found, for its codes."""
        for _, lanes in self._lanes():
            kept = (self.scratch[i][self._slot, self._places(batch), lanes] for i in (3, 4))
            self._open(batch, lanes, *kept)

    def _search(
        self, batch: int, groups: int, column: int, low: Any, high: Any, fit: Callable
    ) -> jax.Array:
        """The factor of each group's range with the least weighed squared error."""
        s, g = self.spec, self.spec.group_size
        lanes = slice(column * LANES, (column + 1) * LANES)

        def try_factor(shrink: jax.Array, best: Any) -> Any:
            scales, zeros = fit(low * shrink, high * shrink)
            for t in range(groups):
                kept = self.scratch[1][(*self._kept(batch, t), lanes)]
                scale, zero = scales[t : t + 1], zeros[t : t + 1]
                codes = grid.encode(kept, scale, zero, bits=s.bits, nearest=self._nearest)
                error = jnp.square(kept - grid.decode(codes, scale, zero))
                h = self._weight((batch * SUBLANES + t) * g)
                error = error if h is None else h * error
                total = jnp.sum(error.reshape(g // SUBLANES, SUBLANES, LANES), 0)
                self.arena[column, self._at(t * SUBLANES, SUBLANES), :] = pltpu.bitcast(
                    total, jnp.int32
                )
            error = self._across(0, groups, column, jnp.add)
            better = error < best[0]
            return jnp.where(better, error, best[0]), jnp.where(better, shrink, best[1])

        best = jnp.full(low.shape, jnp.inf), jnp.full(low.shape, s.shrinks[0])
        for shrink in s.shrinks:
            best = try_factor(jnp.float32(shrink), best)
        return best[1]

    def refit(self) -> None:
        """The grids of all groups of the block, the best of their ranges after their refits."""
        _, residual, _, low, high, *_, sums = self.scratch
        Refits(
            spec=self.spec, residual=residual, ranges=(low, high), slot=self._slot, sums=sums,
            of_columns=self.of_columns, weight=self._weight, nearest=self._nearest,
        ).emit()  # fmt: skip

    def _weight(self, row: Any) -> jax.Array | None:
        """What a squared error costs in the rows of the group from ``row`` on; None is 1."""
        s, g = self.spec, self.spec.group_size
        if s.weighed:
            return self._per_row(6, row)
        if s.d_in < s.k:
            # Of padding, a zero point that is no whole number makes an error.
            return jnp.where(self.present(row, g), 1.0, 0.0)
        return None

    def _nearest(self, x: jax.Array) -> jax.Array:
        """`jnp.round` of numbers below 2**22, in two operations of the vector unit."""
        # A compiler that knew the number would add its negative to it, and leave out both.
        magic = self.zero.astype(jnp.float32) + _NEAREST
        return (x + magic) - magic

    def encode(self, batch: int, t: int) -> None:
        """The codes of group ``t`` of a batch, four to a word of the arena."""
        s, g = self.spec, self.spec.group_size
        row = (batch * SUBLANES + t) * g
        for column, lanes in self._lanes():
            inverse, zero, scale = (
                self.scratch[2][i, batch % 2, t : t + 1, lanes] for i in (0, 1, 2)
            )
            kept = (*self._kept(batch, t), lanes)
            value = self.scratch[1][kept] * inverse + zero
            if s.clipped:
                value = jnp.clip(value, 0.0, 2.0**s.bits - 1)
            value += _NEAREST
            if self.rounded is not None:
                # Used twice below: a compiler that computes it twice may fuse the product and the
                # sum in one of them alone, and a tie between two codes would fall either way.
                self.scratch[1][kept] = value
                value = self.scratch[1][kept]
            codes = pltpu.bitcast(value, jnp.int32)
            word = self._code_row(row // 4)
            if s.steps > 1:
                word += pl.multiple_of(self.step * (s.rows // 4), SUBLANES)
            self.arena[column, self._at(word, g // 4), :] = pltpu.bitcast(
                codes.astype(jnp.int8), jnp.int32
            )
            if self.rounded is not None:
                # Not value - _NEAREST, which a compiler may simplify to what was not yet rounded.
                whole = (codes & jnp.int32(255)).astype(jnp.float32)
                weight = grid.decode(whole, scale, zero)
                self.rounded[row : row + g, lanes] = weight.astype(self.rounded.dtype)

    def merge(self, plane: int, start: int, rows: int) -> None:
        """Merges codes into ``rows`` words of a plane."""
        s = self.spec
        width, base = PLANES[s.bits][plane], sum(PLANES[s.bits][:plane])
        mask = jnp.int32(0x01010101 * (2**width - 1) - (2**32 if width == 8 else 0))
        for column, lanes in self._lanes():
            words = jnp.zeros((), jnp.int32)
            for field in range(8 // width):
                word = self._code_row(field * (s.k * width // 32) + start)
                part = self.arena[column, self._at(word, rows), :]
                if base:
                    part = lax.shift_right_logical(part, jnp.int32(base))
                if width < s.bits:
                    part &= mask
                if field:
                    part = words | (part << jnp.int32(field * width))
                words = part
            self.planes[plane][4 * start : 4 * (start + rows), lanes] = pltpu.bitcast(
                words, jnp.uint8
            )

    def put_grid(self) -> None:
        """Writes the column's scales and zero points."""
        s = self.spec
        columns = None if self.of_columns is None else self.of_columns[...]
        targets = [self.scales, *([] if self.zeros is None else [self.zeros])]
        for step in range(s.steps):
            scales, zeros = (self.scratch[i][step, : s.groups, :] for i in (3, 4))
            rows = slice(step * s.groups, (step + 1) * s.groups)
            kept = grid.closed(scales, zeros, columns, **s.grid)
            for target, one in zip(targets, kept, strict=True):
                target[rows, :] = one

    def pieces(self) -> list[Piece]:
        """The rounding of this block, in an order that keeps the passes apart."""
        s = self.spec
        batches = pl.cdiv(s.groups, SUBLANES)
        sizes = [min(SUBLANES, s.groups - b * SUBLANES) for b in range(batches)]
        work = s.group_size * s.columns / 1024
        found: list[Piece] = []
        coded = 0

        def add(cost: float | int, piece: Callable, *args: int) -> None:
            found.append((cost * work, coded, lambda: piece(*args)))

        first = range(batches) if s.keeps_all else (0,)
        for b in first:
            for t in range(sizes[b]):
                add(4, self.measure, b, t)
            if s.keeps_all:
                add(1, self.keep_ranges, b)
        if s.finds_columns:
            add(1, self.find_columns)
        if s.refits:
            add(0, self.refit)
        for b in range(batches):
            if s.refits:
                add(3, self.open, b)
            else:
                add(3 + 80 * s.searched * len(s.shrinks), self.fit, b)
            ahead = sizes[b + 1] if b + 1 < batches and not s.keeps_all else 0
            for t in range(max(sizes[b], ahead)):
                if t < sizes[b]:
                    coded += s.group_size
                    add(4 + 2 * s.clipped, self.encode, b, t)
                if t < ahead:
                    add(4, self.measure, b + 1, t)
        return found

    def pack(self) -> list[Piece]:
        """What completes a column, once all its blocks are rounded."""
        s = self.spec
        cost = s.k // s.group_size * s.columns / 512
        found: list[Piece] = [(cost, s.rows, self.put_grid)]
        for plane, width in enumerate(PLANES[s.bits]):
            total = s.k * width // 32
            for start in range(0, total, 32):
                rows = min(32, total - start)
                cost = 24 / width * rows * s.columns / 1024
                found.append((cost, s.rows, functools.partial(self.merge, plane, start, rows)))
        return found


def _turn(source: Any, target: Any) -> None:
    """``[k / 128, 128]`` to ``[k, 128]``, each number in all lanes of its row."""
    rows = source.shape[0]
    together = next(n for n in (8, 4, 2, 1) if rows % n == 0)

    def some(i: Any, _: None) -> None:
        # Several at a time, because a transposition is long but the next can begin before its end.
        for j in range(together):
            at = i * together + j
            square = jnp.broadcast_to(source[pl.ds(at, 1), :], (LANES, LANES))
            target[pl.ds(pl.multiple_of(at * LANES, LANES), LANES), :] = square.T

    lax.fori_loop(0, rows // together, some, None)

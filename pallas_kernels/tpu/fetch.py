"""Copies into fast memory that Pallas' own pipeline would make too late or too often.

The pipeline copies a block of an operand in one transfer, which does not use all of the memory's
bandwidth, waits for it before a step's first instruction, and copies an operand again whenever its
block changes. `Planes` come in several transfers at a time while a step prepares its activations
and scales; `Activations` come once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planes:
    """Double-buffered copies of whole blocks of columns; static.

    Attributes:
      heights: rows of each plane.
      columns: of a block; they divide the planes' columns.
      parts: equal parts of a plane.
    """

    heights: tuple[int, ...]
    columns: int
    parts: int

    def scratch(self) -> list[Any]:
        """Two blocks of every plane, and a semaphore for each part of each."""
        blocks = [pltpu.VMEM((2, rows, self.columns), jnp.uint8) for rows in self.heights]
        return [*blocks, pltpu.SemaphoreType.DMA((2, len(self.heights), self.parts))]

    def _copy(self, planes: Any, scratch: Any, layer: Any, block: Any, slot: Any, at: Any) -> Any:
        plane, part = at
        *kept, arrived = scratch
        size = self.heights[plane] // self.parts
        rows = pl.ds(part * size, size)
        start = block * self.columns
        columns = pl.ds(
            start if isinstance(start, int) else pl.multiple_of(start, 128), self.columns
        )
        return pltpu.make_async_copy(
            planes[plane].at[layer, rows, columns],
            kept[plane].at[slot, rows],
            arrived.at[slot, plane, part],
        )

    def start(self, planes: Any, scratch: Any, layer: Any, block: Any, slot: Any) -> None:
        """Begins to copy a block of columns.

        Args:
          planes: refs of ``uint8[L, rows, n]``.
          scratch: refs of `scratch`.
          layer: which of the L.
          block: which block.
          slot: 0 or 1, the buffer.
        """
        for part in range(self.parts):
            for plane in range(len(self.heights)):
                self._copy(planes, scratch, layer, block, slot, (plane, part)).start()

    def wait(self, planes: Any, scratch: Any, layer: Any, slot: Any) -> None:
        """Waits for all that `start` began to copy into a buffer."""
        for part in range(self.parts):
            for plane in range(len(self.heights)):
                self._copy(planes, scratch, layer, 0, slot, (plane, part)).wait()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activations:
    """All rows of x, copied once per core, or else block by block by Pallas; static.

    They are kept in chunks of channels, as wide as the matrix unit takes at once: registers of 16
    bfloat16 rows are then loaded from rows that are near each other, instead of being put together.

    Attributes:
      steps: blocks of channels.
      rows: channels of a block.
      m: rows of x.
      dtype: of x.
      resident: whether they are kept.
    """

    steps: int
    rows: int
    m: int
    dtype: Any
    resident: bool

    @property
    def chunk(self) -> int:
        """Channels of a chunk."""
        return next((c for c in (256, 128) if self.rows % c == 0), self.rows)

    def spec(self) -> pl.BlockSpec:
        """How a kernel takes x; its grid is cores, columns of blocks, blocks."""
        if self.resident:
            return pl.BlockSpec(memory_space=pl.ANY)
        return pl.BlockSpec((self.m, self.rows), lambda c, i, s, layer: (0, s))

    def scratch(self) -> list[Any]:
        """What `arrive` takes."""
        if not self.resident:
            return []
        chunks = self.rows // self.chunk
        return [
            pltpu.VMEM((self.steps, chunks, self.m, self.chunk), self.dtype),
            pltpu.SemaphoreType.DMA((self.steps, chunks)),
        ]

    def start(self, x: Any, scratch: Any) -> None:
        """Begins to copy everything: a core's first step."""
        if self.resident:
            for step in range(self.steps):
                for copy in self._copies(x, scratch, step):
                    copy.start()

    def wait(self, x: Any, scratch: Any, step: Any) -> None:
        """Waits for a block's channels: each step of a core's first column."""
        if self.resident:
            for copy in self._copies(x, scratch, step):
                copy.wait()

    def _copies(self, x: Any, scratch: Any, step: Any) -> list[Any]:
        kept, arrived = scratch
        found = []
        for i in range(self.rows // self.chunk):
            at = step * self.rows + i * self.chunk
            at = at if isinstance(at, int) else pl.multiple_of(at, min(self.chunk, 128))
            source = x.at[:, pl.ds(at, self.chunk)]
            found.append(pltpu.make_async_copy(source, kept.at[step, i], arrived.at[step, i]))
        return found

    def take(self, x: Any, scratch: Any, step: Any, rows: slice, channel: int) -> jax.Array:
        """Some rows of the chunk that begins at a channel of the block.

        Args:
          x: ref of x, or of its block.
          scratch: refs of `scratch`.
          step: which block.
          rows: which rows.
          channel: of the block, a multiple of `chunk`.

        Returns:
          ``[rows, chunk]``.
        """
        if self.resident:
            return scratch[0][step, channel // self.chunk, rows, :]
        return x[rows, channel : channel + self.chunk]

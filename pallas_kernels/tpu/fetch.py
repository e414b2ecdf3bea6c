"""Blocks of bit planes into fast memory, in several transfers at a time.

Pallas' own pipeline copies a block of an operand in one transfer, which does not use all of the
memory's bandwidth, and waits for it before a step's first instruction. Here a step prepares its
activations and scales first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch:
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

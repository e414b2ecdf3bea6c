"""The blocks that a weight is rounded in, and the scratch that this takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.problem import Problem

LANES, SUBLANES = 128, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounding(Problem):
    """A problem, and the blocks that its weight is rounded in.

    Attributes:
      weighed: there is an importance, and a search that it matters to.
      rows: of a block, a multiple of ``group_size`` that divides ``k``.
      columns: of a block, a multiple of 128.
    """

    weighed: bool
    rows: int
    columns: int

    @property
    def steps(self) -> int:
        """Blocks in a column of blocks."""
        return self.k // self.rows

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.rows // self.group_size

    @property
    def padded_m(self) -> int:
        """Rows of x, in whole registers of bfloat16."""
        return pl.cdiv(self.m, 2 * SUBLANES) * 2 * SUBLANES

    @property
    def clipped(self) -> bool:
        """Whether a code can leave its range, up to ties, before it is clipped.

        It cannot where the range covers all weights, both ends are on the grid, and what rounding
        scale and zero point to bfloat16 moves them by, 2**-8 of the largest code, is below half.
        """
        exact = self.store_dtype == "float32"
        return (
            self.shrinks != (1.0,)
            or self.refits > 0
            or self.coded
            or self.zero_point == "integer"
            or self.bits > (8 if exact else 5)
        )

    @property
    def finds_columns(self) -> bool:
        """Whether coded scales' columns are found here: where a block has all of a column."""
        return self.coded and self.steps == 1 and not self.row_axes

    @property
    def keeps_all(self) -> bool:
        """Whether all weights of a block are scaled and measured before the first is rounded.

        Coded scales need a whole column's ranges. Refits are a loop over the groups, because it
        would be too much code unrolled, and no other work fits into a loop.
        """
        return self.finds_columns or self.refits > 0

    @property
    def together(self) -> int:
        """Groups of a step of the loop of refits.

        Enough work to hide what is done once a group, and no more than registers can hold: what is
        known of 16 groups of 256 columns takes four of the 64 registers each.
        """
        return min(self.groups, 2 * SUBLANES if self.group_size <= 64 else SUBLANES)

    @property
    def padded_groups(self) -> int:
        """Rows that the scales of a block take in scratch."""
        return pl.cdiv(self.groups, SUBLANES) * SUBLANES

    def scratch(self) -> list[Any]:
        """The scratch arrays that `Rounder` takes, in order."""
        batch = min(self.groups, SUBLANES) * self.group_size
        # No code is chosen before all groups of a column are measured.
        residual = (1, self.rows) if self.keeps_all else (2, batch)
        kept = pltpu.VMEM((self.steps, self.padded_groups, self.columns), jnp.float32)
        arena = SUBLANES + 2 * SUBLANES * SUBLANES + self.k // 4
        per_row = pl.cdiv(self.k, LANES) * LANES
        sums = self.columns // LANES, self.together * SUBLANES, LANES
        return [
            pltpu.VMEM((self.columns // LANES, arena, LANES), jnp.int32),
            pltpu.VMEM((*residual, self.columns), jnp.float32),
            pltpu.VMEM((3, 2, SUBLANES, self.columns), jnp.float32),
            kept,
            kept,
            pltpu.VMEM((per_row if self.scaled else SUBLANES, LANES), jnp.float32),
            pltpu.VMEM((per_row if self.weighed else SUBLANES, LANES), jnp.float32),
            *([pltpu.VMEM((4, *sums), jnp.float32)] if self.refits else []),
        ]

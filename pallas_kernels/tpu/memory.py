"""What a rounding kernel takes of a TPU's fast memory, and the first of some blocks that fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.blocks import LANES, Rounding

_VERSIONS = {
    "v4": pltpu.ChipVersion.TPU_V4, "v5e": pltpu.ChipVersion.TPU_V5E,
    "v5p": pltpu.ChipVersion.TPU_V5P, "v6e": pltpu.ChipVersion.TPU_V6E,
    "tpu7x": pltpu.ChipVersion.TPU_7X,
}  # fmt: skip
_Blocks = TypeVar("_Blocks")
_SPILLED = 5 << 19
"""Searches over ranges in groups of 32 were seen to need 2.2 MiB more than their arrays, on v4."""


def chip_info(chip: str | None = None) -> Any:
    """What Pallas knows of a chip.

    Args:
      chip: its short name; None is the one that is compiled for.

    Returns:
      `pltpu.TpuInfo`; a v5e's where there is no TPU, as in the interpreter.
    """
    if chip not in _VERSIONS:
        try:
            return pltpu.get_tpu_info()
        except ValueError:
            chip = "v5e"
    return pltpu.get_tpu_info_for_chip(_VERSIONS[chip], 1)


def limit(info: Any) -> int:
    """Bytes of fast memory that a kernel may use."""
    return info.vmem_capacity_bytes * 15 // 16


def needed(spec: Rounding, *, w_itemsize: int, resident: bool = False) -> int:
    """Bytes of fast memory that a kernel's scratch and operands take.

    Args:
      spec: what is rounded, and its blocks.
      w_itemsize: bytes of a number of the weight.
      resident: all of x stays.

    Returns:
      An estimate from above; of what the compiler spills, only what a search makes it spill.
    """
    s = spec
    scratch = sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in s.scratch())
    groups = pl.cdiv(s.k // s.group_size, 16) * 16
    factors = 4 * (s.rows * pl.cdiv(s.rank, LANES) * LANES + s.rank * s.columns)
    moved = (
        s.rows * s.columns * w_itemsize + s.k * s.bits // 8 * s.columns
        + 2 * groups * s.columns * jnp.dtype(s.scale_dtype).itemsize + factors
    )  # fmt: skip
    sums = s.padded_m * s.columns * (4 + 2 * s.itemsize)
    x = s.padded_m * (s.k if resident else 2 * s.rows) * s.itemsize
    kept = s.rows * s.columns * s.itemsize if s.quantized else 0
    spilled = _SPILLED if s.searched else 0
    return scratch + 2 * moved + sums + x + kept + spilled


def first_fitting(choices: Iterable[tuple[_Blocks, int]], info: Any) -> _Blocks | None:
    """The first blocks whose need is within the limit.

    Args:
      choices: blocks and the bytes that they need, best first.
      info: from `chip_info`.

    Returns:
      The blocks; None if none fit.
    """
    return next((blocks for blocks, bytes_ in choices if bytes_ <= limit(info)), None)

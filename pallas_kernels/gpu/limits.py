"""What bounds a program of any supported GPU."""

from __future__ import annotations

from typing import Any

import jax

SHARED_BYTES = 96 * 1024
"""What a program of every supported GPU can have of shared memory; an L4 has 99 KiB."""


def check_addressable(stacks: Any) -> None:
    """Refuses stacks that the backend would address wrongly.

    Offsets are 32 bits, signed and counted in elements, up to 4 GiB of an array, 64 beyond.

    Args:
      stacks: Arrays.

    Raises:
      ValueError: An array has more than 2**31 elements in less than 4 GiB.
    """
    for a in jax.tree.leaves(stacks):
        if a.size > 2**31 and a.nbytes <= 2**32:
            raise ValueError(
                f"stack: expected at most 2 GiB or more than 4 GiB of uint8, got {a.nbytes} "
                "bytes; split the stack over layers in two, or pass implementation='xla'"
            )

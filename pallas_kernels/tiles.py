"""Tables of what was measured: where one implementation overtakes another.

A kernel's block sizes follow from a heuristic that stands in the kernel's own module, beside what
it was derived from. Here are the borders between implementations; `ttq bench kernels` measured
them.
"""

from __future__ import annotations

DENSE_ROWS: dict[str, int] = {}
"""Per chip, the most rows that `packed_matmul` computes from packed weights. Above, the weight is
unpacked once and multiplied as a dense one. A chip without an entry never does."""

MOSAIC_ROWS: dict[str, int] = {}
"""Per chip, from how many rows on Mosaic GPU's `packed_matmul` beats Triton's. A chip without an
entry uses Triton always."""

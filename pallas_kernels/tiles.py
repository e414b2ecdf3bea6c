"""Tables of what was measured: where one implementation overtakes another.

A kernel's block sizes follow from a heuristic that stands in the kernel's own module, beside what
it was derived from. Here are the borders between implementations; `ttq bench kernels` measured
them.
"""

from __future__ import annotations

DENSE_ROWS: dict[str, tuple[int, int]] = {"v5e": (192, 64)}
"""Per chip, the most rows that `packed_matmul` computes from packed weights, in groups of 128 and
up and in smaller ones. Above, the weight is unpacked once and multiplied as a dense one. A chip
without an entry never does. Estimated at 4096 x 4096, 4 bits, kernel against XLA, in thousands of
cycles:

    v5e, group 128   m 64: 28, 87    128: 52, 96    256: 100, 95     512: 195, 168
    v5e, group 32    m 64: 79, 89    128: 155, 98   256: 305, 104    512: 606, 170
    v6e, group 128   m 64: 17, 79    128: 32, 92
"""

MOSAIC_ROWS: dict[str, int] = {}
"""Per chip, from how many rows on Mosaic GPU's `packed_matmul` beats Triton's. A chip without an
entry uses Triton always. Empty: that kernel (2, 4 and 8 bits, Hopper) compiles and agrees with the
oracle in simulation, but has never been timed; `experiments/check_gpu_kernels.py` times both. By
ptxas' listing its inner loop holds, for a 4-bit weight, half a byte load, a shift, a mask, half a
permutation and, at up to 32 rows of x, one multiply-add for scales and zero points."""

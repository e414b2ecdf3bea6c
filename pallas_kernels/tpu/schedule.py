"""A matmul and other work, emitted in an order in which a TPU's two units work side by side.

The compiler orders instructions by their critical path. Left alone it issues all of a matmul
first and all of the rounding after it, and the matrix and the vector unit take turns. Therefore
the pieces of `pallas_kernels.tpu.rounding` store to one scratch array, the *arena*, at offsets the
compiler cannot tell apart; a matmul that first reads a `Rounder.token` there is not issued before
the pieces it follows, these become critical, and the units work at the same time.
"""

from __future__ import annotations

from collections.abc import Callable

Piece = tuple[float, int, Callable[[], None]]
"""Work that a matmul may hide: its cost in vector operations, how many of the block's rows have
codes after it, and what emits it."""

Matmul = tuple[int, Callable[[], None]]
"""How many rows must have codes before it, and what emits it."""


def emit(pieces: list[Piece], matmuls: list[Matmul], spread: float = 1.0) -> None:
    """Emits both, the matmuls spread evenly between the pieces.

    Args:
      pieces: in the order in which they depend on each other.
      matmuls: each as soon as its rows have codes.
      spread: of the pieces, by cost, those with matmuls between them. A matmul's results come long
        after its operands: without the last pieces to hide it, the vector unit would wait.
    """
    total = spread * sum(cost for cost, _, _ in pieces)
    done, coded, emitted = 0.0, 0, 0
    for cost, rows, piece in pieces:
        while (
            emitted < len(matmuls)
            and emitted * total <= done * len(matmuls)
            and matmuls[emitted][0] <= coded
        ):
            matmuls[emitted][1]()
            emitted += 1
        piece()
        done, coded = done + cost, rows
    for _, matmul in matmuls[emitted:]:
        matmul()

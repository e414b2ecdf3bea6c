"""How many tokens to draft in the next cycle: what is likely kept, by what a cycle costs.

A cycle of k drafts keeps each with probability a, up to the first that is rejected, and takes one
token more from the verifier: 1 + a + … + a^k tokens are expected of it. The number that makes most
of them per second is chosen, 0 among them, which is plain decoding from the unquantized weights.

What was drafted so far tells a. It fades: a text changes, and a choice of 0 is tried again.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ttq_jax.config import ConfigError

LENGTHS = (0, 1, 2, 4, 8)
"""Drafts of a cycle that are chosen among: each is a verification of its own in the program."""

PRIOR = (4.0, 1.0)
"""Kept and rejected drafts that a text begins with: 80 %, below what real models keep."""

FADE = 0.97
"""What is left of the evidence after a cycle: that of about 30 cycles counts."""

Lengths = int | tuple[int, ...]
"""Drafts of every cycle, or what each cycle chooses from."""


@dataclasses.dataclass(frozen=True)
class DraftCosts:
    """What cycles cost, by the number of their drafts: as `speculate`, it lets each choose its own.

    Attributes:
      seconds: of a whole cycle, draft and verification, of 0, 1, 2, 4 and 8 drafts; > 0. Any unit
        does: only ratios count.
    """

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuses what are no times.

        Raises:
          ConfigError: too few or too many, or one that is not a positive number.
        """
        good = isinstance(self.seconds, tuple) and len(self.seconds) == len(LENGTHS)
        if not good or not all(
            isinstance(s, float | int) and math.isfinite(s) and s > 0 for s in self.seconds
        ):
            raise ConfigError(
                f"DraftCosts.seconds: expected a tuple of {len(LENGTHS)} positive numbers, the "
                f"times of cycles of {', '.join(map(str, LENGTHS))} drafts, got {self.seconds!r}"
            )

    def array(self) -> np.ndarray:
        """float32[5], in units of a plain step."""
        return np.asarray([s / self.seconds[0] for s in self.seconds], np.float32)

    def describe(self) -> dict[str, float]:
        """JSON data: by drafts, the time of a cycle over that of a plain step."""
        return {str(k): round(float(c), 3) for k, c in zip(LENGTHS, self.array(), strict=True)}

    def in_words(self) -> str:
        """One line for people."""
        each = ", ".join(f"{c:.2f} with {k}" for k, c in self.describe().items() if k != "0")
        return f"cycles of drafts take, in plain steps of the unquantized weights: {each}"


AUTO = "auto"
"""In place of a number of drafts: each cycle chooses it, by costs that are measured."""

Speculate = int | str | DraftCosts
"""What a caller asks for: a number, `AUTO`, or costs that let each cycle choose."""


def chooses(drafts: Any) -> bool:
    """Whether each cycle is to choose its number of drafts."""
    return isinstance(drafts, DraftCosts) or (isinstance(drafts, str) and drafts == AUTO)


def most(drafts: Lengths) -> int:
    """The largest number of drafts of a cycle."""
    return max(drafts) if isinstance(drafts, tuple) else drafts


def choose(
    evidence: Float[Array, "2"], costs: Float[Array, " n"], left: Int[Array, ""],
    lengths: tuple[int, ...],
) -> Int[Array, ""]:  # fmt: skip
    """The number of drafts that makes most tokens per cost.

    Args:
      evidence: drafts that were kept and drafts that were rejected, see `faded`.
      costs: of a cycle with each of `lengths`; positive.
      left: tokens to the limit, >= 1: no cycle makes more.
      lengths: to choose from, rising.

    Returns:
      An index into `lengths`.
    """
    prior = jnp.asarray(PRIOR, jnp.float32)
    kept, rejected = prior + evidence
    share = kept / (kept + rejected)
    at = jnp.arange(lengths[-1] + 1, dtype=jnp.int32)
    reached = jnp.where(at < left, share ** at.astype(jnp.float32), 0.0)
    expected = jnp.cumsum(reached)[np.asarray(lengths)]
    return jnp.argmax(expected / costs).astype(jnp.int32)


def faded(
    evidence: Float[Array, "2"], kept: Int[Array, " B"], rejected: Int[Array, " B"]
) -> Float[Array, "2"]:
    """The evidence after a cycle.

    Drafts after a rejected one were not tried, so they count for nothing.

    Args:
      evidence: before it.
      kept: drafts that each row kept.
      rejected: 1 where a row rejected one.

    Returns:
      [kept, rejected] over all rows, what is older weighted less.
    """
    new = jnp.stack([jnp.sum(kept), jnp.sum(rejected)]).astype(jnp.float32)
    return FADE * evidence + new

"""Half-quadratic rounding (HQQ; Badri & Shaji, 2023): zero points that leave a sparse error.

It needs no activations. The error W − Ŵ is split into a part that may be large (few outliers) and
a quadratic rest: the large part is a generalized soft-threshold of |·|^p, p < 1, and the zero point
that fits the rest is a mean, so the two alternate in closed form.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from ttq_jax.config import ConfigError
from ttq_jax.errors import check_fields
from ttq_jax.quant.grid import Grid, decode, encode, fit, fit_zeros, split_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfQuadratic:
    """HQQ's rounding; a symmetric grid has no zero point to fit, so there it is nearest rounding.

    Attributes:
      p: norm of the error, in (0, 1).
      beta: weight of the quadratic part at first, > 0, in units of 1/|w|² at scale 1.
      kappa: growth of beta per step, >= 1.
      steps: most steps, >= 1; a group keeps the best zero point of all steps.

    Raises:
      ConfigError: a value outside its range.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20
    powers: ClassVar[tuple[float, ...]] = ()
    span: ClassVar[int] = 0

    def __post_init__(self):
        check_fields(self, ConfigError)
        positive = 0 < self.beta < math.inf and 1 <= self.kappa < math.inf
        if not (0 < self.p < 1 and positive and self.steps >= 1):
            raise ConfigError(
                "half-quadratic rounding: expected 0 < p < 1, finite beta > 0 and kappa >= 1, "
                f"steps >= 1; got p={self.p}, beta={self.beta}, kappa={self.kappa}, "
                f"steps={self.steps}"
            )

    def round(
        self,
        w: Float[Array, "d_in n"],
        gram: Array | None,
        grid: Grid,
    ) -> tuple[UInt8[Array, "k n"], Float[Array, "n_group n"], Float[Array, "n_group n"]]:
        """Codes of a scaled weight; see `SecondOrder.round`, whose arguments it takes."""
        del gram
        rows = grid.rows_per_group(w.shape[0])
        groups = split_groups(w, rows)
        scales, zeros = fit(groups, grid)
        if not grid.symmetric:
            # Rows that only pad the last group do not count.
            real = split_groups(jnp.ones(w.shape[0], jnp.float32), rows)[:, :, None]
            zeros = self._fit_zeros(groups, real, scales, zeros, grid)
        codes = encode(groups, scales, zeros, grid).astype(jnp.uint8)
        return codes.reshape(-1, w.shape[1]), scales, zeros

    def _fit_zeros(
        self, groups: Array, real: Array, scales: Array, zeros: Array, grid: Grid
    ) -> Array:
        """Zero points as they are stored, the best of all steps for each group."""

        def measured(zeros: Array) -> tuple[Array, Array, Array]:
            codes = encode(groups, scales, zeros, grid)
            wrong = groups - decode(codes, scales, zeros)
            return codes, wrong, jnp.sum(real * jnp.abs(wrong) ** self.p, axis=1)

        def step(i: Array, state: tuple) -> tuple:
            zeros, best, least = state
            codes, wrong, _ = measured(zeros)
            beta = self.beta * self.kappa ** i.astype(jnp.float32)
            size = jnp.abs(wrong)
            # 0^(p−1) is infinite, but an error of 0 stays 0 after any threshold.
            floor = jnp.where(size > 0, size, 1.0) ** (self.p - 1)
            large = jnp.sign(wrong) * jnp.maximum(size - floor / beta, 0.0)
            fitting = codes - (groups - large) / scales[:, None]
            zeros = jnp.sum(real * fitting, axis=1) / jnp.sum(real, axis=1)
            stored = fit_zeros(zeros, grid)
            _, _, error = measured(stored)
            better = error < least
            return zeros, jnp.where(better, stored, best), jnp.where(better, error, least)

        _, best, _ = jax.lax.fori_loop(0, self.steps, step, (zeros, zeros, measured(zeros)[2]))
        return best

"""Second-order rounding: the rows after each row compensate its rounding error.

The output error of a column is eᵀ H e with H = E[x xᵀ], not a sum of squares. With H = U D Uᵀ, U
unit upper triangular, it is Σ_k D_k (e_k + Σ_{j<k} U_jk e_j)²: rounding w_k + Σ_{j<k} U_jk e_j to
nearest instead of w_k minimizes each term in turn. That is GPTQ (Frantar et al., 2022) in the form
of LDLQ (Chee et al., 2023), which proved the two equal; this form needs one factorization and no
inverse. GPTQ takes H from a corpus. A prompt has fewer tokens than there are channels, so its H is
singular; damping regularizes it, an order of magnitude more than in GPTQ.

Each of these codes was chosen before the later ones were known. Descents go over them again, one
code at a time with all others as they are (coordinate descent, as in QuantEase; Behdin et al.,
2023).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from ttq_jax.config import ConfigError
from ttq_jax.errors import check_fields
from ttq_jax.quant.clip import check_refits, shrink_factors
from ttq_jax.quant.grid import Grid, decode, encode, search_ranges, split_groups

Refit = Callable[[Float[Array, "rows n"], Int[Array, ""]], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecondOrder:
    """GPTQ-style rounding, after a search over the groups' ranges.

    Attributes:
      steps: factors on a group's range that are tried first, as in `ClipSearch`; 1 for none.
      smallest: the last factor tried, in (0, 1].
      refits: of each factor's scale and zero point to its codes, as in `ClipSearch`.
      descents: sweeps of coordinate descent over all codes at the end, 0 to 100. They fit the
        prompt more closely, so they want more damping.
      damping: added to H's diagonal, relative to its mean, > 0; GPTQ's is 0.01.
      shrinkage: how far H is moved toward its own diagonal, in [0, 1].
      span: how many consecutive channels exchange errors: -1 for all channels; a multiple of 8
        reads only blocks of that size of the Gram matrix, which costs much less.
      act_order: round the channels with the largest H_ii first.
      static_groups: each group's scale is fitted to the weights as given; otherwise it is fitted
        when the group is reached, to the weights with the errors fed back (GPTQ's default).

    Raises:
      ConfigError: a value outside its range.
    """

    steps: int = 10
    smallest: float = 0.55
    refits: int = 0
    descents: int = 0
    damping: float = 0.3
    shrinkage: float = 0.0
    span: int = -1
    act_order: bool = False
    static_groups: bool = True
    powers: ClassVar[tuple[float, ...]] = ()  # the Gram matrix has the second on its diagonal

    def __post_init__(self):
        check_fields(self, ConfigError)
        shrink_factors(self.steps, self.smallest)
        check_refits(self.refits)
        if not 0 <= self.descents <= 100:
            raise ConfigError(
                f"descents: expected 0 (none) to 100, got {self.descents}; after a few sweeps no "
                "code changes any more"
            )
        if not (0 < self.damping < math.inf and 0 <= self.shrinkage <= 1):
            raise ConfigError(
                "second-order rounding: expected a finite damping > 0 and 0 <= shrinkage <= 1, got "
                f"{self.damping} and {self.shrinkage}"
            )
        if self.span != -1 and (self.span < 8 or self.span % 8):
            raise ConfigError(
                "second-order rounding: expected a span of -1 (all channels) or a positive "
                f"multiple of 8, got {self.span}"
            )
        if self.act_order and not self.static_groups:
            raise ConfigError(
                "second-order rounding: act_order needs static_groups = true, because it reaches "
                "the rows of one group at different times; set static_groups, or not act_order"
            )

    def round(
        self,
        w: Float[Array, "d_in n"],
        gram: Float[Array, "n_block b b"] | None,
        grid: Grid,
    ) -> tuple[UInt8[Array, "k n"], Float[Array, "n_group n"], Float[Array, "n_group n"]]:
        """Codes of a scaled weight.

        Args:
          w: D · W; its columns may be those of several projections with one input.
          gram: E[x xᵀ] of x / D in blocks of consecutive channels, the last padded with zeros.
          grid: the codes' grid.

        Returns:
          (codes, scales, zeros), k the width padded to whole groups; the small ones float32 with
          the values that are stored.

        Raises:
          ConfigError: groups that straddle two blocks, without static groups.
        """
        assert gram is not None, "Recipe refuses this rounding without moments"
        rows, b = grid.rows_per_group(w.shape[0]), gram.shape[-1]
        groups = split_groups(w, rows)
        n_group, k = len(groups), len(groups) * rows
        # A whole Gram matrix is padded to whole groups; blocks are padded by whole blocks.
        if len(gram) == 1:
            gram, b = jnp.pad(gram, ((0, 0), (0, k - b), (0, k - b))), k
        else:
            gram = jnp.pad(gram, ((0, -(-k // b) - len(gram)), (0, 0), (0, 0)))
        total = len(gram) * b
        weight = jnp.pad(w, ((0, total - w.shape[0]), (0, 0)))
        importance = jnp.diagonal(gram, axis1=1, axis2=2).reshape(-1)
        h = importance[:k].reshape(n_group, rows)
        shrinks = shrink_factors(self.steps, self.smallest)
        scales, zeros = search_ranges(groups, h, grid, shrinks, self.refits)
        group_of = jnp.minimum(jnp.arange(total, dtype=jnp.int32) // rows, n_group - 1)
        matrix = regularized(gram, self, w.shape[0])
        refit = None
        # Whole blocks get no errors from before: their groups' scales are the static ones.
        if not self.static_groups and n_group > 1 and rows % b:
            if b % rows:
                raise ConfigError(
                    "second-order rounding: without static_groups the span and the group size "
                    f"must divide one another, got a span of {b} channels and groups of {rows}; "
                    "change one of them, or set static_groups = true"
                )
            refit = lambda t, g: jax.tree.map(  # noqa: E731
                lambda a: a[0], search_ranges(t[None], h[g][None], grid, shrinks, self.refits)
            )
        if self.act_order:
            order = _largest_first(importance.reshape(len(gram), b))
            permuted = jax.vmap(lambda a, o: a[o][:, o])(matrix, order % b)
            order = order.reshape(-1)
            codes, scales, zeros = round_rows(
                weight[order], feedback(permuted), scales, zeros, group_of[order], grid, rows
            )
            codes = codes[jnp.argsort(order)]
        else:
            codes, scales, zeros = round_rows(
                weight, feedback(matrix), scales, zeros, group_of, grid, rows, refit
            )
        if self.descents:
            codes = descend(
                weight, matrix, codes, scales, zeros, group_of, grid, rows, self.descents
            )
        return codes[:k], scales, zeros


def _largest_first(importance: Float[Array, "n_block b"]) -> Int[Array, "n_block b"]:
    """The rows of each block, the most important first; a block's rows stay in it."""
    first = jnp.arange(len(importance), dtype=jnp.int32)[:, None] * importance.shape[1]
    return first + jnp.argsort(-importance, axis=1).astype(jnp.int32)


def regularized(
    gram: Float[Array, "n_block b b"], rule: SecondOrder, channels: int
) -> Float[Array, "n_block b b"]:
    """H: the Gram matrix with shrinkage and damping, positive definite.

    Args:
      gram: E[x xᵀ] in blocks.
      rule: its damping is relative to the mean of the whole diagonal.
      channels: in all blocks together, without those that only pad.

    Returns:
      float32.
    """
    eye = jnp.eye(gram.shape[-1], dtype=jnp.float32)
    diagonal = jnp.diagonal(gram, axis1=1, axis2=2)
    mean = jnp.sum(diagonal) / channels
    # If nothing was observed, every direction is worth the same.
    added = rule.shrinkage * diagonal + rule.damping * jnp.where(mean > 0, mean, 1.0)
    return (1 - rule.shrinkage) * gram + added[..., None] * eye[None]


def feedback(h: Float[Array, "n_block b b"]) -> Float[Array, "n_block b b"]:
    """The strictly upper part of U in H = U D Uᵀ: how much of row j's error row k takes over.

    Args:
      h: positive definite.

    Returns:
      float32, zeros on and below the diagonal.
    """
    # Cholesky gives a lower factor. Of the reversed matrix, reversed again, it is an upper one.
    factor = jnp.linalg.cholesky(h[:, ::-1, ::-1])[:, ::-1, ::-1]
    return jnp.triu(factor / jnp.diagonal(factor, axis1=1, axis2=2)[:, None, :], 1)


def round_rows(
    w: Float[Array, "k n"],
    u: Float[Array, "n_block b b"],
    scales: Float[Array, "n_group n"],
    zeros: Float[Array, "n_group n"],
    group_of: Int[Array, " k"],
    grid: Grid,
    rows: int,
    refit: Refit | None = None,
    errors: Float[Array, "k n"] | None = None,
) -> tuple[UInt8[Array, "k n"], Float[Array, "n_group n"], Float[Array, "n_group n"]]:
    """Rounds row after row, feeding errors forward.

    Rows are taken a few at a time: matrix products add the errors of all earlier rows, and those
    among the few are added row by row. Products are at highest precision: a TPU would multiply in
    bfloat16, and a sum of errors is as small as a rounding step.

    Args:
      w: scaled weights in the order of rounding, k = n_block · b.
      u: from `feedback`, in the same order.
      scales: of the groups.
      zeros: of the groups.
      group_of: per row, its group.
      grid: the codes' grid.
      rows: of a group; the rows beyond whole groups only pad, and come last.
      refit: fits a group's scale when it is reached, (weights with errors fed back, its index)
        -> (scale, zero); groups are then in order, each within a block. None keeps the scales
        given.
      errors: of all rows, to start with: a row then takes over those of later rows, too. None:
        no row has one before it is rounded.

    Returns:
      (codes, scales, zeros), the codes in the order of rounding.
    """
    (k, n), b = w.shape, u.shape[-1]
    step = math.gcd(rows, b) if refit else math.gcd(rows, b, 32)
    # Later rows have no errors yet: the product stops after the panel that holds this step.
    panel = b // max(i for i in range(1, 9) if b % (i * step) == 0)

    def take(i: Array, state: tuple) -> tuple:
        codes, errors, scales, zeros = state
        start = i.astype(jnp.int32) * step  # counted in int64 where 64-bit types are enabled
        block, local = jax.lax.div(start, np.int32(b)), jax.lax.rem(start, np.int32(b))
        columns = _cut(u, (block, 0, local), (1, b, step))[0]
        given = _cut(w, (start, 0), (step, n))

        def earlier(p: Array, target: Array) -> Array:
            by = _cut(columns, (p * panel, 0), (panel, step))
            of = _cut(errors, (block * b + p * panel, 0), (panel, n))
            return target + jnp.matmul(by.T, of, precision="highest")

        within = _cut(columns, (local, 0), (step, step))
        if known:
            columns = _put(columns, jnp.zeros_like(within), local)
        panels = jax.lax.div((np.int32(b) if known else local) + (panel - 1), np.int32(panel))
        target = jax.lax.fori_loop(0, panels, earlier, given)
        groups = _cut(group_of, (start,), (step,))
        if refit is not None:
            scale, zero = refit(_unrounded(given, target, within), groups[0])
            scales, zeros = (
                _put(a, new[None], groups[0]) for a, new in ((scales, scale), (zeros, zero))
            )
        before = _cut(errors, (start, 0), (step, n))
        code, error = _round_few(given, target, within, scales[groups], zeros[groups], grid, before)
        return _put(codes, code, start), _put(errors, error, start), scales, zeros

    known = errors is not None
    errors = jnp.zeros((k, n), jnp.float32) if errors is None else errors
    state = (jnp.zeros((k, n), jnp.uint8), errors, scales, zeros)
    codes, _, scales, zeros = jax.lax.fori_loop(0, scales.shape[0] * rows // step, take, state)
    return codes, scales, zeros


def descend(
    w: Float[Array, "k n"],
    h: Float[Array, "n_block b b"],
    codes: UInt8[Array, "k n"],
    scales: Float[Array, "n_group n"],
    zeros: Float[Array, "n_group n"],
    group_of: Int[Array, " k"],
    grid: Grid,
    rows: int,
    sweeps: int,
) -> UInt8[Array, "k n"]:
    """Coordinate descent: each code in turn takes its best value, given all the others.

    With the other rows' errors e fixed, eᵀ H e is least where w_k + Σ_{j≠k} H_jk e_j / H_kk is
    rounded to nearest. So it is `round_rows` with H in place of U, and no step makes eᵀ H e larger.

    Args:
      w: scaled weights, k = n_block · b.
      h: positive definite.
      codes: to start from.
      scales: of the groups.
      zeros: of the groups.
      group_of: per row, its group.
      grid: the codes' grid.
      rows: of a group; the rows beyond whole groups only pad, and come last.
      sweeps: how often each code is looked at.

    Returns:
      The codes.
    """
    eye = jnp.eye(h.shape[-1], dtype=jnp.float32)
    take_over = h * (1.0 - eye) / jnp.diagonal(h, axis1=1, axis2=2)[:, None, :]
    real = jnp.arange(len(w))[:, None] < len(scales) * rows

    def sweep(_: Array, codes: Array) -> Array:
        # Each row is a group of its own here.
        rounded = decode(codes[:, None].astype(jnp.float32), scales[group_of], zeros[group_of])
        errors = jnp.where(real, w - rounded[:, 0], 0.0)
        return round_rows(
            w, take_over, scales, zeros, group_of, grid, rows, errors=errors
        )[0]  # fmt: skip

    return jax.lax.fori_loop(0, sweeps, sweep, codes)


def _cut(a: Array, start: tuple, size: tuple) -> Array:
    """A slice at indices that are never negative, which spares a check."""
    at = [np.int32(i) if isinstance(i, int) else i for i in start]
    return jax.lax.dynamic_slice(a, at, size, allow_negative_indices=False)


def _put(a: Array, rows: Array, start: Array) -> Array:
    """The array with some rows replaced."""
    return jax.lax.dynamic_update_slice_in_dim(a, rows, start, 0, allow_negative_indices=False)


def _unrounded(given: Array, target: Array, u: Array) -> Array:
    """A few rows as the errors of earlier ones would leave them if they were not rounded.

    A row that takes over errors without being rounded differs from the row given, and that is an
    error of its own, which the next ones take over: c_k = a_k − Σ_{j<k} U_jk c_j.
    """
    change = jax.scipy.linalg.solve_triangular(
        u, target - given, trans=1, lower=False, unit_diagonal=True
    )
    return given + change


def _round_few(
    given: Array, target: Array, u: Array, scales: Array, zeros: Array, grid: Grid, errors: Array
) -> tuple[Array, Array]:
    """Codes and errors of a few rows, one after the other."""

    def one(j: Array, state: tuple) -> tuple:
        j, (codes, errors) = j.astype(jnp.int32), state
        w, t, s, z = (_cut(a, (j, 0), (1, a.shape[1])) for a in (given, target, scales, zeros))
        column = _cut(u, (0, j), (len(u), 1))
        fed = jnp.matmul(column.T, errors, precision="highest")
        q = encode((t + fed)[None], s, z, grid)
        error = w - decode(q, s, z)[0]
        return _put(codes, q[0].astype(jnp.uint8), j), _put(errors, error, j)

    state = (jnp.zeros(given.shape, jnp.uint8), errors)
    return jax.lax.fori_loop(0, len(given), one, state)

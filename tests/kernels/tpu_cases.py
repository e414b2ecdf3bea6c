"""The TPU kernels in a strict simulation: inputs, oracles, and bounds derived from the arithmetic.

Inputs are mixed so that one simulation proves two things: even rows of activations and even
columns of weights hold small whole numbers, whose products are exact and are compared exactly; all
others are real and are held to a bound.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from packed_weights import (
    EPS,
    coded_weight,
    oracle_weight,
    paired_weight,
    random_weight,
    stored_grid,
)

from pallas_kernels import reference
from pallas_kernels.grid import CodedPairs, CodedScales
from pallas_kernels.layout import pack, unpack
from pallas_kernels.problem import rounding_problem

LAYERS, LAYER = 2, 1
LIMBS = 2.0**-20
"""What `pallas_kernels.tpu.activations` says an activation's limbs lose, of the row's largest."""


# Newer simulations end at a race unless told to record it, as older ones always do.
RECORDS = {"on_race": "warn"} if "on_race" in pltpu.InterpretParams.__dataclass_fields__ else {}


def strict(cores=1):
    """A simulation that records races and fails on a read out of bounds or of what is unwritten."""
    return pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise",
        buffer_bounds="logical", dma_execution_mode="on_wait", num_cores_or_threads=cores,
        **RECORDS,
    )  # fmt: skip


def races_found():
    """Whether the last simulation had a race."""
    assert interpreter.races is not None, "nothing was simulated"
    return interpreter.races.races_found


def simulate(kernel, *operands, cores=1, **static):
    """A kernel's outputs, once no race was found."""
    pltpu.reset_tpu_interpret_mode_state()
    run = functools.partial(kernel, interpret=strict(cores), **static)
    out = jax.block_until_ready(jax.jit(run)(*operands))
    assert not races_found(), "a race was detected; see the captured output"
    return out


def half_step(dtype):
    """Most that rounding to a dtype moves a number, relatively."""
    return float(jnp.finfo(dtype).eps) / 2


def f64(a):
    return np.asarray(a, np.float64)


def rounded(exact, dtype):
    """float64 as a dtype stores it, for numbers that float32 holds exactly."""
    assert np.all(exact == exact.astype(np.float32))
    return f64(exact.astype(np.float32).astype(dtype))


def mixed_rows(seed, m, k, dtype="bfloat16"):
    """``[m, k]``: even rows whole numbers up to 4, odd ones real, of sizes far apart."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m, k)) * np.exp(rng.normal(size=(m, k)))
    x[::2] = rng.integers(-4, 4, x[::2].shape, endpoint=True)
    return jnp.asarray(x, dtype)


def mixed_packed(seed, bits, group_size, k, n, scale_dtype="bfloat16", zero_dtype="bfloat16"):
    """(codes of one layer, (planes, scales, zeros) of `LAYERS`).

    A scale type of "coded" has zero points of eight bits, or none; "coded4" has them in its bytes.
    """
    rng = np.random.default_rng(seed)
    every = []
    for layer in range(LAYERS):
        shape = [seed, layer], bits, group_size, k // group_size, n
        if scale_dtype == "coded":
            every.append(_whole_coded(rng, bits, *coded_weight(*shape, symmetric=not zero_dtype)))
            continue
        if scale_dtype == "coded4":
            every.append(_whole_pairs(rng, bits, *paired_weight(*shape)[:2]))
            continue
        codes, scales, zeros = random_weight(*shape, scale_dtype, zero_dtype)
        scales = np.array(scales)
        scales[:, ::2] = 2.0 ** rng.integers(-1, 2, scales[:, ::2].shape)
        if zero_dtype not in {None, "uint8"}:
            zeros = np.array(zeros)
            zeros[:, ::2] = rng.integers(0, 2**bits, zeros[:, ::2].shape)
        every.append((codes, scales, zeros))
    codes, *grids = jax.tree.map(lambda *of: np.stack(of), *every)
    return codes[LAYER], (pack(jnp.asarray(codes), bits=bits), *jax.tree.map(jnp.asarray, grids))


def _whole_coded(rng, bits, codes, scales, zeros):
    """The same; even columns have powers of two for scales, and whole zero points."""
    u, columns = np.array(scales.codes), np.array(scales.columns)
    u[:, ::2] = 2 ** rng.integers(0, 3, u[:, ::2].shape)
    columns[::2] = 0.5
    if zeros is not None:
        zeros = np.array(zeros)
        zeros[:, ::2] = zeros[:, ::2] >> (8 - bits) << (8 - bits)
    return codes, CodedScales(u, columns), zeros


def _whole_pairs(rng, bits, codes, scales):
    """The same of pairs."""
    (u, z), columns = np.divmod(np.array(scales.codes), 16), np.array(scales.columns)
    u[:, ::2] = 2 ** rng.integers(0, 3, u[:, ::2].shape)
    columns[::2] = 0.5
    z[:, ::2] -= z[:, ::2] % 2 ** max(4 - bits, 0)
    return codes, CodedPairs((16 * u + z).astype(np.uint8), columns), None


def one_layer(stacks):
    """The layer that is asked for, out of stacks."""
    return jax.tree.map(lambda a: a[LAYER], stacks)


def check_product(y, x, codes, stacks, *, bits, group_size):
    """Holds ``y = x (s (q - z))`` to its bound; returns the largest part of it that was used.

    The kernel sums ``x s (q + t)`` and ``x s (z + t)`` with ``|t| <= 128`` in float32, k terms
    each, with at most 16 more roundings: scales, the parts of a split number, and their sums. Whole
    numbers stay below 2**24 in all of it.
    """
    scales, zeros = one_layer(stacks[1:])
    weight, size = oracle_weight(codes, scales, zeros, bits, group_size)
    scale = np.repeat(stored_grid(scales, zeros, bits)[0], group_size, 0)
    exact, x64 = f64(x) @ weight, f64(x)
    k = codes.shape[0]
    bound = (k + 16) * EPS * (np.abs(x64) @ (size + 2 * 128 * scale))
    limbs = scale * np.abs(codes - 128.0 * (bits == 8))
    bound += LIMBS * np.abs(x64).max(1, keepdims=True) * limbs.sum(0)
    bound += half_step(y.dtype) * (np.abs(exact) + bound)
    wrong = np.abs(f64(y) - exact)
    assert np.all(wrong <= bound), f"{np.max(wrong / bound):.3g} of the bound"
    np.testing.assert_array_equal(f64(y)[::2, ::2], rounded(exact[::2, ::2], y.dtype))
    return float(np.max(wrong[1::2, 1::2] / bound[1::2, 1::2], initial=0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """What `quantize_pack` gets, and the float64 oracle of what it is to round.

    Attributes:
      w: ``[LAYERS, d_in, n]``; even columns of the target are whole, and so is their grid.
      channel_scale: ``[d_in]``, powers of two unless `real`, or None.
      importance: ``[d_in]`` or None.
      low_rank: (A, B), eighths unless `real`, or None.
      target: float64 ``[k, n]``, ``D (W - A B)``.
      noise: float64 ``[k, n]``, most that float32 makes of it differently.
      whole: whether even columns are exact.
    """

    w: jax.Array
    channel_scale: jax.Array | None
    importance: jax.Array | None
    low_rank: tuple | None
    target: np.ndarray
    noise: np.ndarray
    whole: bool

    @property
    def operands(self):
        """As a kernel takes them."""
        return self.w, self.channel_scale, self.importance, self.low_rank, jnp.asarray(LAYER)

    def problem(self, x=None, **kind):
        """What a kernel is asked to do with them, and with x."""
        return rounding_problem(self.w, self.channel_scale, self.low_rank, x, **kind)


def _whole_columns(rng, d_in, n, group_size, bits, symmetric):
    """Whole numbers with both ends of a grid of step 1 in every group."""
    top = 2**bits - 1
    middle = 2 ** (bits - 1)
    out = np.zeros((d_in, n))
    for start in range(0, d_in, group_size):
        rows = min(group_size, d_in - start)
        low = np.full(n, 1 - middle) if symmetric else -rng.integers(0, top, n, endpoint=True)
        high = np.full(n, middle - 1) if symmetric else low + top
        values = rng.integers(low, high + 1, (rows, n))
        values[0], values[rows - 1] = low, high
        out[start : start + rows] = values
    return out


def mixed_weight(seed, d_in, n, *, bits, group_size, zero_point, dtype="bfloat16", scaled=True,
                 rank=0, weighed=False, real=False):  # fmt: skip
    """A `Weight`."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(LAYERS, d_in, n))
    d = rng.uniform(0.5, 2, d_in) if real else 2.0 ** rng.integers(-1, 2, d_in)
    low_rank, product, terms = None, np.zeros((d_in, n)), 0.0
    if rank:
        down, up = rng.normal(size=(d_in, rank)), rng.normal(size=(rank, n))
        if not real:
            down, up = np.sign(down), np.round(up) / 2
        low_rank = tuple(jnp.asarray(a, jnp.float32) for a in (down, up))
        down, up = map(f64, low_rank)
        product, terms = down @ up, np.abs(down) @ np.abs(up)
    if not real:
        whole = _whole_columns(rng, d_in, n, group_size, bits, zero_point == "none")
        whole = whole / (d[:, None] if scaled else 1.0) + product
        w[LAYER, :, ::2] = whole[:, ::2]
    stored = jnp.asarray(w, dtype)
    scale = jnp.asarray(d, jnp.float32) if scaled else None
    factor = f64(scale)[:, None] if scaled else 1.0
    target = (f64(stored[LAYER]) - product) * factor
    noise = EPS * np.abs(target) + (rank + 2) * EPS * real * terms * factor
    padding = ((0, -d_in % group_size), (0, 0))
    return Weight(
        w=stored, channel_scale=scale, low_rank=low_rank, whole=not real,
        importance=jnp.asarray(rng.gamma(0.5, size=d_in), jnp.float32) if weighed else None,
        target=np.pad(target, padding), noise=np.pad(noise, padding),
    )  # fmt: skip


def _grid(packed, bits, group_size):
    """(codes, scales, zeros) in float64, all ``[k, n]``."""
    planes, *stored = packed
    s, z = stored_grid(*stored, bits)
    z = np.full(s.shape, 2.0 ** (bits - 1)) if z is None else z
    rows = [np.repeat(a, group_size, 0) for a in (s, z)]
    return f64(unpack(planes, bits=bits)), *rows


def _errors(weight, codes, s, z, group_size):
    """Each group's weighed squared error, and how far float32 may be from it."""
    h = np.ones(len(codes))
    if weight.importance is not None:
        h[: weight.importance.size] = f64(weight.importance)
    off = np.abs(weight.target - s * (codes - z))
    blur = 4 * EPS * (np.abs(weight.target) + s * np.abs(codes - z)) + weight.noise
    by_group = lambda a: (h[:, None] * a).reshape(-1, group_size, a.shape[1]).sum(1)  # noqa: E731
    error = by_group(off**2)
    return error, by_group(2 * off * blur + blur**2) + (group_size + 4) * EPS * error


def check_packed(got, weight, *, bits, group_size, zero_point, store_dtype, shrinks=(1.0,),
                 refits=0, scales="float"):  # fmt: skip
    """Holds packed codes to the reference's; returns how many differ, all of them near ties.

    A code may differ only where the weight lies between two codes up to what float32 makes of
    ``w / s + z``: three roundings and those of the target. Scales and zero points are the
    reference's to the bit, unless a real low-rank product moved a group's range, or two errors
    between which a search chose are equal up to rounding.
    """
    problem = weight.problem(bits=bits, group_size=group_size, zero_point=zero_point,
                             store_dtype=store_dtype, shrinks=shrinks, refits=refits,
                             scales=scales)  # fmt: skip
    oracle = functools.partial(reference.quantize_pack, problem=problem)
    given = weight.w[LAYER], weight.channel_scale, weight.importance, weight.low_rank
    want = jax.jit(oracle)(*given)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    codes, s, z = _grid(got, bits, group_size)
    want_codes, want_s, want_z = _grid(want, bits, group_size)
    other_grid = (s != want_s) | (z != want_z)
    value = weight.target / s + z
    slack = EPS * (3 * np.abs(weight.target / s) + np.abs(value)) + weight.noise / s
    nearest = np.clip(value, 0, 2**bits - 1)
    assert np.all(np.abs(codes - nearest) <= 0.5 + slack), "a code is not the nearest"
    tie = np.abs(value - np.floor(value) - 0.5) <= slack
    differ = codes != want_codes
    assert not np.any(differ & ~tie & ~other_grid), "a code differs, and no tie excuses it"
    if weight.whole:
        assert not np.any(differ[:, ::2] | other_grid[:, ::2]), "whole numbers are exact"
    if len(shrinks) > 1 or refits:
        (ours, blur), (theirs, _) = (
            _errors(weight, *grid, group_size)
            for grid in ((codes, s, z), (want_codes, want_s, want_z))
        )
        excused = np.repeat(np.abs(ours - theirs) <= 2 * blur, group_size, 0)
        assert np.all(excused | ~other_grid), "not the best of the search"
    elif weight.low_rank is not None and not weight.whole:
        moved = _moved(weight, want_s, want_z, bits, group_size, store_dtype)
        if scales == "coded":
            # By one of what each counts in besides.
            unit = f64(want[1].columns)
            moved = moved[0] + unit, moved[1] + np.abs(want_z) * unit / want_s + 2.0 ** (bits - 8)
        assert np.all(np.abs(s - want_s) <= moved[0])
        assert np.all(np.abs(z - want_z) <= moved[1])
    else:
        assert not np.any(other_grid), "scales or zero points differ"
    return int(differ.sum())


def _moved(weight, s, z, bits, group_size, store_dtype):
    """How far noise in a group's range may move its scale and zero point."""
    k, n = s.shape
    noise = weight.noise.reshape(-1, group_size, n).max(1).repeat(group_size, 0)
    step = 2 * half_step(store_dtype)
    scale = 2 * noise / (2 ** (bits - 1) - 1) + step * s
    assert scale.shape == (k, n)
    return scale, noise / s + np.abs(z) * (scale / s + step)


def check_prompt_product(y, x, weight, got, *, bits, group_size, quantized):
    """Holds a prompt's product to its bound; returns the largest part of it that was used.

    Products of float32 sums of k terms; beside them a rounding to x's dtype of the weight (where it
    is wider), of x / D, and of y.
    """
    d_in = x.shape[1]
    x64, step = f64(x), half_step(x.dtype)
    if quantized:
        codes, s, z = _grid(got, bits, group_size)
        matrix = (s * (codes - z))[:d_in]
        if weight.channel_scale is not None:
            x64 = x64 / f64(weight.channel_scale)
        roundings = 2
    else:
        matrix = f64(weight.w[LAYER])
        roundings = int(jnp.finfo(weight.w.dtype).bits > jnp.finfo(x.dtype).bits)
    exact = x64 @ matrix
    bound = ((d_in + 8) * EPS + roundings * step) * (np.abs(x64) @ np.abs(matrix))
    bound += step * (np.abs(exact) + bound)
    wrong = np.abs(f64(y) - exact)
    assert np.all(wrong <= bound), f"{np.max(wrong / bound):.3g} of the bound"
    if weight.whole and (quantized or weight.low_rank is None):
        np.testing.assert_array_equal(f64(y)[::2, ::2], rounded(exact[::2, ::2], y.dtype))
    return float(np.max(wrong[1::2, 1::2] / bound[1::2, 1::2], initial=0.0))

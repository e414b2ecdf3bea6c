"""The public calls: they check their arguments, bring them to one form and run the chosen kernel.

Every implementation gets the same: activations ``[m, k]`` that are divided by the channel scale
already, weights with a leading layer axis, and the layer's index. The low-rank term is two small
products outside the kernel: XLA runs them at the matrix unit's speed, and inside it they would take
the fast memory that the weight's blocks need.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import batching
from pallas_kernels.choice import choose, current_target, module_of
from pallas_kernels.grid import CodedPairs, CodedScales, Scales
from pallas_kernels.layout import check_packing, check_planes
from pallas_kernels.problem import COLUMN_TYPES, FLOATS, Problem, matmul_problem, rounding_problem
from pallas_kernels.reference import LowRank, Packed


def packed_matmul(
    x: jax.Array,
    planes: Sequence[jax.Array],
    scales: Scales,
    zeros: jax.Array | None,
    channel_scale: jax.Array | None = None,
    low_rank: LowRank | None = None,
    *,
    bits: int,
    group_size: int,
    layer: jax.Array | int | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """``y = (x / D) Q + (x A) B`` with ``Q = s (q - z)``, sums in float32.

    Args:
      x: ``[..., d_in]`` with ``k - group_size < d_in <= k``, float32, bfloat16 or float16.
      planes: From `quantize_pack` or `pack`: ``uint8[k * width // 8, n]`` for each width in
        ``PLANES[bits]``.
      scales: ``[k // group_size, n]``, float32, bfloat16 or float16; or `CodedScales` or
        `CodedPairs`.
      zeros: As ``scales``, or uint8, in units of codes; beside `CodedScales` uint8, in units of
        ``2**(bits - 8)`` codes; None is symmetric, or beside `CodedPairs`.
      channel_scale: D, ``[d_in]``, positive, or None for 1.
      low_rank: ``(A[d_in, r], B[r, n])`` or None.
      bits: Width of a code: 2, 3, 4, 5 or 8.
      group_size: Rows that share a scale: a multiple of 8 that divides ``k``.
      layer: Reads this layer of planes, scales and zeros that have a leading axis over layers,
        without copying it out; D, A and B are that layer's own. None: there is no such axis.
      out_dtype: Of y: float32, bfloat16 or float16; None is x's.
      implementation: None, or one of `choice.IMPLEMENTATIONS` to force it.

    Returns:
      ``y[..., n]``, the float32 sums rounded to ``out_dtype``.

    Raises:
      ValueError: arguments that do not fit each other, or an implementation that cannot serve.
    """
    planes = tuple(planes)
    k, n = check_planes(planes, bits=bits)
    check_packing(bits=bits, k=k, group_size=group_size)
    _check_axes("planes", planes[0], layer)
    lead = planes[0].shape[:-2]
    _check_stored(scales, zeros, lead, (k // group_size, n))
    d_in = x.shape[-1] if x.ndim else 0
    if x.dtype not in FLOATS or not k - group_size < d_in <= k:
        raise ValueError(
            f"x: expected floating [..., {k}] (up to {group_size - 1} channels fewer are padding), "
            f"got {x.dtype}{list(x.shape)}; "
            "pass activations of as many channels as the weight was packed from"
        )
    _check_factors(channel_scale, low_rank, d_in, n)
    problem = matmul_problem(
        x, scales, zeros, low_rank, bits=bits, group_size=group_size, out_dtype=out_dtype
    )
    stacks, layer = _with_layers((planes, scales, zeros), layer)
    rows = x.reshape(-1, d_in)

    def call(stacks: Any, layer: Any, x: Any) -> jax.Array:
        name, run = _chosen(dataclasses.replace(problem, m=x.shape[0]), implementation)
        return run(x, *(_left_in_place(stacks) if name == "tpu" else stacks), layer)

    def fold(call: Any, stacks: Any, layer: Any, x: jax.Array) -> jax.Array:
        size, m = x.shape[:2]
        return call(stacks, layer, x.reshape(size * m, -1)).reshape(size, m, -1)

    run = _mapped(call, problem, implementation, fold)
    y = run(stacks, layer, _scaled(rows, channel_scale, k))
    return _plus_low_rank(y, rows, low_rank).reshape(*x.shape[:-1], n)


def quantize_pack(
    w: jax.Array,
    channel_scale: jax.Array | None = None,
    importance: jax.Array | None = None,
    low_rank: LowRank | None = None,
    *,
    bits: int,
    group_size: int,
    zero_point: str,
    store_dtype: jax.typing.DTypeLike,
    scales: str = "float",
    shrinks: tuple[float, ...] = (1.0,),
    refits: int = 0,
    row_axes: tuple[str, ...] = (),
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
) -> Packed:
    """Rounds ``D (W - A B)`` to each group's grid and packs the codes, in one pass over the weight.

    Args:
      w: ``[d_in, n]``, float32, bfloat16 or float16; rows are padded with zeros to whole groups.
      channel_scale: D, ``[d_in]``, positive, or None for 1.
      importance: ``[d_in]``, the weight of each row's squared error in the search over
        ``shrinks``; None weighs all rows alike.
      low_rank: ``(A[d_in, r], B[r, n])`` or None.
      bits: Width of a code: 2, 3, 4, 5 or 8.
      group_size: Rows that share a scale, a multiple of 8.
      zero_point: ``"none"`` (symmetric), ``"float"`` or ``"integer"``; see `grid.ZERO_POINTS`.
      store_dtype: Of scales and float zero points: float32, bfloat16 or float16.
      scales: ``"float"``; ``"coded"`` for `CodedScales`, whose columns take ``store_dtype``,
        float32 or bfloat16, and for zero points in eight bits; or ``"coded4"`` for `CodedPairs`,
        which need the zero point ``"float"`` and at most 5 bits.
      shrinks: Factors in (0, 1] on a group's range; each group and column takes the best.
      refits: How often the scale and zero point of each of these ranges are fitted to its codes, 0
        to 100; see `search`.
      row_axes: Inside a `shard_map`, the mesh axes that a column's other rows are on.
      layer: Quantizes this layer of ``w[L, d_in, n]``, without copying it out; the other operands
        are that layer's own. None: there is no such axis.
      implementation: None, or one of `choice.IMPLEMENTATIONS` to force it.

    Returns:
      ``(planes, scales, zeros)`` as `packed_matmul` reads them, of one layer; zeros are None,
      ``store_dtype`` or uint8.

    Raises:
      ValueError: arguments that do not fit each other, or an implementation that cannot serve.
    """
    _check_weight(w, channel_scale, importance, low_rank, layer)
    problem = rounding_problem(
        w, channel_scale, low_rank, bits=bits, group_size=group_size, zero_point=zero_point,
        store_dtype=store_dtype, scales=scales, shrinks=shrinks, refits=refits, row_axes=row_axes,
    )  # fmt: skip
    stacks, layer = _with_layers(w, layer)

    def call(w: Any, layer: Any, rest: Any) -> Packed:
        name, run = _chosen(problem, implementation)
        return _apart(name, run(w, *rest, layer))

    run = _mapped(call, problem, implementation)
    return run(stacks, layer, (channel_scale, importance, low_rank))


def prefill_quantize(
    x: jax.Array,
    w: jax.Array,
    channel_scale: jax.Array | None = None,
    importance: jax.Array | None = None,
    low_rank: LowRank | None = None,
    *,
    bits: int,
    group_size: int,
    zero_point: str,
    store_dtype: jax.typing.DTypeLike,
    scales: str = "float",
    shrinks: tuple[float, ...] = (1.0,),
    refits: int = 0,
    quantized: bool = False,
    row_axes: tuple[str, ...] = (),
    layer: jax.Array | int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Packed]:
    """A prompt's product with a weight, and the weight packed: both from one read of it.

    Args:
      x: ``[..., d_in]``, float32, bfloat16 or float16.
      w: ``[d_in, n]``; see `quantize_pack`, as the arguments after it.
      channel_scale: See `quantize_pack`.
      importance: See `quantize_pack`.
      low_rank: See `quantize_pack`.
      bits: See `quantize_pack`.
      group_size: See `quantize_pack`.
      zero_point: See `quantize_pack`.
      store_dtype: See `quantize_pack`.
      scales: See `quantize_pack`.
      shrinks: See `quantize_pack`.
      refits: See `quantize_pack`.
      quantized: Multiply with the weight that was just packed, as the paper does, instead of `w`.
      row_axes: See `quantize_pack`.
      layer: See `quantize_pack`.
      implementation: None, or one of `choice.IMPLEMENTATIONS` to force it.

    Returns:
      ``(y[..., n] in x's dtype, (planes, scales, zeros))``.

    Raises:
      ValueError: arguments that do not fit each other, or an implementation that cannot serve.
    """
    _check_weight(w, channel_scale, importance, low_rank, layer)
    d_in, n = w.shape[-2:]
    if x.ndim == 0 or x.dtype not in FLOATS or x.shape[-1] != d_in:
        raise ValueError(
            f"x: expected floating [..., {d_in}], got {x.dtype}{list(x.shape)}; "
            "pass activations of as many channels as the weight has rows"
        )
    problem = rounding_problem(
        w, channel_scale, low_rank, x, bits=bits, group_size=group_size, zero_point=zero_point,
        store_dtype=store_dtype, scales=scales, shrinks=shrinks, refits=refits,
        quantized=quantized, row_axes=row_axes,
    )  # fmt: skip
    stacks, layer = _with_layers(w, layer)
    rows = x.reshape(-1, d_in)

    def call(w: Any, layer: Any, rest: Any) -> tuple[jax.Array, Packed]:
        name, run = _chosen(problem, implementation)
        x, *others = rest
        y, packed = run(x, w, *others, layer)
        return y, _apart(name, packed)

    run = _mapped(call, problem, implementation)
    y, packed = run(stacks, layer, (rows, channel_scale, importance, low_rank))
    if quantized:
        y = _plus_low_rank(y, rows, low_rank)
    return y.reshape(*x.shape[:-1], n), packed


def _chosen(problem: Problem, implementation: str | None) -> tuple[str, Callable[..., Any]]:
    """Who computes, and its function of the arrays."""
    target = current_target()
    name = choose(problem, target, implementation).implementation
    module = module_of(problem.kernel, name)
    run = getattr(module, problem.kernel)
    if problem.kernel == "packed_matmul" and name == "xla" and target.platform != "cpu":
        run = module.dense_matmul
    run = functools.partial(run, problem=problem)
    if name == "interpret":
        from jax.experimental.pallas import tpu as pltpu

        run = functools.partial(run, interpret=pltpu.InterpretParams())
    return name, run


def _mapped(call: Any, problem: Problem, implementation: str | None, fold: Any = None) -> Any:
    """`batching.mapped`, XLA's own batching where XLA computes.

    What JAX keeps of a call must hold no tracer (`jax_check_tracer_leaks`): a problem is plain.
    """

    def native() -> bool:
        return choose(problem, current_target(), implementation).implementation == "xla"

    def counted(*operands: Any) -> Any:
        # In 32 bits, whatever `jax_enable_x64` says: Mosaic has no wider integers.
        with jax.enable_x64(False):
            return call(*operands)

    return batching.mapped(counted, name=problem.kernel, native=native, fold=fold)


def _left_in_place(stacks: Any) -> Any:
    """Stacks that XLA leaves in HBM.

    XLA does not see that a kernel reads only one layer. It would copy a stack that fits into a
    TPU's fast memory there before each call, and so read the scales of all layers once per layer.
    """
    from jax.experimental.pallas import tpu as pltpu

    return jax.tree.map(lambda a: pltpu.with_memory_space_constraint(a, pltpu.HBM), stacks)


def _apart(name: str, out: Any) -> Any:
    """What a kernel made, with the kernel left alone.

    XLA for TPUs fuses the write into a scan's stacked result with the kernel, tiles the two
    differently, and aborts (libtpu 0.0.42 to 0.0.52).
    """
    return jax.lax.optimization_barrier(out) if name == "tpu" else out


def _scaled(x: jax.Array, channel_scale: jax.Array | None, k: int) -> jax.Array:
    """``x / D``, divided in float32, padded to ``k`` channels."""
    if channel_scale is not None:
        quotient = x.astype(jnp.float32) / channel_scale.astype(jnp.float32)[None]
        x = quotient.astype(x.dtype)
    return x if x.shape[-1] == k else jnp.pad(x, ((0, 0), (0, k - x.shape[-1])))


def _plus_low_rank(y: jax.Array, x: jax.Array, low_rank: LowRank | None) -> jax.Array:
    """``y + (x A) B`` in y's dtype, sums in float32."""
    if low_rank is None:
        return y
    down, up = (factor.astype(x.dtype) for factor in low_rank)
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    low = product(product(x, down).astype(x.dtype), up)
    return (y.astype(jnp.float32) + low).astype(y.dtype)


def _with_layers(weights: Any, layer: jax.Array | int | None) -> tuple[Any, jax.Array]:
    """Weights with a leading layer axis, and which layer is meant.

    Raises:
      ValueError: a layer that there is not.
    """
    if layer is None:
        return jax.tree.map(lambda a: a[None], weights), jnp.zeros((), jnp.int32)
    depth = jax.tree.leaves(weights)[0].shape[0]
    if isinstance(layer, int):
        # Kernels read without a bounds check; what is traced cannot be looked at.
        if not 0 <= layer < depth:
            raise ValueError(f"layer: expected 0 to {depth - 1}, got {layer}; layers count from 0")
    elif layer.ndim or not jnp.issubdtype(layer.dtype, jnp.integer):
        raise ValueError(
            f"layer: expected one integer, got {layer.dtype}{list(layer.shape)}; vmap over several"
        )
    return weights, jnp.asarray(layer, jnp.int32)


def _check(
    name: str, a: jax.Array, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS
) -> None:
    if tuple(a.shape) != shape:
        raise ValueError(
            f"{name}: expected shape {shape}, got {tuple(a.shape)}; keep together what one call of "
            "quantize_pack returned, and the operands that were given to it"
        )
    if a.dtype not in dtypes:
        raise ValueError(f"{name}: expected one of {', '.join(dtypes)}, got {a.dtype}; cast it")


def _check_stored(
    scales: Any, zeros: jax.Array | None, lead: tuple[int, ...], shape: tuple[int, int]
) -> None:
    """Checks scales and zero points of one layer's shape, under leading axes.

    Raises:
      ValueError: they do not fit each other, or the shape.
    """
    if not isinstance(scales, CodedScales):
        _check("scales", scales, (*lead, *shape))
        if zeros is not None:
            _check("zeros", zeros, (*lead, *shape), (*FLOATS, "uint8"))
        return
    _check("scales.codes", scales.codes, (*lead, *shape), ("uint8",))
    _check("scales.columns", scales.columns, (*lead, shape[1]), COLUMN_TYPES)
    if isinstance(scales, CodedPairs) and zeros is not None:
        raise ValueError(
            f"zeros: expected None beside CodedPairs, got {zeros.dtype}{list(zeros.shape)}; their "
            "zero points are in scales.codes"
        )
    if zeros is not None:
        _check("zeros", zeros, (*lead, *shape), ("uint8",))


def _check_axes(name: str, a: jax.Array, layer: Any) -> None:
    expected = 2 if layer is None else 3
    if a.ndim != expected:
        raise ValueError(
            f"{name}: expected {expected} axes {'without' if layer is None else 'with'} a layer, "
            f"got {list(a.shape)}; pass layer= for weights that are stacked over layers, vmap for "
            "any other leading axis"
        )


def _check_factors(
    channel_scale: jax.Array | None, low_rank: LowRank | None, d_in: int, n: int
) -> None:
    if channel_scale is not None:
        _check("channel_scale", channel_scale, (d_in,))
    if low_rank is not None:
        down, up = low_rank
        _check("low_rank's A", down, (d_in, down.shape[-1]))
        _check("low_rank's B", up, (down.shape[-1], n))


def _check_weight(
    w: jax.Array, channel_scale: jax.Array | None, importance: jax.Array | None,
    low_rank: LowRank | None, layer: Any,
) -> None:  # fmt: skip
    """Checks the arrays that the quantizers share."""
    _check_axes("w", w, layer)
    _check("w", w, tuple(w.shape))
    _check_factors(channel_scale, low_rank, *w.shape[-2:])
    if importance is not None:
        _check("importance", importance, w.shape[-2:-1])

"""Second-order rounding against published GPTQ in NumPy, its theory, its program's size."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import fit_group
from oracle_methods import gptq, unit_upper

from ttq_jax.config import ConfigError
from ttq_jax.linear import dense_weight
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.convert import quantize
from ttq_jax.quant.grid import Grid, Nearest
from ttq_jax.quant.moments import Reads, gram_blocks, observe
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.scaling import NoScale
from ttq_jax.quant.second_order import SecondOrder, feedback, regularized

PUBLISHED = {"steps": 1, "smallest": 1.0, "damping": 0.01}
D_IN, D_OUT = 128, 48


def inputs(tokens=200, d_in=D_IN, seed=0):
    """Correlated activations whose channels differ in size."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d_in // 4, d_in)) + 0.3 * rng.normal(size=(d_in // 4, d_in))
    x = rng.normal(size=(tokens, d_in // 4)) @ mix * 0.2 + rng.normal(size=(tokens, d_in))
    return (x * np.exp(0.7 * rng.normal(size=d_in))).astype(np.float32)


def weight(d_in=D_IN, d_out=D_OUT, seed=1):
    return np.random.default_rng(seed).normal(size=(d_in, d_out)).astype(np.float32)


def moments_of(x, span=-1):
    x = jnp.asarray(x)
    return observe(x, jnp.ones(x.shape[:-1], bool), Reads((2.0,), span))


@partial(jax.jit, static_argnames=("rule", "grid"))
def rounded(w, gram, rule, grid):
    return rule.round(w, gram, grid)


def ours(w, x, rule, grid):
    """(codes, dequantized) of the real rows."""
    gram = gram_blocks(moments_of(x, rule.span), Reads(span=rule.span).block(w.shape[0]))
    codes, s, z = (np.asarray(a, np.float64) for a in rounded(jnp.asarray(w), gram, rule, grid))
    rows = grid.rows_per_group(w.shape[0])
    s, z = np.repeat(s, rows, 0), np.repeat(z, rows, 0)
    return codes[: w.shape[0]], (s * (codes - z))[: w.shape[0]]


def objective(w, q, h):
    e = np.asarray(w, np.float64) - q
    return np.einsum("in,ij,jn->", e, h, e)


def assert_same_rounding(got, want, w, h):
    """Codes are equal but for columns in which float32 broke a tie the other way.

    With damping 0.01 the condition number is below 1e4, so that float32 leaves an error of about
    1e-4 of a step in what is rounded: of these 6000 weights less than one meets a tie. From there
    on its column goes another, equally good way: two columns may, and the objective tells whether
    the other way is as good.
    """
    apart = (got[0] != want[0]).any(0)
    assert apart.sum() <= 2
    np.testing.assert_allclose(objective(w, got[1], h), objective(w, want[1], h), rtol=1e-3)
    # Where the codes agree, so do the scales: the same weights, to float32.
    np.testing.assert_allclose(got[1][:, ~apart], want[1][:, ~apart], atol=2e-4)


def test_feedback_is_the_unit_upper_factor():
    h = np.stack([x.T @ x / 200 + 0.1 * np.eye(24) for x in (inputs(200, 24, s) for s in (0, 1))])
    got = np.asarray(feedback(jnp.asarray(h, jnp.float32)))
    for u, one in zip(got, h, strict=True):
        want, d = unit_upper(one)
        np.testing.assert_allclose(want * d @ want.T, one, atol=1e-9 * one.max())
        np.testing.assert_allclose(u, want - np.eye(24), atol=1e-4)
    assert (np.tril(got) == 0).all()


# group < block; group = block, where the published code fits scales on arrival to the same weights
# (inside a block it would not yet see the block's errors); and whole rows.
@pytest.mark.parametrize(
    ("rows", "block", "how"),
    [
        (32, 128, {}),
        (128, 32, {}),
        (32, 128, {"act_order": True}),
        (32, 32, {"static_groups": False, "stale": True}),
        (32, 128, {"static_groups": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("bits", "symmetric"), [(3, False), (4, True)])
def test_it_is_published_gptq(bits, symmetric, rows, block, how):
    w, x = weight(), inputs()
    h = x.T.astype(np.float64) @ x / len(x)
    grid = Grid(bits=bits, group_size=-1 if rows == 128 else rows, symmetric=symmetric,
                zero_point="integer", store_dtype="float32")  # fmt: skip
    knobs = {k: v for k, v in how.items() if k != "stale"}
    want = gptq(w, h, bits=bits, rows=rows, symmetric=symmetric, block=block, **how)
    got = ours(w, x, SecondOrder(**PUBLISHED, **knobs), grid)
    assert_same_rounding(got, want, w, h)
    # The oracle can tell: rounding in another order or with other scales is another rounding.
    nearest = np.concatenate(
        [np.round(w[i : i + rows] / s + z) for i in range(0, D_IN, rows)
         for s, z in [fit_group(w[i : i + rows], bits, symmetric)]]
    )  # fmt: skip
    assert (got[0] != nearest).mean() > 0.1


@pytest.mark.parametrize(("d_in", "static"), [(100, True), (84, False)])
def test_a_width_that_is_no_whole_number_of_groups(d_in, static):
    w, x = weight(d_in), inputs(d_in=d_in)
    h = x.T.astype(np.float64) @ x / len(x)
    want = gptq(w, h, bits=3, rows=32, symmetric=False, zero_point="float", static_groups=static)
    grid = Grid(bits=3, group_size=32, store_dtype="float32")
    got = ours(w, x, SecondOrder(**PUBLISHED, static_groups=static), grid)
    assert_same_rounding(got, want, w, h)


# span, width, group size: blocks of groups, groups of blocks, and rows that fill neither.
@pytest.mark.parametrize(
    ("span", "d_in", "rows", "how"),
    [
        (32, 128, 32, {}),
        (32, 128, 32, {"act_order": True}),
        (32, 128, 32, {"static_groups": False}),
        (64, 96, 32, {}),
        (64, 96, 32, {"act_order": True}),
        (64, 96, 32, {"static_groups": False}),
        (32, 128, 64, {}),
        (32, 128, 64, {"static_groups": False}),
        (24, 96, 32, {}),
        (40, 100, 32, {}),
    ],
    ids=str,
)
def test_a_span_is_gptq_on_the_block_diagonal(span, d_in, rows, how):
    w, x = weight(d_in), inputs(d_in=d_in)
    h = x.T.astype(np.float64) @ x / len(x)
    of = np.arange(d_in) // span
    h = h * (of[:, None] == of)
    order = np.arange(d_in)
    if how.get("act_order"):
        # A block's rows stay in it: the oracle is handed each block's in their order.
        order = np.concatenate(
            [at[np.argsort(-np.diag(h)[at], kind="stable")]
             for at in np.split(order, np.arange(span, d_in, span))]
        )  # fmt: skip
    grid = Grid(bits=3, group_size=rows, store_dtype="float32")
    got = ours(w, x, SecondOrder(**PUBLISHED, span=span, **how), grid)
    if not how.get("act_order"):
        want = gptq(w, h, bits=3, rows=rows, symmetric=False, zero_point="float", **how)
        assert_same_rounding(got, want, w, h)
        return
    grids = [fit_group(w[i : i + rows], 3, False, "float") for i in range(0, d_in, rows)]
    s, z = (np.stack([g[i] for g in grids])[np.arange(d_in) // rows] for i in (0, 1))
    damped = h + 0.01 * np.mean(np.diag(h)) * np.eye(d_in)
    u, _ = unit_upper(damped[order][:, order])
    want, error = np.zeros_like(w, np.float64), np.zeros_like(w, np.float64)
    for k, row in enumerate(order):
        target = w[row] + u[:k, k] @ error[order[:k]]
        want[row] = np.clip(np.round(target / s[row] + z[row]), 0, 7)
        error[row] = w[row] - s[row] * (want[row] - z[row])
    assert_same_rounding(got, (want, s * (want - z)), w, h)


def test_scales_on_arrival_need_groups_within_a_block_or_of_whole_blocks():
    rule = SecondOrder(**PUBLISHED, span=24, static_groups=False)
    with pytest.raises(ConfigError, match="24 channels and groups of 32"):
        ours(weight(96), inputs(d_in=96), rule, Grid(bits=3, group_size=32))


packing = jax.jit(quantize, static_argnames="recipe")
unpacking = jax.jit(dense_weight)


def packed(w, x, rounding, span=-1, **grid):
    """Of moments in the shape that every rounding reads."""
    recipe = Recipe(moments="corpus", scale=NoScale(), rounding=rounding, grid=Grid(**grid))
    return packing(jnp.asarray(w), moments_of(x, span), recipe)


def errors(w, x, rounding, span=-1, **grid):
    """(squared error of the weights, of the outputs on x)."""
    e = np.asarray(unpacking(packed(w, x, rounding, span, **grid)), np.float64) - w
    return (e**2).sum(), ((x @ e) ** 2).sum()


@pytest.mark.parametrize(
    ("tokens", "grid", "damping"),
    [
        (200, {"bits": 3}, 0.01),
        (40, {"bits": 3}, 0.3),
        (40, {"bits": 2, "symmetric": True}, 0.01),
        (40, {"bits": 4, "group_size": -1}, 0.3),
    ],
    ids=str,
)
def test_worse_on_weights_and_better_on_outputs_than_nearest(tokens, grid, damping):
    w, x = weight(), inputs(tokens)
    plain = errors(w, x, Nearest(), **grid)
    second = errors(w, x, SecondOrder(steps=1, damping=damping), **grid)
    assert second[0] > plain[0]
    assert second[1] < 0.8 * plain[1]
    # With fewer tokens than channels nearly all of the error fits where no input looks.
    if tokens < D_IN and damping == 0.01:
        assert second[1] < 0.25 * plain[1]


@pytest.mark.parametrize(
    ("grid", "damping"),
    [({"bits": 3}, 0.01), ({"bits": 3}, 100.0), ({"bits": 2, "symmetric": True}, 0.3)],
    ids=str,
)
def test_without_feedback_it_is_nearest_rounding(grid, damping):
    w, x = weight(), inputs(40)
    same = packed(w, x, SecondOrder(steps=1, shrinkage=1.0, damping=damping), **grid)
    jax.tree.map(np.testing.assert_array_equal, same, packed(w, x, Nearest(), **grid))


def test_without_feedback_its_search_over_ranges_is_the_kernels():
    w, x = weight(), inputs(40)
    clipped = unpacking(packed(w, x, ClipSearch(), bits=3))
    ours = unpacking(packed(w, x, SecondOrder(shrinkage=1.0), bits=3))
    assert np.abs(clipped - unpacking(packed(w, x, Nearest(), bits=3))).max() > 0.1
    # Sums in another order may prefer the other one of two equally good ranges.
    assert (np.abs(ours - clipped).max(0) > 1e-6).mean() <= 0.05


def test_more_damping_moves_toward_nearest():
    w, x = weight(), inputs(40)
    nearest = np.asarray(unpacking(packed(w, x, Nearest(), bits=3)))
    moved = [
        (np.asarray(unpacking(packed(w, x, SecondOrder(steps=1, damping=d), bits=3)))
         != nearest).mean()
        for d in (0.01, 1.0, 1e6)
    ]  # fmt: skip
    assert moved[0] > moved[1] > moved[2]
    # Fed back is about 1e-6 of an error: a weight in a million sits so close to a tie.
    assert moved[2] <= 1e-3


@pytest.mark.parametrize(
    ("span", "group_size", "how"),
    [
        (-1, -1, {}),
        (-1, 32, {"act_order": True}),
        (-1, 32, {"static_groups": False}),
        (16, 16, {"act_order": True}),
        (16, -1, {"static_groups": False}),
    ],
    ids=str,
)
def test_silence_and_dead_channels_stay_finite(span, group_size, how):
    w, x = weight(60, 8), inputs(20, 60)
    x[:, [3, 4, 59]] = 0
    rule = SecondOrder(steps=1, span=span, damping=0.01, **how)
    got = unpacking(packed(w, x, rule, span, bits=3, group_size=group_size))
    assert np.isfinite(got).all()
    assert np.abs(got - w).max() < 2.0 * np.abs(w).max()
    # Nothing observed says nothing: nearest rounding.
    silent = packed(w, np.zeros_like(x), rule, span, bits=3, group_size=group_size)
    plain = packed(w, x, Nearest(), -1, bits=3, group_size=group_size)
    jax.tree.map(np.testing.assert_array_equal, silent, plain)


def test_regularized_is_its_formula():
    x = inputs(40, 64)
    gram = np.stack([x[:, i : i + 16].T @ x[:, i : i + 16] / 40 for i in range(0, 64, 16)])
    diagonal = np.stack([np.diag(g) for g in gram])
    got = regularized(jnp.asarray(gram), SecondOrder(damping=0.2, shrinkage=0.4, span=16), 64)
    want = 0.6 * gram + np.stack([np.diag(0.4 * d + 0.2 * diagonal.mean()) for d in diagonal])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    # What pads the last block is no channel: it lowers no mean.
    padded = np.zeros((5, 16, 16), np.float32)
    padded[:4] = gram
    more = regularized(jnp.asarray(padded), SecondOrder(damping=0.2, span=16), 64)
    less = regularized(jnp.asarray(gram), SecondOrder(damping=0.2, span=16), 64)
    np.testing.assert_allclose(more[:4], less, rtol=1e-6)


def descended(w, q, s, z, h, sweeps, top):
    """Coordinate descent written out: one code after the other, all others as they are."""
    q, w = q.copy(), w.astype(np.float64)
    for _ in range(sweeps):
        for k in range(len(w)):
            error = w - s * (q - z)
            best = w[k] + (h[k] @ error - h[k, k] * error[k]) / h[k, k]
            q[k] = np.clip(np.round(best / s[k] + z[k]), 0, top)
    return q


@pytest.mark.parametrize(
    ("d_in", "how"),
    [(128, {}), (128, {"act_order": True}), (100, {}), (96, {"span": 64}), (100, {"span": 40}),
     (128, {"static_groups": False})],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("sweeps", [1, 3])
def test_descents_are_coordinate_descent(d_in, how, sweeps):
    w, x = weight(d_in), inputs(40, d_in)
    b = how.get("span", d_in)
    of = np.arange(d_in) // b
    h = (x.T.astype(np.float64) @ x / len(x)) * (of[:, None] == of)
    h = h + 0.3 * np.mean(np.diag(h)) * np.eye(d_in)
    grid = Grid(bits=3, group_size=32, store_dtype="float32")
    rule = SecondOrder(damping=0.3, **how)
    gram = gram_blocks(moments_of(x, rule.span), Reads(span=rule.span).block(d_in))
    codes, s, z = (np.asarray(a) for a in rounded(jnp.asarray(w), gram, rule, grid))
    s, z = (np.repeat(a.astype(np.float64), 32, 0)[:d_in] for a in (s, z))
    want = descended(w, codes[:d_in].astype(np.float64), s, z, h, sweeps, 7)
    got = ours(w, x, dataclasses.replace(rule, descents=sweeps), grid)
    before = s * (codes[:d_in] - z)
    assert_same_rounding(got, (want, s * (want - z)), w, h)
    # In every column it falls, and the inputs' own error with it.
    of_column = lambda q: np.einsum("in,ij,jn->n", w - q, h, w - q)  # noqa: E731
    assert np.all(of_column(got[1]) <= of_column(before) * (1 + 1e-5))
    assert objective(w, got[1], h) < 0.97 * objective(w, before, h)


def test_descents_end_where_no_code_is_better():
    w, x = weight(64, 16), inputs(40, 64)
    grid = Grid(bits=3, group_size=32, scales="coded")
    fit = lambda sweeps: packed(w, x, SecondOrder(descents=sweeps), **dataclasses.asdict(grid))  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, fit(30), fit(31))


@pytest.mark.parametrize("how", [{}, {"act_order": True, "refits": 1}], ids=str)
def test_descents_are_the_same_numbers_compiled_or_not(how):
    w, x = jnp.asarray(weight(64, 16)), inputs(40, 64)
    gram = gram_blocks(moments_of(x), 64)
    rule, grid = SecondOrder(descents=2, **how), Grid(bits=3, group_size=32)
    run = partial(rule.round, grid=grid)
    jax.tree.map(np.testing.assert_array_equal, run(w, gram), jax.jit(run)(w, gram))


@pytest.mark.parametrize("descents", [-1, 101])
def test_a_number_of_descents_that_is_none(descents):
    with pytest.raises(ConfigError, match=f"descents: expected 0 .* got {descents}"):
        SecondOrder(descents=descents)


def equations(jaxpr):
    """How many, those of inner programs included."""
    total = len(jaxpr.eqns)
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(inner, "eqns"):
                total += equations(inner)
            elif hasattr(inner, "jaxpr"):
                total += equations(inner.jaxpr)
    return total


def traced(d_in, rule):
    w = jax.ShapeDtypeStruct((d_in, 64), jnp.float32)
    b = Reads(span=rule.span).block(d_in)
    gram = jax.ShapeDtypeStruct((d_in // b, b, b), jnp.float32)
    run = lambda w, gram: rule.round(w, gram, Grid(bits=3, group_size=32))  # noqa: E731
    return equations(jax.make_jaxpr(run)(w, gram).jaxpr)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"act_order": True},
        {"static_groups": False},
        {"span": 64},
        {"steps": 10},
        {"descents": 2},
    ],
    ids=str,
)
def test_the_program_does_not_grow_with_the_columns(how):
    rule = SecondOrder(**{**PUBLISHED, **how})
    size = traced(512, rule)
    # A sweep is the loop over rows once more.
    assert size <= (400 if "descents" in how else 300)
    assert traced(1024, rule) == size


def test_the_count_sees_into_loops():
    loop = lambda x: jax.lax.fori_loop(0, 9, lambda _, v: jnp.sin(v) + jnp.cos(v), x)  # noqa: E731
    inner = jax.make_jaxpr(loop)(1.0).jaxpr
    assert equations(inner) >= len(inner.eqns) + 3

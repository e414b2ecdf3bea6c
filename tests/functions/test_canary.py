"""What is read of jaxprs, by name: the first test to fail under a JAX that renames something."""

import jax
import jax.numpy as jnp
import pytest

from ttq_jax.functions.control import HANDLERS, scan_parts
from ttq_jax.functions.trace import called, opened, source_of

FIX = "JAX has changed a jaxpr; adapt ttq_jax/functions/trace.py and control.py"
X = jnp.ones((2, 3))


def equation(fn, name, *args):
    """The one equation of this primitive in a function's jaxpr."""
    found = [e for e in jax.make_jaxpr(fn)(*args).jaxpr.eqns if e.primitive.name == name]
    assert len(found) == 1, f"{FIX}: no {name!r}"
    return found[0]


def lengths(jaxpr):
    inner = opened(jaxpr)[0]
    return len(inner.invars), len(inner.outvars)


def test_scan():
    step = lambda c, x: ((c[0] + x * X[0], c[1]), x)  # noqa: E731
    eqn = equation(lambda c, xs: jax.lax.scan(step, c, xs), "scan", (X[0], X[1]), X)
    assert {"jaxpr", "length", "reverse", "unroll"} <= eqn.params.keys(), FIX
    n_consts, n_carry = scan_parts(eqn.params)
    assert n_consts + n_carry < len(eqn.invars), FIX
    assert lengths(eqn.params["jaxpr"])[0] == len(eqn.invars), FIX
    assert n_carry <= len(eqn.outvars), FIX


def test_while():
    y = jnp.ones(3)
    fn = lambda x: jax.lax.while_loop(lambda c: c.sum() < y.sum(), lambda c: c + y, x)  # noqa: E731
    eqn = equation(fn, "while", X[0])
    p = eqn.params
    assert {"cond_nconsts", "body_nconsts", "cond_jaxpr", "body_jaxpr"} <= p.keys(), FIX
    assert lengths(p["body_jaxpr"]) == (len(eqn.invars) - p["cond_nconsts"], len(eqn.outvars)), FIX


def test_cond():
    eqn = equation(lambda p, x: jax.lax.cond(p, jnp.sin, jnp.cos, x), "cond", True, X)
    assert [lengths(branch) for branch in eqn.params["branches"]] == [(1, 1), (1, 1)], FIX


@pytest.mark.parametrize(
    "wrap", [jax.jit, jax.checkpoint, jax.custom_jvp, jax.custom_vjp], ids=lambda w: w.__name__
)
def test_calls(wrap):
    inner = wrap(lambda x: x @ x.T)
    if wrap is jax.custom_jvp:
        inner.defjvps(lambda g, y, x: g @ x.T)
    if wrap is jax.custom_vjp:
        inner.defvjp(lambda x: (x, None), lambda saved, g: (g,))
    (eqn,) = jax.make_jaxpr(inner)(X).jaxpr.eqns
    assert called(eqn) is not None, f"{FIX}: {eqn.primitive.name} with {list(eqn.params)}"
    assert lengths(called(eqn)) == (1, 1), FIX


def test_products():
    eqn = equation(lambda x, y: jnp.einsum("bd,de->be", x, y), "dot_general", X, X.T)
    assert eqn.params["dimension_numbers"] == (((1,), (0,)), ((), ())), FIX
    ragged = lambda x, w, n: jax.lax.ragged_dot(x, w, n)  # noqa: E731
    names = {
        e.primitive.name
        for e in jax.make_jaxpr(ragged)(X, X[None].swapaxes(1, 2), jnp.array([2])).jaxpr.eqns
    }
    assert names & HANDLERS.keys(), f"{FIX}: ragged_dot makes {names}"


def test_views():
    indexed = equation(lambda w, i: w[i], "dynamic_slice", X, 1)
    assert indexed.params["slice_sizes"] == (1, 3), FIX
    assert equation(lambda w: jnp.split(w, 3, 1), "split", X).params.keys() >= {"sizes", "axis"}, (
        FIX
    )
    assert "permutation" in equation(lambda w: w.T, "transpose", X).params, FIX
    assert source_of(indexed).startswith("test_canary.py:"), f"{FIX}: {source_of(indexed)}"

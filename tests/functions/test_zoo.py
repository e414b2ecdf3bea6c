"""Odd ways to multiply a parameter: each is packed and run, or left dense with its reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from function_checks import both
from jax.sharding import PartitionSpec as P
from zoo import X, Zoo, matrix

import ttq_jax as ttq
from ttq_jax.linear import dense_weight

ZOO = Zoo()
case = ZOO.case
W = {"a": matrix(3, 32, 32), "b": matrix(4, 32, 32)}


@case(("a",), ("b",))
def vmapped():
    return lambda w, x: jax.vmap(lambda r: jnp.tanh(r @ w["a"]) @ w["b"])(x), W, X


@case(("a",), ("b",))
def kernel_on_the_left():
    return (
        lambda w, x: jnp.einsum(
            "dk,btd->kbt", w["a"], jnp.tanh(jnp.einsum("kd,btd->btk", w["b"], x))
        ),
        W,
        X,
    )


@case(("a",), ("b",))
def fori_loop():
    return lambda w, x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w["a"]), x) @ w["b"], W, X


@case(("a",), ("b",))
def while_loop():
    def fn(w, x):
        go = lambda c: c[0] < 3  # noqa: E731
        return (
            jax.lax.while_loop(go, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w["a"])), (0, x))[1]
            @ w["b"]
        )

    return fn, W, X


@case(("a",), ("b",))
def cond():
    def fn(w, x):
        y = jax.lax.cond(x.sum() > 0, lambda x: x @ w["a"], lambda x: x @ w["b"], x)
        return y + jax.lax.cond(x.sum() <= 0, lambda x: x @ w["a"], lambda x: x @ w["b"], x)

    return fn, W, X


@case(("a",), dense={"b": "no product"})
def parameters_in_the_carry():
    def fn(w, x):
        step = lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0]["a"])), None)  # noqa: E731
        return jax.lax.scan(step, (w, x), None, length=3)[0][1]

    return fn, W, X


@case(("b",), dense={"a": "carry that it changes"})
def a_parameter_that_a_loop_changes():
    def fn(w, x):
        step = lambda c, _: ((0.5 * c[0], jnp.tanh(c[1] @ c[0])), None)  # noqa: E731
        return jax.lax.scan(step, (w["a"], x), None, length=2)[0][1] @ w["b"]

    return fn, W, X


@case(("a",), ("b",))
def custom_jvp():
    return lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], W, X


@jax.custom_vjp
def times(w, x):
    return x @ w


times.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (g, g))


@case(("a",), ("b",))
def custom_vjp():
    return lambda w, x: times(w["a"], x) @ w["b"], W, X


@case(("b",), dense={"a": "shard_map"})
def shard_map():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    inner = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    return lambda w, x: inner(w["a"], x) @ w["b"], W, X


@case(("b",), dense={"a": "two ways"})
def read_in_two_ways():
    return lambda w, x: jnp.tanh(x @ w["a"]) @ w["a"].T @ w["b"], W, X


@case(("b",), dense={"a": "two ways"})
def a_gradient_inside():
    return lambda w, x: jax.grad(lambda x: jnp.square(x @ w["a"]).sum())(x) @ w["b"], W, X


@case(("b",), dense={"a": "fewer than 8 channels"})
def a_scale_as_a_batched_product():
    w = W | {"a": matrix(5, 32, 4)}
    return lambda w, x: jnp.einsum("btd,dk->btdk", x, w["a"]).sum(-1) @ w["b"], w, X


@case(("b",), dense={"a": "concatenate"})
def two_kernels_put_together():
    w = W | {"c": matrix(5, 32, 32)}
    return (
        lambda w, x: (x @ jnp.concatenate([w["a"], w["c"]], 1))[..., :32] @ w["b"], w, X,
    )  # fmt: skip


STACK = {"w": matrix(6, 3, 32, 32), "b": matrix(7, 32, 32)}


@case(("w",), ("b",))
def a_stack_indexed_by_a_loop():
    def fn(w, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w["w"][i]), x) @ w["b"]

    return fn, STACK, X


@case(("w",), ("b",))
def a_stack_indexed_by_a_traced_number_in_two_spellings():
    def fn(w, x):
        i = jnp.argmax(x[0, 0, :3])
        y = jnp.tanh(x @ jax.lax.dynamic_index_in_dim(w["w"], i, 0, keepdims=False))
        return y @ w["w"][i] @ w["b"]

    return fn, STACK, X


@case(("u", "w"), ("b",))
def two_stacks_indexed_by_one_number_share_an_input():
    def fn(w, x):
        step = lambda i, x: jnp.tanh(x @ w["w"][i] * (x @ w["u"][i]))  # noqa: E731
        return jax.lax.fori_loop(0, 3, step, x) @ w["b"]

    return fn, STACK | {"u": matrix(9, 3, 32, 32)}, X


@case(("b",), dense={"w": "gather"})
def gathered_experts():
    def fn(w, x):
        chosen = w["w"][jnp.argmax(x[:, 0, :3], axis=-1)]
        return jnp.einsum("btd,bdf->btf", x, chosen) @ w["b"]

    return fn, STACK, X


@case(("w",), ("b",))
def scanned_backwards_over_another_axis():
    w = STACK | {"w": jnp.moveaxis(STACK["w"], 0, 1)}

    def fn(w, x):
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.moveaxis(w["w"], 1, 0), reverse=True)[0] @ w["b"]

    return fn, w, X


@case(("w",), ("b",))
def a_scan_in_a_scan():
    w = {"w": matrix(8, 2, 2, 32, 32), "b": W["b"]}

    def fn(w, x):
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        outer = lambda x, w: (jax.lax.scan(step, x, w)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, w["w"])[0] @ w["b"]

    return fn, w, X


@case(("w",), ("b",))
def a_branch_in_a_scan():
    def fn(w, x):
        def step(x, w):
            return jax.lax.cond(x.sum() < 1e6, lambda x: jnp.tanh(x @ w.T), jnp.tanh, x), None

        return jax.lax.scan(step, x, w["w"])[0] @ w["b"]

    return fn, STACK, X


@case(("w",), ("b",))
def layers_scanned_for_each_token():
    def fn(w, x):
        layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        token = lambda _, x: (None, jax.lax.scan(layer, x, w["w"])[0] @ w["b"])  # noqa: E731
        return jax.lax.scan(token, None, x.swapaxes(0, 1))[1]

    return fn, STACK, X


@case(("w",), ("b",))
def one_stack_scanned_twice():
    def fn(w, x):
        layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        for _ in range(2):
            x = jax.lax.scan(layer, x, w["w"])[0]
        return x @ w["b"]

    return fn, STACK, X


@case(("b",), dense={"w": "what a traced number chose"})
def a_scan_over_what_a_traced_number_chose():
    w = {"w": matrix(8, 2, 2, 32, 32), "b": W["b"]}

    def fn(w, x):
        layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(layer, x, w["w"][jnp.argmax(x[0, 0, :2])])[0] @ w["b"]

    return fn, w, X


@case(("a",), ("b",))
def one_row_without_any_axis():
    return lambda w, x: jnp.tanh(x[0, 0] @ w["a"]) @ w["b"], W, X


@pytest.mark.parametrize("name", ZOO)
def test_a_construction(name):
    ZOO.check(name)


def test_a_kernel_that_is_read_again_has_the_sum_of_its_moments():
    def once(w, x):
        return jnp.tanh(x @ w["a"])

    recipe = ttq.preset("ttq")
    seen = ttq.observe(lambda w, x: once(w, once(w, x)), recipe)
    observed = jax.jit(lambda w, x: seen(w, x)[1])(W, X)
    first = ttq.observe(once, recipe)(W, X)[1]
    second = ttq.observe(once, recipe)(W, once(W, X))[1]
    (site,), (both,) = observed.sites, (first + second).sites
    np.testing.assert_allclose(site.moments.sums, both.moments.sums, rtol=1e-5)
    assert float(site.moments.count) == float(both.moments.count) == 32


def test_sums_that_are_wanted_in_float32_are_not_rounded_to_bfloat16():
    w, x = {"a": W["a"].astype(jnp.bfloat16)}, X.astype(jnp.bfloat16)
    fn = lambda w, x: jnp.matmul(x, w["a"], preferred_element_type=jnp.float32)  # noqa: E731
    _, packed, y = both(fn, w, x)
    assert y.dtype == jnp.float32
    assert not np.array_equal(y, y.astype(jnp.bfloat16).astype(jnp.float32))
    exact = np.asarray(x, np.float32) @ np.asarray(dense_weight(packed["a"].views[0]))
    # D divides the bfloat16 activation in float32.
    np.testing.assert_allclose(y, exact, atol=1e-4)

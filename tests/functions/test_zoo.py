"""Odd ways to multiply a parameter: each is packed and run, or left dense with its reason."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from function_checks import both, check, sites
from jax.sharding import PartitionSpec as P

import ttq_jax as ttq
from ttq_jax.linear import dense_weight

X = jax.random.normal(jax.random.key(0), (2, 8, 32)) * jnp.exp(
    jax.random.normal(jax.random.key(1), (32,))
)
INIT = nn.initializers.lecun_normal()
ZOO = {}


def case(*found, dense=None, **how):
    """Registers a construction: the sites that it has, and what stays dense with a reason."""

    def add(make):
        ZOO[make.__name__] = (make, list(found), dense or {}, how)
        return make

    return add


def linen(body):
    """(apply, variables, x) of a Linen module with this body."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return body(self, x)

    model = Model()
    return model.apply, model.init(jax.random.key(2), X), X


def matrix(key, *shape):
    return jax.random.normal(jax.random.key(key), shape) * shape[-2] ** -0.5


def module(model, *args):
    """(fn, params, args) of an NNX module without other state."""
    fn, params, rest = ttq.functional(model)
    return (lambda p, *args: fn(p, rest, *args)[0]), params, *(args or (X,))


# Linen ------------------------------------------------------------------------------------------
@case(("params/a/kernel", "params/b/kernel"), ("params/c/kernel",))
def two_layers_of_one_input():
    return linen(
        lambda m, x: nn.Dense(32, name="c")(
            nn.silu(nn.Dense(48, name="a")(x)) * nn.Dense(48, name="b")(x)
        )
    )


@case(("params/a/kernel", "params/b/kernel"), tolerance=5e-3)
def two_bfloat16_layers_that_each_cast_the_input():
    how = {"dtype": jnp.bfloat16}
    return linen(lambda m, x: nn.Dense(32, name="a", **how)(x) + nn.Dense(32, name="b", **how)(x))


@case(("params/w",))
def transposed():
    return linen(lambda m, x: x @ m.param("w", INIT, (48, 32)).T)


@case(("params/w",))
def slices_of_a_stack():
    def body(m, x):
        w = m.param("w", INIT, (2, 32, 48))
        return nn.silu(x @ w[0]) * (x @ w[1])

    return linen(body)


@case(("params/w",))
def split_after_the_fact():
    def body(m, x):
        a, b = jnp.split(m.param("w", INIT, (32, 96)), 2, axis=-1)
        return (x @ a) * (x @ b)

    return linen(body)


@case(("params/w",))
def split_and_merged_heads():
    def body(m, x):
        w = m.param("w", INIT, (32, 64)).reshape(32, 4, 16)
        return jnp.einsum("btd,dnh->btnh", x, w)

    return linen(body)


@case(("params/d/kernel",))
def one_layer_three_times():
    def body(m, x):
        d = nn.Dense(32, name="d")
        for _ in range(3):
            x = jnp.tanh(d(x))
        return x

    return linen(body)


@case(("params/d/kernel",), dense={"params/w": "tanh"})
def a_weight_that_is_computed():
    return linen(lambda m, x: nn.Dense(32, name="d")(x @ jnp.tanh(m.param("w", INIT, (32, 32)))))


@case(("params/d/kernel",), dense={"params/a": "dot_general", "params/w": "add"})
def low_rank_adapters_that_are_added():
    def body(m, x):
        a, b = m.param("a", INIT, (32, 4)), m.param("b", INIT, (4, 32))
        return nn.Dense(32, name="d")(x @ (m.param("w", INIT, (32, 32)) + a @ b))

    return linen(body)


@case(("params/d/kernel",), dense={"params/inner/kernel": ""})
def weight_norm():
    return linen(lambda m, x: nn.Dense(32, name="d")(nn.WeightNorm(nn.Dense(32, name="inner"))(x)))


@case(("params/d/kernel",), dense={"params/conv/kernel": "conv_general_dilated"})
def convolution():
    return linen(lambda m, x: nn.Dense(16, name="d")(nn.Conv(32, (3,), name="conv")(x)))


@case(("params/d/kernel",), dense={"params/table/embedding": "gather"}, select=".*")
def a_tied_table():
    def body(m, x):
        table = nn.Embed(40, 32, name="table")
        x = x + table(jnp.arange(8))
        return table.attend(nn.Dense(32, name="d")(x))

    return linen(body)


@case(
    ("params/d/kernel",),
    dense={"params/lm_head/kernel": "lm_head", "params/router/kernel": "router"},
)
def names_of_tables_and_routers():
    def body(m, x):
        x = nn.Dense(32, name="d")(x) * nn.Dense(1, name="router")(x)
        return nn.Dense(40, name="lm_head")(x)

    return linen(body)


@case(("params/down",), ("params/up",))
def experts_by_einsum():
    def body(m, x):
        gates = jax.nn.softmax(nn.Dense(4, name="router", use_bias=False)(x))
        up, down = m.param("up", INIT, (4, 32, 48)), m.param("down", INIT, (4, 48, 32))
        rows = jnp.einsum("bte,btd->ebtd", (gates > 0.2).astype(x.dtype), x).reshape(4, -1, 32)
        h = jnp.einsum("ecf,efd->ecd", nn.silu(jnp.einsum("ecd,edf->ecf", rows, up)), down)
        return jnp.einsum("ebtd,bte->btd", h.reshape(4, *x.shape), gates)

    return linen(body)


@case(("params/gate", "params/up"), ("params/down",))
def experts_by_ragged_dot():
    def body(m, x):
        shape = (4, 32, 48)
        gate, up = m.param("gate", INIT, shape), m.param("up", INIT, shape)
        down, sizes = m.param("down", INIT, (4, 48, 32)), jnp.array([6, 0, 7, 2])
        dot, x = jax.lax.ragged_dot, x.reshape(16, 32)
        return dot(nn.silu(dot(x, gate, sizes)) * dot(x, up, sizes), down, sizes)

    return linen(body)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(h)
        return x + nn.Dense(32, name="down")(
            nn.gelu(nn.Dense(48, name="up")(nn.LayerNorm()(x)))
        ), None


@case(
    tuple(f"params/layers/attention/{n}/kernel" for n in ("key", "query", "value")),
    ("params/layers/attention/out/kernel",), ("params/layers/down/kernel",),
    ("params/layers/up/kernel",),
)  # fmt: skip
def linen_layers_scanned_and_rematerialized():
    def body(m, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
        return nn.scan(nn.remat(Block), **axes)(name="layers")(x, None)[0]

    return linen(body)


# NNX --------------------------------------------------------------------------------------------
class Layer(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(32, 48, rngs=rngs), nnx.Linear(48, 32, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return x + self.down(nnx.silu(self.up(x)))


class Scanned(nnx.Module):
    def __init__(self, remat):
        make = nnx.vmap(Layer, in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=2)(make)(nnx.Rngs(0))
        self.remat = remat

    def __call__(self, x):
        apply = lambda layer, x: layer(x)  # noqa: E731
        apply = nnx.remat(apply) if self.remat else apply

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            return apply(layer, x)

        return through(x, self.layers)


LAYER = (
    tuple(f"layers/attention/{name}/kernel" for name in ("key", "query", "value")),
    ("layers/attention/out/kernel",), ("layers/down/kernel",), ("layers/up/kernel",),
)  # fmt: skip


@case(*LAYER)
def nnx_layers_scanned():
    return module(Scanned(False))


@case(*LAYER)
def nnx_layers_scanned_rematerialized_and_returned():
    graph, params, rest = nnx.split(Scanned(True), nnx.Param, ...)

    def fn(params, x):
        model = nnx.merge(graph, params, rest)
        return model(x), nnx.state(model)

    return fn, params, X


class Ensemble(nnx.Module):
    def __init__(self):
        make = nnx.vmap(lambda rngs: nnx.Linear(32, 16, rngs=rngs), in_axes=0, out_axes=0)
        self.members = nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None), out_axes=0)(self.members, x)


@case(("members/kernel",))
def nnx_ensemble():
    return module(Ensemble())


@case(("kernel",))
def nnx_einsum():
    return module(nnx.Einsum("btd,dnh->btnh", (32, 4, 8), rngs=nnx.Rngs(0)))


@case(("kernel",))
def two_axes_contracted():
    return module(nnx.LinearGeneral((8, 32), (4, 16), axis=(1, 2), rngs=nnx.Rngs(0)))


# Plain JAX --------------------------------------------------------------------------------------
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
    make, found, dense, how = ZOO[name]
    tolerance = how.pop("tolerance", 2e-5)
    fn, params, *args = make()
    table = ttq.kernels(fn, **how)(params, *args)
    assert sorted(sites(table)) == sorted(found)
    reasons = {row.path: row.dense for row in table if row.dense}
    for path, why in dense.items():
        assert why in reasons[path]
    check(fn, params, *args, tolerance=tolerance, **how)


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

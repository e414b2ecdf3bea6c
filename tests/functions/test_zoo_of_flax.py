"""Odd ways in which Flax modules multiply a parameter; those of plain JAX are in `test_zoo`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from zoo import X, Zoo

import ttq_jax as ttq

INIT = nn.initializers.lecun_normal()
ZOO = Zoo()
case = ZOO.case


def linen(body):
    """(apply, variables, x) of a Linen module with this body."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return body(self, x)

    model = Model()
    return model.apply, model.init(jax.random.key(2), X), X


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
    dense={
        "params/lm_head/kernel": "lm_head", "params/router/kernel": "router",
        "params/unembed/kernel": "unembed",
    },
)  # fmt: skip
def names_of_tables_and_routers():
    def body(m, x):
        x = nn.Dense(32, name="d")(x) * nn.Dense(1, name="router")(x)
        return nn.Dense(40, name="lm_head")(x) + nn.Dense(40, name="unembed")(x)

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


@pytest.mark.parametrize("name", ZOO)
def test_a_construction(name):
    ZOO.check(name)

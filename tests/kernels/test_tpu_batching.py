"""What vmap, scan, jit and grad make of the kernels: simulated ones and plain XLA alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from packed_weights import oracle_weight
from tpu_cases import f64, rounded

import pallas_kernels
from pallas_kernels import CodedScales
from pallas_kernels.layout import pack

BOTH = pytest.mark.parametrize("implementation", ["interpret", "xla"])
BITS, GROUP, K, N, LAYERS, BATCH = 4, 32, 64, 136, 3, 2


def whole_x(*lead):
    rng = np.random.default_rng(7)
    return jnp.asarray(rng.integers(-4, 5, (*lead, K)), jnp.bfloat16)


def whole_weights(*lead):
    """(float64 weights, (planes, scales, zeros)): products with whole numbers are exact."""
    rng = np.random.default_rng(8)
    codes = rng.integers(0, 2**BITS, (*lead, K, N), dtype=np.uint8)
    scales = 2.0 ** rng.integers(-1, 2, (*lead, K // GROUP, N))
    zeros = rng.integers(0, 2**BITS, scales.shape, dtype=np.uint8)
    weight, _ = oracle_weight(codes, scales, zeros, BITS, GROUP)
    packed = pack(jnp.asarray(codes), bits=BITS), jnp.asarray(scales, jnp.bfloat16)
    return weight, (*packed, jnp.asarray(zeros))


def multiply(implementation):
    def call(x, packed, layer):
        return pallas_kernels.packed_matmul(
            x, *packed, bits=BITS, group_size=GROUP, layer=layer, implementation=implementation
        )

    return call


def count(jaxpr, name):
    """Primitives of a name in a jaxpr, and in all that it calls; not inside kernels."""
    found = 0
    for eqn in jaxpr.eqns:
        found += eqn.primitive.name == name
        if eqn.primitive.name != "pallas_call":
            found += sum(count(inner, name) for inner in jaxprs_in_params(eqn.params))
    return found


def kernels_and_loops(f, *arguments):
    jaxpr = jax.make_jaxpr(f)(*arguments).jaxpr
    return count(jaxpr, "pallas_call"), count(jaxpr, "scan") + count(jaxpr, "while")


def check(y, x, weight):
    np.testing.assert_array_equal(f64(y), rounded(np.matmul(f64(x), weight), y.dtype))


@BOTH
@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (0, None, 0)])
def test_coded_weights_are_batched_as_others(implementation, axes):
    weight, (planes, scales, zeros) = whole_weights(*(BATCH,) * (axes[1] == 0), LAYERS)
    columns = jnp.full((*scales.shape[:-2], N), 0.5, jnp.bfloat16)
    coded = CodedScales((2 * scales).astype(jnp.uint8), columns)
    x = whole_x(BATCH, 2) if axes[0] == 0 else whole_x(2)
    layer = jnp.asarray([2, 0]) if axes[2] == 0 else jnp.asarray(1)
    run = jax.jit(jax.vmap(multiply(implementation), axes))
    y = run(x, (planes, coded, zeros << (8 - BITS)), layer)
    for i in range(BATCH):
        one = (weight[i] if axes[1] == 0 else weight)[layer[i] if axes[2] == 0 else layer]
        check(y[i], x[i] if axes[0] == 0 else x, one)


@BOTH
def test_a_batch_of_activations_is_more_rows(implementation):
    weight, packed = whole_weights(LAYERS)
    x = whole_x(3, BATCH, 2)
    one = functools.partial(multiply(implementation), packed=packed, layer=1)
    nested = jax.vmap(jax.vmap(one))
    check(jax.jit(nested)(x), x, weight[1])
    if implementation == "interpret":
        for f in (jax.vmap(one, 1, 1), jax.vmap(one)):
            check(jax.jit(f)(x), x, weight[1])
        for f in (nested, jax.vmap(one, 1, 1), jax.vmap(one)):
            assert kernels_and_loops(f, x) == (1, 0), "folded into one call, however deep"


# Which of x, weights and layer have a batch axis.
@BOTH
@pytest.mark.parametrize("axes", [(None, None, 0), (0, None, 0), (None, 0, None), (0, 0, 0)])
def test_a_batch_of_weights_or_layers(implementation, axes):
    over_x, over_weights, over_layer = (axis is not None for axis in axes)
    x = whole_x(BATCH, 3) if over_x else whole_x(3)
    weight, packed = whole_weights(*([BATCH] if over_weights else []), LAYERS)
    layer = jnp.asarray([2, 0]) if over_layer else jnp.asarray(2)
    f = jax.vmap(multiply(implementation), axes)
    y = jax.jit(f)(x, packed, layer)
    layers = np.broadcast_to(layer, BATCH)
    weight = np.stack([
        (weight[i] if over_weights else weight)[layers[i]] for i in range(BATCH)
    ])  # fmt: skip
    check(y, x if over_x else x[None], weight)
    if implementation == "interpret":
        assert kernels_and_loops(f, x, packed, layer) == (1, 1), "one loop, no copy of a weight"


@BOTH
def test_nested_over_weights_layers_and_activations(implementation):
    weight, packed = whole_weights(BATCH, LAYERS)
    x, layers = whole_x(5, BATCH, 2), jnp.asarray([2, 0, 1, 1])
    f = multiply(implementation)
    f = jax.vmap(f, (None, None, 0))
    f = jax.vmap(f, (0, 0, None))
    f = jax.vmap(f, (0, None, None))
    y = jax.jit(f)(x, packed, layers)
    assert y.shape == (5, BATCH, 4, 2, N)
    check(y, x[:, :, None], weight[:, np.asarray(layers)][None])


@BOTH
def test_stacks_without_layers_under_vmap(implementation):
    weight, packed = whole_weights(BATCH)
    x = whole_x(BATCH, 3)
    f = jax.vmap(functools.partial(multiply(implementation), layer=None))
    check(jax.jit(f)(x, packed), x, weight)


@BOTH
def test_a_scan_over_layers_is_the_loop(implementation):
    weight, packed = whole_weights(LAYERS)
    x = whole_x(3)
    one = multiply(implementation)

    def scanned(x, packed):
        def step(carry, layer):
            # Signs keep the next layer's activations whole and small.
            y = one(carry, packed, layer)
            return jnp.sign(y[:, :K]), y

        return jax.lax.scan(step, x, jnp.arange(LAYERS))[1]

    y = jax.jit(scanned)(x, packed)
    carry, single = x, jax.jit(one)
    for layer in range(LAYERS):
        check(y[layer], carry, weight[layer])
        np.testing.assert_array_equal(f64(y[layer]), f64(single(carry, packed, layer)))
        carry = jnp.sign(y[layer, :, :K])
    if implementation == "interpret":
        assert kernels_and_loops(scanned, x, packed) == (1, 1)
    # And many prompts, each through all layers.
    prompts = jnp.stack([x, -x])
    many = jax.jit(jax.vmap(scanned, (0, None)))(prompts, packed)
    np.testing.assert_array_equal(f64(many[0]), f64(y))


def whole_weight(*lead):
    """Both ends of a symmetric 3-bit grid of step 1 are in every group."""
    w = np.random.default_rng(9).integers(-3, 4, (*lead, K, N))
    w[..., ::GROUP, :], w[..., 1::GROUP, :] = -3, 3
    return jnp.asarray(w, jnp.bfloat16)


KIND = {"bits": 3, "group_size": GROUP, "zero_point": "none", "store_dtype": "bfloat16"}


@BOTH
@pytest.mark.parametrize("axes", [(0, None), (0, 0), (None, 0)])
def test_a_batch_of_weights_is_packed(implementation, axes):
    lead = [[BATCH] if axis == 0 else [] for axis in axes]
    w = whole_weight(*lead[0])
    d = jnp.asarray(2.0 ** np.random.default_rng(1).integers(-1, 2, (*lead[1], K)), jnp.float32)

    def one(w, d):
        return pallas_kernels.quantize_pack(w, d, **KIND, implementation=implementation)

    packed = jax.jit(jax.vmap(one, axes))(w, d)
    for i in range(BATCH):
        want = pallas_kernels.quantize_pack(
            w[i] if lead[0] else w, d[i] if lead[1] else d, **KIND, implementation="xla"
        )
        for got, other in zip(jax.tree.leaves(packed), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(got[i], other)


@BOTH
@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (0, None, 0)])
def test_a_batch_of_prompts_or_layers_is_prefilled(implementation, axes):
    x = whole_x(BATCH, 3) if axes[0] == 0 else whole_x(3)
    w = whole_weight(BATCH, 2) if axes[1] == 0 else whole_weight(2)
    layer = jnp.asarray([1, 0]) if axes[2] == 0 else jnp.asarray(1)

    def one(x, w, layer):
        return pallas_kernels.prefill_quantize(
            x, w, **KIND, quantized=True, layer=layer, implementation=implementation
        )

    y, packed = jax.jit(jax.vmap(one, axes))(x, w, layer)
    for i in range(BATCH):
        chosen = (w[i] if axes[1] == 0 else w)[layer[i] if axes[2] == 0 else layer]
        check(y[i], x[i] if axes[0] == 0 else x, f64(chosen))
        mine = jax.tree.map(lambda a, i=i: a[i], packed)
        back = pallas_kernels.dequantize(*mine, bits=3, group_size=GROUP)
        np.testing.assert_array_equal(back, chosen.astype(jnp.float32))


@BOTH
def test_a_gradient_is_refused_and_says_what_to_do(implementation):
    _, packed = whole_weights(LAYERS)
    one = multiply(implementation)
    w = whole_weight()

    def loss_of_x(x):
        return jnp.sum(one(x, packed, 1).astype(jnp.float32))

    def loss_of_scales(scales):
        return jnp.sum(one(whole_x(2), (packed[0], scales, packed[2]), 1).astype(jnp.float32))

    def loss_of_weight(w):
        _, scales, _ = pallas_kernels.quantize_pack(w, **KIND, implementation=implementation)
        return jnp.sum(scales.astype(jnp.float32))

    def loss_of_prompt(x):
        y, _ = pallas_kernels.prefill_quantize(x, w, **KIND, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32))

    for name, loss, at in (
        ("packed_matmul", loss_of_x, whole_x(2)),
        ("packed_matmul", loss_of_scales, packed[1]),
        ("packed_matmul", jax.jit(jax.vmap(loss_of_x)), whole_x(3, 2)),
        ("quantize_pack", loss_of_weight, w),
        ("prefill_quantize", loss_of_prompt, whole_x(2)),
    ):
        message = rf"{name} has no gradient.*pallas_kernels\.dequantize"
        with pytest.raises(TypeError, match=message):
            jax.grad(lambda a, loss=loss: jnp.sum(loss(a)))(at)
        with pytest.raises(TypeError, match=message):
            jax.jvp(loss, (at,), (jnp.ones_like(at),))


@BOTH
def test_what_needs_no_gradient_may_stand_beside_what_does(implementation):
    """A packed layer inside a differentiated function is fine behind stop_gradient."""
    weight, packed = whole_weights(LAYERS)
    one = multiply(implementation)

    def loss(a):
        x = jax.lax.stop_gradient(whole_x(2) * a)
        return a.astype(jnp.float32) * jnp.sum(one(x, packed, 1).astype(jnp.float32))

    got = jax.grad(loss)(jnp.ones((), jnp.bfloat16))
    y = rounded(f64(whole_x(2)) @ weight[1], jnp.bfloat16)
    np.testing.assert_allclose(f64(got), y.sum(), rtol=2**-8, atol=2**-16 * np.abs(y).sum())


@BOTH
def test_activations_of_no_rows(implementation):
    _, packed = whole_weights(LAYERS)
    assert multiply("xla")(whole_x(0), packed, 1).shape == (0, N)
    y = jax.vmap(multiply(implementation), (0, None, None))(whole_x(1, 1), packed, 1)
    assert y.shape == (1, 1, N)

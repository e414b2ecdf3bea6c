"""The public calls: what they refuse, in words, and that the CPU's default is the reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_weights import EPS, oracle_weight, random_weight

import pallas_kernels
from pallas_kernels import dispatch, pack, packed_matmul, prefill_quantize, quantize_pack, reference
from pallas_kernels.problem import rounding_problem

BITS, GROUP, K, N, RANK = 4, 16, 48, 24, 3
CODES, SCALES, ZEROS = random_weight(0, BITS, GROUP, K // GROUP, N)
PLANES = pack(jnp.asarray(CODES), bits=BITS)
RNG = np.random.default_rng(1)
X = jnp.asarray(RNG.standard_normal((5, K)), jnp.float32)
W = jnp.asarray(RNG.standard_normal((K, N)), jnp.float32)
D = jnp.asarray(RNG.uniform(0.5, 2, K), jnp.float32)
A = jnp.asarray(RNG.standard_normal((K, RANK)), jnp.float32)
B = jnp.asarray(RNG.standard_normal((RANK, N)), jnp.float32)
LAYERS = jax.tree.map(lambda a: jnp.stack([a] * 2), (PLANES, SCALES, ZEROS))


def multiply(x=X, planes=PLANES, scales=SCALES, zeros=ZEROS, channel_scale=None, low_rank=None,
             **options):  # fmt: skip
    options = {"bits": BITS, "group_size": GROUP} | options
    return packed_matmul(x, planes, scales, zeros, channel_scale, low_rank, **options)


def kind(**options):
    return {"bits": BITS, "group_size": GROUP, "zero_point": "float", "store_dtype": "float32",
            } | options  # fmt: skip


def quantizers():
    return {"quantize_pack": quantize_pack, "prefill_quantize": partial(prefill_quantize, X)}


def raises(parts, call, *args, **options):
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"bits": 6}, ["bits", "[2, 3, 4, 5, 8]", "got 6", "choose"]),
        ({"bits": 3}, ["planes", "tuple of 2", "got 1", "pass what pack returned"]),
        ({"planes": (SCALES,)}, ["planes", "uint8", "float32[3, 24]", "pass what pack returned"]),
        ({"planes": (PLANES[0][None],), "scales": SCALES[None], "zeros": ZEROS[None]},
         ["planes", "2 axes without a layer", "[1, 24, 24]", "pass layer="]),
        ({"layer": 0}, ["planes", "3 axes with a layer", "[24, 24]", "pass layer="]),
        ({"group_size": 12}, ["group_size", "multiple of 8", "got 12"]),
        ({"group_size": 0}, ["group_size", "multiple of 8", "got 0"]),
        ({"group_size": 32}, ["multiple of group_size 32", "got 48", "choose a group size"]),
        ({"scales": SCALES[:2]}, ["scales", "(3, 24)", "(2, 24)", "keep together"]),
        ({"scales": SCALES.astype(jnp.int32)}, ["scales", "float32, bfloat16", "int32", "cast"]),
        ({"zeros": ZEROS[:, :3]}, ["zeros", "(3, 24)", "(3, 3)", "keep together"]),
        ({"zeros": ZEROS.astype(jnp.int8)}, ["zeros", "uint8", "got int8", "cast"]),
        ({"x": X[:, :20]}, ["x", "[..., 48]", "float32[5, 20]", "as many channels"]),
        ({"x": jnp.zeros(())}, ["x", "[..., 48]", "float32[]"]),
        ({"x": jnp.zeros((2, 49))}, ["x", "[..., 48]", "float32[2, 49]"]),
        ({"x": jnp.zeros((2, K), jnp.int32)}, ["x", "floating", "int32[2, 48]"]),
        ({"channel_scale": D[:40]}, ["channel_scale", "(48,)", "(40,)"]),
        ({"channel_scale": D.astype(jnp.int32)}, ["channel_scale", "float32", "int32"]),
        ({"low_rank": (A[:40], B)}, ["low_rank's A", "(48, 3)", "(40, 3)"]),
        ({"low_rank": (A, B[:2])}, ["low_rank's B", "(3, 24)", "(2, 24)"]),
        ({"low_rank": (A, B[:, :7])}, ["low_rank's B", "(3, 24)", "(3, 7)"]),
        ({"implementation": "cuda"}, ["implementation", "triton", "got 'cuda'"]),
        ({"implementation": "tpu"}, ["cannot serve", "TPU", "CPU", "implementation=None"]),
    ],
)  # fmt: skip
def test_packed_matmul_says_what_does_not_fit(changes, parts):
    raises(parts, multiply, **changes)


@pytest.mark.parametrize("name", ["quantize_pack", "prefill_quantize"])
@pytest.mark.parametrize(
    ("changes", "operands", "parts"),
    [
        ({"bits": 7}, {}, ["bits", "[2, 3, 4, 5, 8]", "got 7"]),
        ({"group_size": 20}, {}, ["group_size", "multiple of 8", "got 20"]),
        ({"group_size": -1}, {}, ["group_size", "multiple of 8", "got -1"]),
        ({"zero_point": "int"}, {}, ["zero_point", "none, float, integer", "'int'"]),
        ({"store_dtype": "int8"}, {}, ["store_dtype", "bfloat16", "int8"]),
        ({"shrinks": ()}, {}, ["shrinks", "(0, 1]", "got ()"]),
        ({"shrinks": (1.0, 1.5)}, {}, ["shrinks", "(0, 1]", "1.5", "1 is the full range"]),
        ({"shrinks": (0.0,)}, {}, ["shrinks", "(0, 1]", "0.0"]),
        ({"refits": -1}, {}, ["refits", "0 (none) to 100", "got -1", "2 to 4"]),
        ({"refits": 101}, {}, ["refits", "0 (none) to 100", "got 101"]),
        ({"layer": 0}, {}, ["w", "3 axes with a layer", "[48, 24]", "pass layer="]),
        ({}, {"channel_scale": D[:3]}, ["channel_scale", "(48,)", "(3,)"]),
        ({}, {"importance": D[:3]}, ["importance", "(48,)", "(3,)"]),
        ({}, {"low_rank": (A, B[:2])}, ["low_rank's B", "(3, 24)", "(2, 24)"]),
        ({"implementation": "cuda"}, {}, ["implementation", "triton", "'cuda'"]),
        ({"implementation": "triton"}, {}, ["cannot serve", "GPU", "CPU", "implementation=None"]),
    ],
)
def test_the_quantizers_say_what_does_not_fit(name, changes, operands, parts):
    raises(parts, quantizers()[name], W, **operands, **kind(**changes))


def test_weights_and_activations_of_other_shapes_are_refused():
    for call in quantizers().values():
        raises(["w", "2 axes without", "[1, 48, 24]", "layer="], call, W[None], **kind())
        raises(["w", "float32", "int32", "cast"], call, W.astype(jnp.int32), **kind())
    for x in (X[:, :40], jnp.zeros(()), X.astype(jnp.int32)):
        raises(["x", "[..., 48]", f"{x.dtype}{list(x.shape)}", "as many channels"],
               prefill_quantize, x, W, **kind())  # fmt: skip


@pytest.mark.parametrize("layer", [2, -1])
def test_a_layer_that_there_is_not_is_never_read(layer):
    planes, scales, zeros = LAYERS
    raises(["layer", "0 to 1", f"got {layer}"], multiply, X, planes, scales, zeros, layer=layer)
    for call in quantizers().values():
        raises(["layer", "0 to 1", f"got {layer}"], call, W[None].repeat(2, 0),
               **kind(layer=layer))  # fmt: skip


def test_a_layer_is_one_integer():
    planes, scales, zeros = LAYERS
    for layer in (jnp.zeros(2, jnp.int32), jnp.zeros(())):
        raises(["layer", "one integer", f"{layer.dtype}{list(layer.shape)}", "vmap"],
               multiply, X, planes, scales, zeros, layer=layer)  # fmt: skip


@pytest.mark.parametrize("call", ["packed_matmul", "quantize_pack", "prefill_quantize"])
def test_a_gradient_is_refused_by_name(call):
    losses = {
        "packed_matmul": lambda x: multiply(x).sum(),
        "quantize_pack": lambda w: quantize_pack(w, **kind())[1].sum(),
        "prefill_quantize": lambda w: prefill_quantize(X, w, **kind())[0].sum(),
    }
    with pytest.raises(TypeError, match=f"{call} has no gradient.*dequantize"):
        jax.grad(losses[call])(X if call == "packed_matmul" else W)


def chosen(monkeypatch):
    """Implementations chosen from here on."""
    made = []
    real = dispatch.choose

    def choose(*args):
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(dispatch, "choose", choose)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("low_rank", [False, True])
def test_left_to_itself_the_cpu_multiplies_with_xla_and_as_the_oracle(
    rows, low_rank, dtype, monkeypatch
):
    made = chosen(monkeypatch)
    x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, K)), dtype)
    factors = (A, B) if low_rank else None
    y = multiply(x, channel_scale=D, low_rank=factors)
    assert {c.implementation for c in made} == {"xla"}
    assert not any(c.fallback for c in made)
    assert y.dtype == x.dtype

    weight, size = oracle_weight(CODES, SCALES, ZEROS, BITS, GROUP)
    left, d = np.asarray(x, np.float64), np.asarray(D, np.float64)[:, None]
    exact, bound = left @ (weight / d), np.abs(left) @ (size / d)
    # A quotient and a result are rounded to x's type, sums of K terms to float32.
    eps = float(jnp.finfo(dtype).eps)
    bound = ((K + 8) * EPS + 2 * eps) * bound
    if low_rank:
        # So are both factors, and the product with A.
        down, up = np.asarray(A, np.float64), np.asarray(B, np.float64)
        exact = exact + left @ down @ up
        bound = bound + (2 * (K + RANK) * EPS + 5 * eps) * (
            np.abs(left) @ np.abs(down) @ np.abs(up)
        )
    assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= bound)


@pytest.mark.parametrize("zero_point", ["none", "float", "integer"])
@pytest.mark.parametrize("shrinks", [(1.0,), (1.0, 0.8)])
def test_left_to_itself_the_cpu_quantizes_with_xla_and_as_the_reference(
    zero_point, shrinks, monkeypatch
):
    options = kind(zero_point=zero_point, store_dtype="bfloat16", shrinks=shrinks)
    problem = rounding_problem(W, D, (A, B), **options)
    wanted = reference.quantize_pack(W, D, D, (A, B), problem=problem)
    made = chosen(monkeypatch)
    packed = quantize_pack(W, D, D, (A, B), **options)
    y, again = prefill_quantize(X, W, D, D, (A, B), **options)
    assert {c.implementation for c in made} == {"xla"}
    for ours in (packed, again):
        jax.tree.map(np.testing.assert_array_equal, ours, wanted)
    exact = np.asarray(X, np.float64) @ np.asarray(W, np.float64)
    bound = (K + 1) * EPS * (np.abs(np.asarray(X)) @ np.abs(np.asarray(W)))
    assert np.all(np.abs(np.asarray(y) - exact) <= bound)


def test_everything_public_is_there():
    for name in pallas_kernels.__all__:
        assert getattr(pallas_kernels, name) is not None

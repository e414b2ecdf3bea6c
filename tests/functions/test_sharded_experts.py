"""Experts that devices share lie as their parameter does, packed, and answer as on one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import needs_compilers
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P
from marks import slow_but

import ttq_jax as ttq
from ttq_jax.checkpoint.packed_store import load_packed, save_packed
from ttq_jax.chips.absent import QUIET, compiled_afresh
from ttq_jax.functions import dense_tree

E, D, F, LAYERS = 8, 32, 48, 2
NAMES = ("gate", "up", "down")


def mesh_of(*sizes):
    """Eight devices; experts are dealt out over "model"."""
    devices = np.array(jax.devices()[:8]).reshape(sizes)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def model():
    """Parameters of a mixture that somebody else wrote; layers are scanned."""
    shapes = {
        "router": (LAYERS, D, E), "gate": (LAYERS, E, D, F), "up": (LAYERS, E, D, F),
        "down": (LAYERS, E, F, D),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s) / 6, jnp.float32) for k, s in shapes.items()}


def ragged(params, x):
    """Tokens sorted by their expert, and products of ragged runs."""

    def block(x, w):
        chosen = jnp.argmax(x @ w["router"], axis=-1)
        order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=E).astype(jnp.int32)
        dot = lambda x, name: jax.lax.ragged_dot(x, w[name], sizes)  # noqa: E731
        h = x[order]
        inner = jax.nn.silu(dot(h, "gate")) * dot(h, "up")
        return x + jnp.zeros_like(x).at[order].set(dot(inner, "down")), None

    return jax.lax.scan(block, x, params)[0]


def dispatched(params, x):
    """Every expert's tokens in places of its own, and einsums over all of them."""

    def block(x, w):
        taken = jax.nn.one_hot(jnp.argmax(x @ w["router"], axis=-1), E, dtype=x.dtype)
        at = (jnp.cumsum(taken, axis=0) - 1).astype(jnp.int32)
        places = taken[:, :, None] * jax.nn.one_hot(at, len(x), dtype=x.dtype)
        h = jnp.einsum("tec,td->ecd", places, x)
        inner = jax.nn.silu(jnp.einsum("ecd,edf->ecf", h, w["gate"]))
        inner = inner * jnp.einsum("ecd,edf->ecf", h, w["up"])
        return x + jnp.einsum("tec,ecd->td", places, jnp.einsum("ecf,efd->ecd", inner, w["down"]))

    for i in range(LAYERS):
        x = block(x, jax.tree.map(lambda a, i=i: a[i], params))
    return x


RECIPES = {
    "ttq": ttq.preset("ttq", bits=4, group_size=16),
    "second order, low rank": ttq.preset(
        "best", moments="prompt", head=None, bits=3, group_size=16, rank=2
    ),
}


def program(fn, recipe, lie=None):
    def run(params, x):
        static = ttq.static_factors(fn, recipe)(params, x) if recipe.low_rank.rank else None
        out, packed = ttq.read(fn, recipe, shardings=lie, static=static)(params, x)
        return out, packed, ttq.run(fn)(packed, x[:5])

    return jax.jit(run)


FIRST = (ragged, "ttq", (1, 8), P(None, "model"))
CASES = [
    FIRST, (dispatched, "ttq", (2, 4), P(None, "model")),
    (ragged, "second order, low rank", (2, 4), P(None, ("data", "model"))),
    (dispatched, "second order, low rank", (1, 8), P(None, "model")),
    (ragged, "ttq", (2, 4), P()), (dispatched, "ttq", (2, 4), P()),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "recipe", "sizes", "spec"), slow_but(CASES, [FIRST]))
def test_experts_answer_as_on_one_device(fn, recipe, sizes, spec, tmp_path):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(24, D)), jnp.float32)
    params, mesh = model(), mesh_of(*sizes)
    out, packed, answer = program(fn, RECIPES[recipe])(params, x)
    lie = {name: NamedSharding(mesh, spec if name in NAMES else P()) for name in params}
    dealt = jax.device_put(params, lie)
    same, shared, close = program(fn, RECIPES[recipe], lie)(dealt, x)
    np.testing.assert_allclose(same, out, atol=1e-5 * np.abs(out).max())
    np.testing.assert_allclose(close, answer, atol=1e-5 * np.abs(answer).max())
    stands_for = jax.jit(fn)(dense_tree(params, shared), x[:5])
    np.testing.assert_allclose(close, stands_for, atol=1e-5 * np.abs(answer).max())
    devices = 8 if spec == P(None, ("data", "model")) else sizes[1] if spec != P() else 1
    for name in NAMES:
        for one, other in zip(shared[name].views, packed[name].views, strict=True):
            for array, wanted in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
                np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-6)
                assert array.addressable_shards[0].data.size * devices == array.size, name
            jax.tree.map(np.testing.assert_array_equal, one.planes, other.planes)
    if devices > 1 and recipe == "ttq":
        save_packed(tmp_path / "store", shared)
        whole = load_packed(tmp_path / "store", params)
        again = jax.jit(ttq.run(fn))(whole, x[:5])
        np.testing.assert_allclose(again, answer, atol=1e-5 * np.abs(answer).max())


@pytest.mark.slow
@needs_compilers
@pytest.mark.parametrize("fn", [ragged, dispatched])
@pytest.mark.parametrize("spec", [P(None, "model"), P()], ids=["dealt", "copies"])
def test_each_of_four_tpus_multiplies_its_own_experts(fn, spec, monkeypatch):
    """By the real compiler, which cannot partition a kernel: no weight is gathered."""
    for key, value in QUIET.items():
        monkeypatch.setenv(key, value)
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    kinds = (AxisType.Auto,) * 2
    mesh = Mesh(np.array(found.devices).reshape(1, 4), ("data", "model"), axis_types=kinds)
    shapes = {
        "router": (LAYERS, 256, E), "gate": (LAYERS, E, 256, 512), "up": (LAYERS, E, 256, 512),
        "down": (LAYERS, E, 512, 256),
    }  # fmt: skip
    lie = {name: NamedSharding(mesh, spec if name in NAMES else P()) for name in shapes}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=lie[name])
        for name, shape in shapes.items()
    }
    x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    recipe = ttq.preset("rtn", bits=4, group_size=128)

    def answer(params, x):
        return ttq.run(fn)(ttq.read(fn, recipe, shardings=lie)(params, x)[1], x[:8])

    with use_abstract_mesh(mesh.abstract_mesh), compiled_afresh():
        traced = jax.jit(answer).trace(params, x)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert text.count("tpu_custom_call") >= 6
    gathered = re.findall(r"= (u8\[[\d,]+\])\S* (?:all-gather|all-to-all|collective-permute)", text)
    assert gathered == []


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ({"gate": P(None, "model"), "up": P()}, "share them as runs of them over model and as all"),
        (
            {"gate": P(None, "data"), "up": P(None, "model")},
            "over data and as runs of them over mo",
        ),
        ({"gate": P(None, None, None, "model"), "up": P()}, "as parts of each expert and as all"),
        ({"up": P(None, "model", "data")}, "up is sharded as .* so are the channels of each"),
    ],
)
def test_experts_that_cannot_be_packed_so_are_refused_by_name(specs, said):
    mesh, params = mesh_of(2, 4), model()
    for name, spec in specs.items():
        params[name] = jax.device_put(params[name], NamedSharding(mesh, spec))
    with pytest.raises(ttq.FunctionError, match=said):
        ttq.read(ragged, RECIPES["ttq"])(params, jnp.ones((4, D)))

"""Packed weights lie as the parameters do that they were made from, and answer as on one device."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import needs_compilers
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

import ttq_jax as ttq
from ttq_jax.checkpoint.packed_store import load_packed, save_packed
from ttq_jax.chips.absent import QUIET, compiled_afresh
from ttq_jax.config import ConfigError
from ttq_jax.functions.sharding import split_of
from ttq_jax.functions.sites import Operand
from ttq_jax.linear import repacked

RECIPE = ttq.preset("ttq", bits=4, group_size=16)
D, HEADS, WIDTH, F, LAYERS, VOCAB = 32, 8, 16, 128, 2, 40


def mesh_of(*names, kind=AxisType.Auto):
    """Eight devices; "data" has two of them."""
    sizes = [2 if name == "data" else 8 // (1 + ("data" in names)) for name in names]
    return Mesh(np.array(jax.devices()[:8]).reshape(sizes), names, (kind,) * len(names))


def model():
    """Parameters of a decoder that somebody else wrote: heads are axes, layers are scanned."""
    shapes = {
        "embed": (VOCAB, D), "head": (D, VOCAB), "q": (LAYERS, D, HEADS, WIDTH),
        "o": (LAYERS, HEADS, WIDTH, D), "up": (LAYERS, D, F), "down": (LAYERS, F, D),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s) / 6, jnp.float32) for k, s in shapes.items()}


SPECS = {
    "embed": P(), "head": P(None, "model"), "q": P(None, None, "model"), "o": P(None, "model"),
    "up": P(None, None, "model"), "down": P(None, "model"),
}  # fmt: skip


def scores(params, tokens):
    """Logits of every token; attention is a running mean, for its weights are not the matter."""
    x = params["embed"][tokens]

    def block(x, w):
        heads = jnp.einsum("btd,dnh->btnh", x, w["q"])
        mixed = jnp.cumsum(jnp.tanh(heads), axis=1)
        x = x + jnp.einsum("btnh,nhd->btd", mixed, w["o"])
        return x + jax.nn.relu(x @ w["up"]) @ w["down"], None

    layers = {k: params[k] for k in ("q", "o", "up", "down")}
    return jax.lax.scan(block, x, layers)[0] @ params["head"]


def answer(params, tokens, **how):
    """Reads a prompt, and decodes greedily over the packed weights."""
    first, packed = ttq.read(scores, RECIPE, select="q|o|up|down|head", **how)(params, tokens)

    def step(tokens, i):
        logits = ttq.run(scores)(packed, tokens)[:, 7 + i]
        new = jnp.argmax(logits, axis=-1).astype(tokens.dtype)
        return tokens.at[:, 8 + i].set(new, mode="drop"), logits

    room = jnp.pad(tokens, ((0, 0), (0, 6)))
    return first, packed, *jax.lax.scan(step, room, jnp.arange(6, dtype=jnp.int32))


@pytest.fixture(scope="module")
def alone():
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (2, 8)), jnp.int32)
    return tokens, jax.jit(answer)(model(), tokens)


@pytest.mark.parametrize("names", [("model",), ("data", "model")])
def test_it_answers_as_one_device(alone, names, tmp_path):
    tokens, (_, packed, out, logits) = alone
    mesh, params = mesh_of(*names), model()
    # Where prompts are dealt out, one weight is whole on every device.
    specs = SPECS | ({"q": P()} if "data" in names else {})
    lie = {name: NamedSharding(mesh, specs[name]) for name in params}
    dealt = jax.device_put(params, lie)
    _, shared, same, close = jax.jit(lambda p, t: answer(p, t, shardings=lie))(dealt, tokens)
    np.testing.assert_array_equal(same, out)
    np.testing.assert_allclose(close, logits, rtol=0, atol=1e-5 * np.abs(logits).max())

    for name in ("q", "o", "up", "down", "head"):
        devices = mesh.shape["model"] if specs[name] != P() else 1
        (one,), (other,) = shared[name].views, packed[name].views
        assert one.row_blocks == (devices if name in ("o", "down") else 1)
        # A device has its share of the codes, and all have those of one device.
        for plane in one.planes:
            assert plane.addressable_shards[0].data.size * devices == plane.size, name
        again = jax.jit(lambda w: repacked(w, 1))(one) if one.row_blocks > 1 else one
        jax.tree.map(np.testing.assert_array_equal, again.planes, other.planes)

    if names == ("model",):
        save_packed(tmp_path / "store", shared)
        whole = load_packed(tmp_path / "store", params)
        wanted = jax.jit(ttq.run(scores))(packed, tokens)
        np.testing.assert_allclose(
            jax.jit(ttq.run(scores))(whole, tokens), wanted, atol=1e-5 * np.abs(wanted).max()
        )


def test_outside_of_a_jit_nothing_has_to_be_said():
    mesh = mesh_of("model")
    w = {"kernel": jax.device_put(model()["down"][0], NamedSharding(mesh, P("model")))}
    x = jax.random.normal(jax.random.key(0), (2, 8, F))
    fn = lambda w, x: x @ w["kernel"]  # noqa: E731
    out, observed = ttq.observe(fn, RECIPE)(w, x)
    packed = ttq.quantize(w, observed, RECIPE)["kernel"]
    assert packed.views[0].row_blocks == 8
    alone = {"kernel": model()["down"][0]}
    wanted = ttq.run(fn)(ttq.quantize(alone, ttq.observe(fn, RECIPE)(alone, x)[1], RECIPE), x)
    np.testing.assert_allclose(
        ttq.run(fn)({"kernel": packed}, x), wanted, atol=1e-5 * np.abs(wanted).max()
    )
    assert out.shape == (2, 8, D)


@needs_compilers
def test_each_of_four_tpus_multiplies_its_own_codes(monkeypatch):
    """By the real compiler, for which a kernel is opaque: nothing is gathered."""
    for key, value in QUIET.items():
        monkeypatch.setenv(key, value)
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = Mesh(np.array(found.devices), ("model",), axis_types=(AxisType.Auto,))
    lie = {
        name: NamedSharding(mesh, spec)
        for name, spec in (("up", P(None, "model")), ("down", P("model")))
    }
    shape = lambda size, sharding: jax.ShapeDtypeStruct(  # noqa: E731
        size, jnp.bfloat16, sharding=sharding
    )
    params = {"up": shape((256, 1024), lie["up"]), "down": shape((1024, 256), lie["down"])}
    fn = lambda w, x: jax.nn.relu(x @ w["up"]) @ w["down"]  # noqa: E731

    def program(params, x):
        recipe = ttq.preset("rtn", bits=4, group_size=128)
        _, observed = ttq.observe(fn, recipe)(params, x)
        return ttq.run(fn)(ttq.quantize(params, observed, recipe, shardings=lie), x[:1])

    x = shape((128, 256), NamedSharding(mesh, P()))
    with use_abstract_mesh(mesh.abstract_mesh), compiled_afresh():
        traced = jax.jit(program).trace(params, x)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    assert re.findall(rf"= (\S+?)\{{\S* ({kinds})", text) == [("bf16[1,256]", "all-reduce")]
    assert text.count("tpu_custom_call") >= 4
    # 256 x 256 codes of either weight on each device, two in a byte.
    assert set(re.findall(r"u8\[([\d,]+)\]", text)) <= {"128,256", "1,128,256"}


def product(equation):
    return lambda w, x: jnp.einsum(equation, x, w["kernel"])


@pytest.mark.parametrize(
    ("x", "shape", "spec", "fn", "said"),
    [
        ((2, 8, 16), (8, 16, 32), P(None, "model"), product("bnh,nhd->bd"), "input channels are"),
        ((2, 32), (32, 8, 16), P(None, None, "model"), product("bd,dnh->bnh"), "output channels"),
        ((4, 8, 2, 32), (4, 8, 32, 16), P(None, "model"), product("gebd,gedf->gebf"),
         "experts are not one run"),
        ((2, 64), (64, 32), P("model"), product("bd,df->bf"), "groups of 16 would lie on several"),
        ((2, 32), (32, 64), P(None, "model"), lambda w, x: x @ w["kernel"][:, :32], "is sliced of"),
        ((2, 32), (32, 128), P(None, "model"),
         lambda w, x: jnp.einsum("bd,dnh->bnh", x, w["kernel"].reshape(32, 4, 32)),
         "8 devices cannot share an axis of 4"),
        ((2, 32), (32, 4, 32), P(None, None, "model"),
         lambda w, x: x @ w["kernel"].reshape(32, 128), "is joined to one before it"),
    ],
)  # fmt: skip
def test_what_devices_cannot_share_is_refused_by_name(x, shape, spec, fn, said):
    w = {"kernel": jax.device_put(jnp.ones(shape), NamedSharding(mesh_of("model"), spec))}
    with pytest.raises((ttq.FunctionError, ConfigError), match=f"kernel.*{said}"):
        ttq.read(fn, RECIPE)(w, jnp.ones(x))


def test_one_group_per_column_of_shared_rows_is_refused():
    w = {"kernel": jax.device_put(jnp.ones((256, 32)), NamedSharding(mesh_of("model"), P("model")))}
    read = ttq.read(product("bd,df->bf"), ttq.preset("ttq", group_size=-1))
    with pytest.raises(ConfigError, match=r"of kernel, 32 each, and one group per column \(-1\)"):
        read(w, jnp.ones((2, 256)))


def test_layers_that_are_dealt_out_are_refused():
    lie = NamedSharding(mesh_of("model"), P("model"))
    w = {"up": jax.device_put(jnp.ones((8, 32, 32)), lie)}

    def fn(w, x):
        return jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, w["up"])[0]

    with pytest.raises(ttq.FunctionError, match=r"up is sharded as .* its layers are dealt out"):
        ttq.read(fn, RECIPE)(w, jnp.ones((2, 32)))


def test_two_meshes_and_other_shardings_are_refused():
    one, other = mesh_of("model"), mesh_of("heads")
    put = lambda mesh, name: jax.device_put(  # noqa: E731
        jnp.ones((32, 32)), NamedSharding(mesh, P(None, name))
    )
    w = {"a": put(one, "model"), "b": put(other, "heads")}
    observed = [
        ttq.observe(lambda w, x, k=k: x @ w[k], RECIPE)({k: jnp.ones((32, 32))}, jnp.ones((2, 32)))
        for k in w
    ]
    both = observed[0][1] + observed[1][1]
    with pytest.raises(ttq.FunctionError, match="a and b are on two meshes: expected one"):
        ttq.quantize(w, both, RECIPE)
    with pytest.raises(ttq.FunctionError, match="shardings: expected one for each of the 2 param"):
        ttq.quantize(w, both, RECIPE, shardings={"a": w["a"].sharding})


def owners(spec, shape, sizes):
    """For each number of an array the device of each mesh axis that has it; -1 for all."""
    out = {}
    for d, names in enumerate(spec):
        names = (names,) if isinstance(names, str) else names or ()
        left = shape[d]
        for name in names:
            left //= sizes[name]
            at = np.arange(shape[d]) // left % sizes[name]
            out[name] = np.broadcast_to(at.reshape(-1, *[1] * (len(shape) - d - 1)), shape)
    return out


def by_ownership(operand, spec, shape, sizes):
    """Rows' and columns' axes by looking where each number of the matrix is; None for no runs."""
    places = operand.places(shape)
    k, n = places.shape[-2:]
    found = {"rows": [], "columns": []}
    for name, owner in owners(spec, shape, sizes).items():
        here = owner.reshape(-1)[places]
        if here.min() == here.max():
            return None
        counts = sizes[name]
        runs = {"rows": np.arange(k)[:, None] * counts // k, "columns": np.arange(n) * counts // n}
        fits = [
            side for side, run in runs.items()
            if (k, n)[side == "columns"] % counts == 0 and (here == run).all()
        ]  # fmt: skip
        if not fits:
            return None
        found[fits[0]].append(name)
    return found


def test_what_is_followed_is_what_the_devices_have():
    """Against looking at every number, for each way to split each of some ways to read."""
    mesh = mesh_of("data", "model")
    ways = [
        ((16, 24), (), (0,), (1,)), ((16, 24), (("transpose", (1, 0)),), (0,), (1,)),
        ((16, 2, 12), (("reshape", (16, 24), (16, 2, 12)),), (0,), (1,)),
        ((2, 8, 3, 8), (("transpose", (2, 0, 1, 3)),), (1, 2), (0, 3)),
        ((4, 96), (("reshape", (16, 24), (4, 96)),), (0,), (1,)),
        ((16, 24), (("reshape", (2, 8, 24), (16, 24)),), (0, 1), (2,)),
        ((3, 16, 8), (("at", 0, 3),), (0,), (1,)),
        ((16, 24), (("slice", (0, 0), (16, 12), (1, 1)),), (0,), (1,)),
    ]  # fmt: skip
    checked = refused = 0
    for shape, steps, contract, free in ways:
        value = np.zeros(shape)
        for step in steps:
            value = value[0] if step[0] == "at" else _step(value, step)
        operand = Operand("w", steps, value.shape, (), contract, free)
        choices = [None, "data", "model"]
        for spec in itertools.product(choices, repeat=len(shape)):
            named = [name for name in spec if name]
            fits = all(n is None or shape[d] % mesh.shape[n] == 0 for d, n in enumerate(spec))
            if not fits or len(set(named)) != len(named):
                continue
            wanted = by_ownership(operand, spec, shape, mesh.shape)
            try:
                found = split_of(operand, NamedSharding(mesh, P(*spec)), shape)
            except ttq.FunctionError as e:
                refused += 1
                # What is sliced into runs, or taken apart and joined again, may be refused too.
                known = "is sliced" in str(e) or "cannot share an axis" in str(e)
                assert wanted is None or known, (steps, spec)
                continue
            checked += 1
            assert wanted is not None, (steps, spec)
            assert sorted(found.rows) == sorted(wanted["rows"]), (steps, spec)
            assert sorted(found.columns) == sorted(wanted["columns"]), (steps, spec)
    assert checked > 20
    assert refused > 20


def _step(value, step):
    """A step on an array of NumPy's."""
    name, *how = step
    if name == "slice":
        return value[tuple(slice(*cut) for cut in zip(*how, strict=True))]
    return value.transpose(how[0]) if name == "transpose" else value.reshape(how[0])

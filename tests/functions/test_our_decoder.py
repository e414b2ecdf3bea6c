"""A stranger's Qwen3 with the weights of our own: the same packed bytes, D and tokens."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from small import small_config, small_params
from tiny_qwen3 import LinenQwen3, NnxQwen3, empty_cache

import ttq_jax as ttq
from ttq_jax.decode import decode
from ttq_jax.functions import dense_tree, is_packed
from ttq_jax.models import cache as our_cache
from ttq_jax.prefill import last_hidden, prefill
from ttq_jax.sampling import Sampling, make_key
from ttq_jax.types import SITES, Offline, Prompts

N_LAYERS, N_NEW = 2, 6
CONFIG = small_config(family="qwen3", qk_norm=True, n_layers=N_LAYERS, tie_embeddings=False)
PARAMS = small_params(CONFIG)
PROMPT = jax.random.randint(jax.random.key(5), (2, 24), 0, 97, jnp.int32)
RECIPES = {
    name: ttq.preset(name, bits=4, group_size=32, moments="prompt", head=None)
    for name in ("ttq", "fast", "best")
}


@cache
def of_our_own(name):
    """(packed kernels by projection, greedy tokens) of our own decoder."""
    recipe = RECIPES[name]

    @jax.jit
    def program(params):
        prompts = Prompts(PROMPT, jnp.ones(PROMPT.shape, bool))
        cache = our_cache.empty_cache(CONFIG, 2, 24 + N_NEW, jnp.float32)
        hidden, cache, packed, *_ = prefill(
            params, prompts, cache, config=CONFIG, recipe=recipe, offline=Offline()
        )
        out, *_ = decode(
            packed, cache, last_hidden(hidden, prompts), make_key(0), jnp.int32(N_NEW),
            config=CONFIG, sampling=Sampling(), capacity=N_NEW, eos_ids=(),
        )  # fmt: skip
        return packed, out

    packed, tokens = program(PARAMS)
    names = [name for names in SITES.values() for name in names]
    return {name: packed["layers"][name]["kernel"] for name in names}, tokens


def linen(scanned):
    layers = PARAMS["layers"]
    tree = {name: leaf for name, leaf in PARAMS.items() if name != "layers"}
    if scanned:
        return LinenQwen3(N_LAYERS, True).apply, {"params": {**tree, "layers": layers}}
    each = {f"layers_{i}": jax.tree.map(lambda a, i=i: a[i], layers) for i in range(N_LAYERS)}
    return LinenQwen3(N_LAYERS, False).apply, {"params": {**tree, **each}}


def module(scanned):
    fn, params, rest = ttq.functional(NnxQwen3(N_LAYERS, scanned))

    def of_ours(path, leaf):
        keys = [getattr(key, "key", None) for key in path]
        keys = [key for key in keys if key is not None]
        layer = keys.pop(1) if isinstance(keys[1], int) else None
        value = PARAMS
        for key in keys:
            value = value[key]
        value = value if layer is None else value[layer]
        return value.reshape(leaf.shape)

    params = jax.tree_util.tree_map_with_path(of_ours, params)
    return (lambda params, *args: fn(params, rest, *args)[0]), params


def greedy(read, step):
    """The prompt, then each token by the one before."""
    logits, cache = read(PROMPT, empty_cache(N_LAYERS, 2, 24 + N_NEW), jnp.int32(0))

    def body(carry, at):
        token, cache = carry
        logits, cache = step(token[:, None], cache, at)
        return (jnp.argmax(logits, -1).astype(jnp.int32), cache), token

    first = jnp.argmax(logits, -1).astype(jnp.int32)
    places = 24 + jnp.arange(N_NEW, dtype=jnp.int32)
    return jax.lax.scan(body, (first, cache), places)[1].T


def answered(fn, params, recipe):
    """(packed tree, tokens)."""
    packed = []

    def read(*args):
        out, tree = ttq.read(fn, recipe)(params, *args)
        packed.append(tree)
        return out

    tokens = greedy(read, lambda *args: ttq.run(fn)(packed[0], *args))
    return packed[0], tokens


# Every recipe with both libraries, unrolled and scanned.
CASES = {
    "ttq": [(linen, False), (module, True)], "fast": [(linen, True), (module, False)],
    "best": [(linen, True), (module, False)],
}  # fmt: skip
EACH = [(name, *case) for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("name", "make", "scanned"), slow_but(EACH, EACH[2:4]))
def test_bytes_scales_and_tokens_are_those_of_our_own_decoder(name, make, scanned):
    recipe, (wanted, tokens) = RECIPES[name], of_our_own(name)
    fn, params = make(scanned)
    packed, found = jax.jit(lambda params: answered(fn, params, recipe))(params)
    np.testing.assert_array_equal(found, tokens)
    kernels = [leaf for leaf in jax.tree.leaves(packed, is_leaf=is_packed) if is_packed(leaf)]
    assert len(kernels) == 7 * (1 if scanned else N_LAYERS)
    for kernel in kernels:
        (view,), (operand,) = kernel.views, kernel.operands
        parts = operand.path.removeprefix("params/").replace("layers_", "layers/").split("/")
        of_ours = wanted[next(part for part in parts if part in wanted)]
        if not scanned:
            of_ours = jax.tree.map(lambda a, i=int(parts[1]): a[i], of_ours)
        for a, b in zip(jax.tree.leaves(view), jax.tree.leaves(of_ours), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    if name == "ttq":
        dense, rounded = partial(fn, params), partial(fn, dense_tree(params, packed))
        np.testing.assert_array_equal(jax.jit(lambda: greedy(dense, rounded))(), tokens)


@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
def test_the_inputs_of_a_block_are_our_four_sites(scanned):
    fn, params = linen(scanned)
    cache = jax.ShapeDtypeStruct((N_LAYERS, 2, 2, 30, 2, 16), jnp.float32)
    table = ttq.kernels(fn)(params, PROMPT, cache, jax.ShapeDtypeStruct((), jnp.int32))
    found = {}
    for row in table:
        if not row.dense:
            found.setdefault(row.site, set()).add(row.path.split("/")[-2])
    assert [found[site] for site in sorted(found)] == [set(names) for names in SITES.values()] * (
        1 if scanned else N_LAYERS
    )
    dense = {row.path: row.dense for row in table if row.dense}
    assert dense.keys() >= {"params/embed/embedding", "params/head/kernel"}

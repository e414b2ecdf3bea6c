"""One program over eight devices computes what it computes on one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from small import OPT, prompts_of, random_rows, small_config, small_params

from ttq_jax.config import ConfigError
from ttq_jax.generate import answer, generate_tokens, read
from ttq_jax.linear import dense_weight, linear
from ttq_jax.mesh import make_mesh, parse
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.offline.prior import for_unreached, prior_from_weights
from ttq_jax.partition import on, param_specs, put, shard
from ttq_jax.quant.head import pack_head
from ttq_jax.quant.lowrank import LowRankRule
from ttq_jax.quant.presets import preset
from ttq_jax.quant.scaling import SearchedAlpha
from ttq_jax.quant.tree import check_selection, quantize_tree, static_factors
from ttq_jax.quant.widths import Width
from ttq_jax.sampling import Sampling
from ttq_jax.sites import observing
from ttq_jax.types import Offline, kernels

# Every device has a whole group of 32 input channels of o and of down, at eight devices too.
BASE = {"vocab_size": 104, "n_heads": 8, "n_kv_heads": 4, "head_dim": 32, "d_ff": 256}
GEMMA = {
    "family": "gemma3", "norm": "rms_plus_one", "norm_placement": "sandwich", "qk_norm": True,
    "activation": "gelu_tanh", "sliding_window": 5, "sliding_layers": (True, False),
    "embed_scale": 8.0, "attn_softcap": 20.0, "tie_embeddings": True,
}  # fmt: skip
WHOLE = {"data": 2, "model": 4}
MIXTURE = {"n_experts": 8, "experts_per_token": 3, "d_ff": 40, "n_kv_heads": 2}


@partial(jax.jit, static_argnames=("config", "recipe", "sampling", "chunk", "cache_dtype"))
def answers(params, prompts, offline, key, limit, *, config, recipe, sampling, **reading):
    """Tokens, and the logits of one more token, through the packed weights."""
    how = {"config": config, "recipe": recipe, "sampling": sampling, "eos_ids": (), "drafts": 0}
    packed, moments, state, _ = read(params, prompts, offline, key, capacity=8, **how, **reading)
    first = state.token[:, None]
    hidden, *_ = forward(config, packed, first, jnp.ones_like(first, bool), state.cache)
    scores = logits(config, packed, hidden[:, 0])
    _, _, state = answer(params, packed, moments, state, offline, key, limit, **how)
    return state.out, scores


def prepared(params, config, recipe):
    """What `prepare` makes, without a model's files."""
    moments, head = {}, {}
    if recipe.source.prior == "weights":
        moments = prior_from_weights(params, config=config, reads=recipe.reads)
    moments = for_unreached(params, moments, config=config, reads=recipe.reads)
    if recipe.head is not None:
        head = jax.jit(partial(pack_head, bits=recipe.head))(params)
    return Offline(moments=moments, low_rank=static_factors(params, recipe)), head


def both(sizes, config, recipe, rows, run, side="right"):
    """What `run` gives on one device and on a mesh."""
    params, prompts = small_params(config), prompts_of(rows, 32, side)
    rest = (jax.random.key(0), np.int32(8))
    offline, head = prepared(params, config, recipe)
    alone = jax.device_get(run(params, head, prompts, offline, *rest))
    mesh = make_mesh(sizes, config)
    with on(mesh):
        dealt = shard(params, mesh)
        offline, head = prepared(dealt, config, recipe)
        prompts = put(jax.device_get(prompts), batch=True)
        shared = jax.device_get(run(dealt, head, prompts, offline, *put(rest)))
    return alone, shared


# Of presets, families, meshes and batches, the pairs that differ in what the devices share.
CASES = {
    "fast-sampled": ((2, 4), {}, preset("fast"), [20, 9, 13, 30], {"side": "left", "hot": True}),
    "best-gemma": ((1, 4), GEMMA, preset("best"), [20, 9, 13, 30, 7], {}),
    "paper-opt": ((1, 8), OPT | {"n_kv_heads": 8}, preset("paper", group_size=32), [20], {}),
    "mixture": (
        (1, 8), MIXTURE, preset("fast", group_size=32), [20, 9, 13, 30],
        {"side": "left", "hot": True},
    ),
    "parts": (
        (2, 4), {}, preset("fast", group_size=32), [20, 9, 13, 30],
        {"reading": {"chunk": 12, "cache_dtype": "int8"}},
    ),
    "rtn-gemma": ((1, 2), GEMMA, preset("rtn"), [20, 9, 13, 30, 7], {"side": "left"}),
    "hqq-opt": ((1, 2), OPT | {"n_kv_heads": 8}, preset("hqq", group_size=32), [20], {"hot": True}),
    "ttq-mixture": ((1, 2), MIXTURE, preset("ttq", group_size=32), [20, 9, 13, 30], {}),
    "data": ((8, 1), {}, preset("ttq", bits=3, prefill="both"), [20, 9, 13, 30, 7, 3, 11, 25], {}),
    "all-rules": (
        (2, 4), {"tie_embeddings": False},
        preset("ttq", low_rank=LowRankRule(rank=4, mean=True), scale=SearchedAlpha(steps=3),
               head=4, scales="coded4", group_size=64,
               widths=(Width(select="layers/1/(down|q)", bits=3),)),
        [20], {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", slow_but(CASES, ["mixture"]))  # which shares most
def test_tokens_are_those_of_one_device_and_logits_too(case):
    (data, model), changes, recipe, lengths, how = CASES[case]
    config = small_config(**BASE | changes)
    sampling = Sampling(temperature=1.0, top_p=0.9) if how.get("hot") else Sampling()

    def run(params, head, *rest):
        reading = how.get("reading", {})
        return answers(
            params | head, *rest, config=config, recipe=recipe, sampling=sampling, **reading
        )

    rows = random_rows(lengths, vocab=104)
    sizes = {"data": data, "model": model}
    (tokens, scores), (shared, close) = both(
        sizes, config, recipe, rows, run, how.get("side", "right")
    )
    np.testing.assert_array_equal(shared, tokens)
    np.testing.assert_allclose(close, scores, rtol=0, atol=1e-5 * np.abs(scores).max())


@pytest.mark.parametrize("how", ["speculate", "per_prompt"])
def test_drafts_and_prompts_of_their_own_are_shared_too(how):
    config = small_config(**BASE)
    batch = "per_prompt" if how == "per_prompt" else "pooled"
    prefill = "both" if how == "speculate" else "full"
    recipe = preset("ttq", group_size=32, batch=batch, prefill=prefill)

    def run(params, _, *rest):
        return generate_tokens(
            params, *rest, config=config, recipe=recipe, sampling=Sampling(), capacity=8,
            eos_ids=(), drafts=3 if how == "speculate" else 0,
        )[:2]  # fmt: skip

    lengths, sizes = ([20], {"model": 2}) if how == "speculate" else ([20, 9, 13, 30], WHOLE)
    alone, shared = both(sizes, config, recipe, random_rows(lengths, vocab=104), run)
    jax.tree.map(np.testing.assert_array_equal, shared, alone)


@pytest.mark.slow
def test_where_gptq_amplifies_rounding_one_device_does_the_same():
    """A mesh adds in another order; a Gram matrix of few tokens with little damping turns codes.

    As many turn on one device whose weights differ by 1e-7, and hardly one with fewer channels.
    """
    config, recipe = small_config(**BASE), preset("gptq", bits=3, group_size=32)

    @jax.jit
    def rounded(params, prompts):
        cache = empty_cache(config, *prompts.tokens.shape, jnp.float32)
        see = observing(prompts.valid, recipe.reads)
        seen = forward(config, params, prompts.tokens, prompts.valid, cache, project=see)[2]
        return quantize_tree(params, recipe, seen, {})

    def dense(tree):
        found = jax.device_get(kernels(tree["layers"]))
        return {name: jax.vmap(dense_weight)(kernel) for name, kernel in found.items()}

    params, prompts = small_params(config), prompts_of(random_rows([20, 20], vocab=104), 32)
    alone = dense(rounded(params, prompts))

    def turned(tree):
        return {name: np.mean(abs(w - alone[name]) > 1e-3) for name, w in dense(tree).items()}

    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    moved = jax.tree.map(lambda a, k: a * (1 + 1e-7 * jax.random.normal(k, a.shape)), params, keys)
    nearly = turned(rounded(moved, prompts))
    mesh = make_mesh({"model": 8}, config)
    with on(mesh):
        shared = turned(rounded(shard(params, mesh), put(jax.device_get(prompts))))
    few = {"o", "down"}  # 256 channels, 40 tokens
    meshed, perturbed = (sum(found[name] for name in few) for found in (shared, nearly))
    assert 0 < meshed < 5 * perturbed < 0.2
    assert all(max(shared[name], nearly[name]) < 1e-3 for name in shared.keys() - few)


def test_a_device_has_its_share_of_every_weight():
    config = small_config(**BASE)
    mesh = make_mesh({"data": 2, "model": 4}, config)
    params = small_params(config)
    dealt = shard(params, mesh)
    for name, kernel in kernels(dealt["layers"]).items():
        assert kernel.addressable_shards[0].data.size * 4 == kernel.size, name
    table = dealt["embed"]["embedding"]
    assert table.addressable_shards[0].data.shape == (26, 64)

    @jax.jit
    def packed_of(params, prompts):
        return read(
            params, prompts, Offline(), jax.random.key(0), capacity=8, config=config,
            recipe=preset("ttq", group_size=32), sampling=Sampling(), eos_ids=(), drafts=0,
        )[0]  # fmt: skip

    with on(mesh):
        prompts = put(jax.device_get(prompts_of(random_rows([20], vocab=104), 32)))
        packed = packed_of(dealt, prompts)
    specs = param_specs(packed)["layers"]
    for name, kernel in kernels(packed["layers"]).items():
        assert kernel.row_blocks == (4 if name in {"o", "down"} else 1)
        for array, spec in zip(jax.tree.leaves(kernel), jax.tree.leaves(specs[name]), strict=True):
            wanted = jax.sharding.NamedSharding(mesh, spec)
            assert array.sharding.is_equivalent_to(wanted, array.ndim), name
    one = jax.tree.map(lambda a: a[0], packed["layers"]["down"]["kernel"])
    with pytest.raises(ValueError, match=r"expected rows in 1 blocks, .* got 4; use it"):
        linear(jnp.ones((1, 256)), one)


def test_a_share_that_is_no_whole_group_is_refused():
    config = small_config(**BASE)
    params = jax.eval_shape(lambda: small_params(config))
    with on(make_mesh({"model": 8}, config)):
        check_selection(params, preset("ttq", group_size=32))
        with pytest.raises(
            ConfigError,
            match="8 devices share the 256 input channels of down, 32 each, and groups of 64 would "
            "lie on several of them; use a group size of 32",
        ):
            check_selection(params, preset("ttq", group_size=64))
        with pytest.raises(ConfigError, match=r"one group per column \(-1\) would lie on several"):
            check_selection(params, preset("ttq", group_size=-1))
        # Columns are whole on their devices.
        check_selection(params, preset("ttq", group_size=-1, select="layers/(q|k|v|gate|up)"))


@pytest.mark.parametrize(
    ("sizes", "changes", "said"),
    [
        ({"model": 16}, {}, "take 16 devices, and there are 8"),
        ({"model": 0}, {}, "expected numbers of devices"),
        ({"tensor": 2}, {}, "expected numbers of devices"),
        ({"model": 3}, {}, "8 heads, which 3 devices cannot share equally"),
        ({"model": 4}, {"vocab_size": 97}, "97 tokens of the vocabulary"),
        ({"model": 4}, {"d_ff": 90}, "90 channels of the feed-forward layer"),
        ({"model": 4}, MIXTURE | {"n_experts": 6}, "6 experts"),
        ({"model": 4}, {"n_heads": 12, "n_kv_heads": 6}, "6 key-value heads, which 4 devices can"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, changes, said):
    with pytest.raises(ConfigError, match=said):
        make_mesh(sizes, small_config(**BASE | changes))


def test_key_value_heads_are_copied_where_there_are_fewer_than_devices():
    config = small_config(**BASE | {"n_kv_heads": 2})
    assert dict(make_mesh({"model": 8}, config).shape) == {"data": 1, "kv": 2, "rep": 4}


@pytest.mark.parametrize("text", ["", "model", "model=", "model=0", "rows=2", "data=2;model=4"])
def test_a_mesh_is_read_as_it_is_written(text):
    assert parse("data=2,model=4") == {"data": 2, "model": 4}
    assert parse(" model=4 ") == {"data": 1, "model": 4}
    with pytest.raises(ConfigError, match="expected sizes of data and model"):
        parse(text)

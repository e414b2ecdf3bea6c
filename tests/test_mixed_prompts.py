"""Prompts of very different lengths, very short ones, dead groups, and groups of a whole column."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import prompts_of, random_rows, small_config, small_params
from tiny_files import write_model

import ttq_jax as ttq
from ttq_jax.generate import generate_tokens
from ttq_jax.linear import dense_weight
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import init_params, logits
from ttq_jax.prefill import last_hidden, prefill
from ttq_jax.prompts import pad_prompts
from ttq_jax.quant.convert import quantize
from ttq_jax.quant.moments import observe
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.sampling import make_key
from ttq_jax.types import Offline, Prompts

CONFIG = small_config(d_model=32, n_heads=2, n_kv_heads=1, d_ff=48, embed_dim=32)
PARAMS = small_params(CONFIG)
ONE, LONG = random_rows([1, 500], seed=3)


def answers(rows, recipe):
    prompts = pad_prompts(rows, max_positions=CONFIG.max_positions, max_new_tokens=8)
    out, counts, finite, *_ = generate_tokens(
        PARAMS, prompts, Offline(), make_key(0), jnp.int32(8), config=CONFIG, recipe=recipe,
        sampling=ttq.Sampling(), capacity=8, eos_ids=(),
    )  # fmt: skip
    assert finite and counts.tolist() == [8] * len(rows)
    return out.tolist()


@pytest.mark.parametrize("name", ["none", "ttq"])
def test_one_token_beside_five_hundred(name):
    """In float32 a row's answer is that of its prompt alone: padding reaches no moment."""
    recipe = None
    if name != "none":
        recipe = ttq.preset(name, bits=3, group_size=16, batch="per_prompt", select="layers/q")
    together = answers([ONE, LONG], recipe)
    assert together == [*answers([ONE], recipe), *answers([LONG], recipe)]
    assert together[0] != together[1]


@functools.cache
def last_logits(size):
    """Of eight prompts in bfloat16, read in batches of a size."""
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), PARAMS)
    rows = random_rows([5, 31, 8, 17, 2, 30, 12, 9], seed=5)

    @jax.jit
    def read(prompts):
        cache = empty_cache(CONFIG, *prompts.tokens.shape, jnp.bfloat16)
        hidden, _, tree, *_ = prefill(
            params, prompts, cache, config=CONFIG, recipe=None, offline=Offline()
        )
        return logits(CONFIG, tree, last_hidden(hidden, prompts))

    at = [prompts_of(rows[i : i + size], 32) for i in range(0, len(rows), size)]
    return np.concatenate([read(prompts) for prompts in at])


@pytest.mark.parametrize("size", [2, 4, 8])
def test_bfloat16_batches_differ_from_single_prompts_by_rounding_alone(size):
    """Which way a near-tie falls may depend on the batch's shape: sums have another order."""
    alone = last_logits(1)
    np.testing.assert_allclose(last_logits(size), alone, rtol=0, atol=0.02 * np.abs(alone).max())


def test_a_prompt_of_8192_tokens_never_has_all_its_scores_at_once():
    length = 8192
    config = dataclasses.replace(CONFIG, d_ff=2048, max_positions=2 * length)
    shapes = [jax.ShapeDtypeStruct((1, length), kind) for kind in (jnp.int32, jnp.bool_)]
    params = jax.eval_shape(functools.partial(init_params, config), make_key(0))
    made = generate_tokens.lower(
        params, Prompts(*shapes), Offline(), make_key(0), jnp.int32(8), config=config,
        recipe=ttq.preset("ttq", bits=3, group_size=16), sampling=ttq.Sampling(), capacity=8,
        eos_ids=(),
    ).compile()  # fmt: skip
    assert made.memory_analysis().temp_size_in_bytes < 4 * config.n_heads * length**2


@pytest.mark.parametrize("damping", [0.3, 0.01])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_second_order_from_a_few_tokens(tokens, damping):
    """On what it saw it is never worse than rounding to nearest, and elsewhere it stays finite."""
    rng = np.random.default_rng(tokens)
    w = jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(tokens, 64)), jnp.float32)
    errors = {}
    for name in ("nearest", "second"):
        recipe = ttq.preset("gptq", bits=3, group_size=32)
        if name == "nearest":
            recipe = dataclasses.replace(recipe, rounding=ttq.Nearest())
        else:
            recipe = dataclasses.replace(
                recipe, rounding=dataclasses.replace(recipe.rounding, damping=damping)
            )
            assert isinstance(recipe.rounding, SecondOrder)
        moments = observe(x, jnp.ones(tokens, bool), recipe.reads)
        dense = dense_weight(quantize(w, moments, recipe))
        assert jnp.isfinite(dense).all()
        errors[name] = float(jnp.linalg.norm(x @ (dense - w)))
        assert jnp.linalg.norm(dense - w) < 0.5 * jnp.linalg.norm(w)
    assert errors["second"] < errors["nearest"]


def test_a_prompt_of_one_token_is_answered_through_second_order():
    for damping in (0.3, 0.01):
        recipe = ttq.preset("best", bits=3, group_size=16, select="layers/(q|down)", head=None)
        rounding = SecondOrder(damping=damping)
        assert answers([ONE], dataclasses.replace(recipe, rounding=rounding))


@pytest.mark.parametrize("name", ["rtn", "hqq", "ttq", "fast", "best"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_groups_of_zeros_and_of_denormals(name, dtype):
    """They come out as zeros, or as small as they were; the other groups as without them."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 40)).astype(np.float32)
    w[:16], w[16:32] = 0, 1e-41 * w[16:32]
    x = jnp.asarray(rng.normal(size=(30, 64)), jnp.float32)
    recipe = ttq.preset(name, bits=3, group_size=16)
    scales = "float" if dtype == "float16" else recipe.grid.scales
    grid = dataclasses.replace(recipe.grid, store_dtype=dtype, scales=scales)
    recipe = dataclasses.replace(recipe, grid=grid)
    moments = observe(x, jnp.ones(30, bool), recipe.reads)
    dense = np.asarray(dense_weight(quantize(jnp.asarray(w), moments, recipe)))
    assert np.isfinite(dense).all()
    assert np.linalg.norm(dense[32:] - w[32:]) < 0.35 * np.linalg.norm(w[32:])
    if name == "best" and scales == "coded":
        # The least scale that a column can store lets such rows take over errors of others.
        without = dense.copy()
        without[:32] = 0
        assert np.linalg.norm(x @ (dense - w)) < np.linalg.norm(x @ (without - w))
        return
    np.testing.assert_array_equal(dense[:16], 0)
    assert np.abs(dense[16:32]).max() < 1e-6


def test_a_group_of_a_whole_column_is_prepared_loaded_and_decoded(tmp_path):
    model = ttq.load(write_model(tmp_path / "tiny"))
    recipe = ttq.preset("rtn", bits=4, group_size=-1)
    made = ttq.prepare(model, recipe)
    sizes = {leaf.group_size for leaf in made.packed["layers"].values() if hasattr(leaf, "planes")}
    ttq.save_offline(tmp_path / "store", model, recipe, made)
    found = ttq.load_offline(tmp_path / "store", model, recipe)
    jax.tree.map(np.testing.assert_array_equal, found.packed, made.packed)
    how = {"recipe": recipe, "max_new_tokens": 4}
    first = ttq.generate(model, ["a b"], offline=found, **how)
    assert first.tokens == ttq.generate(model, ["a b"], offline=made, **how).tokens
    assert len(first.tokens[0]) == 4 and sizes <= {64, 96}

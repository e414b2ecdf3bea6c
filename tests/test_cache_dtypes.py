"""Keys and values in eight bits or sixteen: stored once, and read so by all attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import prompts_of, random_rows, small_config, small_params

from ttq_jax.config import ConfigError
from ttq_jax.evaluation.perplexity import Protocol, score_window
from ttq_jax.generate import generate_tokens
from ttq_jax.models.cache import check_dtype, empty_cache, map_rows, read_layer, write_layer
from ttq_jax.models.decoder import forward
from ttq_jax.quant.presets import preset
from ttq_jax.sampling import Sampling
from ttq_jax.types import EightBits, Offline, stored_bytes

CONFIG = small_config()
PARAMS = small_params(CONFIG)
WINDOW = {"sliding_window": 3, "sliding_layers": (True, False), "attn_softcap": 20.0}


@pytest.mark.parametrize("slot", [3, [3, 1]])
def test_what_is_written_is_read_to_half_a_step(slot):
    new = np.random.default_rng(0).normal(size=(2, 4, 2, 16)).astype(np.float32)
    new[0, 1] = 0.0
    cache = empty_cache(CONFIG, 2, 9, "int8")
    assert cache.k.codes.dtype == jnp.int8
    assert cache.k.codes.shape == (2, 2, 9, 2, 16)
    assert cache.k.scales.shape == (2, 2, 9, 2)
    at = jnp.asarray(1, jnp.int32)
    stack = write_layer(cache.k, at, jnp.asarray(slot, jnp.int32), jnp.asarray(new))
    read = np.asarray(read_layer(stack, at, 9, dtype=jnp.float32))
    step = np.abs(new).max(-1, keepdims=True) / 127
    for row, first in enumerate(np.broadcast_to(slot, 2)):
        got = read[row, first : first + 4]
        assert (np.abs(got - new[row]) <= step[row] * 0.501).all()
        largest = np.abs(new[row]).argmax(-1)[..., None]
        np.testing.assert_allclose(
            np.take_along_axis(got, largest, -1), np.take_along_axis(new[row], largest, -1),
            rtol=1e-6,
        )  # fmt: skip
        assert not read[row, :first].any() and not read[row, first + 4 :].any()
    part = read_layer(stack, at, 2, jnp.asarray(4, jnp.int32), jnp.bfloat16)
    np.testing.assert_array_equal(part, read[:, 4:6].astype(jnp.bfloat16))
    assert not np.asarray(read_layer(stack, jnp.asarray(0, jnp.int32), 9, dtype=jnp.float32)).any()
    twice = map_rows(lambda a: jnp.concatenate([a, a]), cache)
    assert isinstance(twice.k, EightBits)
    assert twice.k.scales.shape == (2, 4, 9, 2)


@pytest.mark.parametrize(("dtype", "changes"), [("int8", {}), ("bfloat16", WINDOW)])
def test_a_prompt_is_read_as_its_tokens_one_by_one_would_be(dtype, changes):
    """Attention reads what is stored, its own keys and values too."""
    config = small_config(**changes)
    params = PARAMS if not changes else small_params(config)
    tokens = jnp.asarray(random_rows([7, 7]), jnp.int32)
    read = jax.jit(partial(forward, config))
    valid = jnp.ones((2, 7), bool)
    whole, filled, _ = read(params, tokens, valid, empty_cache(config, 2, 8, dtype))
    cache, states = empty_cache(config, 2, 8, dtype), []
    for i in range(7):
        hidden, cache, _ = read(params, tokens[:, i : i + 1], valid[:, :1], cache)
        states.append(hidden)
    exact, _, _ = read(params, tokens, valid, empty_cache(config, 2, 8, "float32"))
    got, off = np.concatenate(states, axis=1), np.abs(np.asarray(whole - exact)).max()
    np.testing.assert_allclose(got, whole, rtol=1e-4, atol=0.1 * off)
    assert off > 1e-3, "the dtype does nothing"
    assert jax.tree.structure(cache) == jax.tree.structure(filled)


def answers(recipe, *, drafts=0, chunk=0, dtype="int8"):
    out, counts, finite, *_ = generate_tokens(
        PARAMS, prompts_of(random_rows([27, 9]), 32), Offline(), jax.random.key(0),
        jnp.asarray(9, jnp.int32), config=CONFIG, recipe=recipe, sampling=Sampling(), capacity=16,
        eos_ids=(), drafts=drafts, chunk=chunk, cache_dtype=dtype,
    )  # fmt: skip
    assert finite and (np.asarray(counts) == 9).all()
    return np.asarray(out)


def test_drafts_are_verified_over_the_same_cache_and_parts_read_it():
    want = answers(None)
    recipe = preset("ttq", bits=3, batch="per_prompt", select="layers/(q|down)")
    np.testing.assert_array_equal(answers(recipe, drafts=3, chunk=12), want)


def test_a_text_is_scored_over_it_in_parts_too():
    window = jnp.asarray(random_rows([24])[0], jnp.int32)
    whole, parts = (
        float(score_window(
            PARAMS, window, Offline(), config=CONFIG, chunk=chunk, cache_dtype="int8",
            recipe=preset("ttq", bits=3, group_size=16, select="layers/q"),
            protocol=Protocol(kind="window", window=24),
        ))
        for chunk in (0, 9)
    )  # fmt: skip
    assert parts == pytest.approx(whole, rel=1e-4)


def test_what_it_takes():
    sizes = {d: stored_bytes(empty_cache(CONFIG, 3, 100, d)) for d in ("float32", "int8")}
    heads = 2 * CONFIG.n_layers * 3 * 100 * CONFIG.n_kv_heads
    assert sizes["float32"] - sizes["int8"] == heads * (4 * 16 - (16 + 4))
    with pytest.raises(ConfigError, match=r"one of float32, bfloat16, int8, or None.*got 'int4'"):
        check_dtype("int4")

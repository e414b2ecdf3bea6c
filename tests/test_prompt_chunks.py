"""A prompt that is read in parts: the moments, weights and answers of one that is read whole."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import OPT, in_host, prompts_of, random_rows, small_config, small_params

from ttq_jax.config import ConfigError, Rope
from ttq_jax.models import prompt_attention
from ttq_jax.models.attention import attend, attend_part, join_parts
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.chunks import over_chunks
from ttq_jax.models.decoder import forward
from ttq_jax.models.prompt_attention import attend_part_by_kernel
from ttq_jax.offline.prior import for_unreached, prior_from_weights
from ttq_jax.prefill import check_chunk, first_turn, prefill, reading
from ttq_jax.quant.lowrank import LowRankRule
from ttq_jax.quant.presets import preset
from ttq_jax.quant.source import Source
from ttq_jax.quant.tree import static_factors
from ttq_jax.quant.widths import Width
from ttq_jax.types import Offline, kernels

FAR = np.iinfo(np.int32).max
ROWS = random_rows([27, 32, 9])


def both(config, recipe, chunk, *, side="right", offline=None, host=False):
    """What `prefill` makes of prompts that are read whole, and in parts."""
    params = small_params(config)
    params = in_host(params) if host else params
    prompts = prompts_of(ROWS, 32, side, fill=5)

    @partial(jax.jit, static_argnames="chunk")
    def run(params, prompts, offline, chunk):
        cache = empty_cache(config, len(ROWS), 40, jnp.float32)
        hidden, cache, tree, moments, unreached = prefill(
            params, prompts, cache, config=config, recipe=recipe, offline=offline, chunk=chunk
        )
        return hidden, cache, kernels(tree["layers"]) if recipe else {}, moments, unreached

    made = [run(params, prompts, offline or Offline(), each) for each in (0, chunk)]
    return np.asarray(prompts.valid), *jax.device_get(made)


def assert_close(got, want):
    """Equal to float32 rounding, of sums that are taken in another order."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * np.abs(other).max())


def assert_same_codes(got, want):
    """Equal but for the few that lie between two codes."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        near = one == other if one.dtype == np.uint8 else np.isclose(
            one.astype(np.float32), other.astype(np.float32), rtol=0.01
        )  # fmt: skip
        assert near.mean() > 0.98


# Nearly all the time here is compilation: a few projections show all there is.
SOME = "layers/(q|down)"
SECOND = preset(
    "best", bits=3, group_size=16, moments=Source(decay=0.5), head=None, select="layers/q",
    widths=(Width(select="layers/1/q", bits=2),), low_rank=LowRankRule(mean=True),
)  # fmt: skip
FAST = preset("fast", bits=3, group_size=16, moments=Source(refresh=4), head=None, select=SOME)
TTQ = preset("ttq", bits=3, group_size=16, moments=Source(refresh=4), select="layers/down")
RANK = preset(
    "ttq", bits=3, group_size=16, low_rank=LowRankRule(rank=2, mean=True), select=SOME,
    moments=Source(prior="weights", prior_tokens=8.0, decay=1.0),
)  # fmt: skip
LOCAL = {"sliding_window": 9, "sliding_layers": (True, False), "attn_softcap": 20.0}
GROWS = {
    "max_positions": 64,
    "rope": Rope(theta=10000.0, scaling="dynamic", factor=2.0, original_positions=16),
}  # fmt: skip
# What is read in parts, of how many tokens, and on which side the padding is.
CASES = {
    "second order, widths, carried": (SECOND, {}, 8, "left"),
    "clip, windows, a rest": (FAST, LOCAL, 12, "right"),
    "static rank, from the host": (RANK, OPT, 8, "right"),
    "mixture": (TTQ, {"n_experts": 3, "experts_per_token": 2}, 24, "left"),
    "unquantized, growing": (None, GROWS, 12, "left"),
}  # fmt: skip


SLOW = ("static rank, from the host", "mixture")


@pytest.mark.parametrize(
    "case", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in CASES]
)
def test_moments_codes_and_cache_are_those_of_the_whole_prompt(case):
    recipe, changes, chunk, side = CASES[case]
    config = small_config(**changes)
    params, moments, carried, low_rank = small_params(config), {}, {}, {}
    if recipe is not None:
        if recipe.source.prior == "weights":
            moments = prior_from_weights(params, config=config, reads=recipe.reads)
        moments = for_unreached(params, moments, config=config, reads=recipe.reads)
        low_rank = static_factors(params, recipe)
    if recipe is not None and recipe.source.decay:
        carried = jax.tree.map(lambda a: a + 0.5, first_turn(params, config, recipe))
    offline = Offline(moments=moments, carried=carried, low_rank=low_rank)
    valid, want, got = both(config, recipe, chunk, side=side, offline=offline, host="host" in case)
    (hidden, cache, packed, sums, unreached), (plain, filled, others, whole, share) = got, want
    assert (recipe is None) == (not whole), "the recipes are ones that keep what was observed"
    assert_close(sums, whole)
    assert_same_codes(packed, others)
    assert (unreached, share) == (None, None) or unreached == share
    assert_close(hidden[valid], plain[valid])
    for one, other in ((cache.k, filled.k), (cache.v, filled.v)):
        assert_close(one[:, :, :32][:, valid], other[:, :, :32][:, valid])
    np.testing.assert_array_equal(cache.positions, filled.positions)
    np.testing.assert_array_equal(cache.valid, filled.valid)


def test_parts_in_their_order_and_a_shorter_last_one():
    seen = []

    def run(x, first, carry):
        seen.append(x.shape[1])
        return x + carry[:, None, None], carry + 1, {"sum": jnp.sum(x), "first": first}

    x = jnp.arange(22, dtype=jnp.float32).reshape(2, 11, 1)
    made, carry, sums = over_chunks(run, x, jnp.zeros(2, jnp.float32), 4)
    np.testing.assert_array_equal((made - x)[..., 0], [[0] * 4 + [1] * 4 + [2] * 3] * 2)
    assert set(seen) == {4, 3}
    assert (carry == 3).all()
    assert (float(sums["sum"]), int(sums["first"])) == (sum(range(22)), 0 + 4 + 8)


def part_of(rng, window=FAR, padding=40):
    """Queries of a part, keys of two, and what `attend` takes besides."""
    q = jnp.asarray(rng.normal(size=(2, 128, 4, 64)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 256, 2, 64)), jnp.float32) for _ in range(2))
    valid = np.ones((2, 256), bool)
    # The first row's padding is more than a part, the second's is on the right.
    valid[0, : 128 + padding], valid[1, 256 - padding :] = False, False
    at = jnp.asarray(np.maximum(np.cumsum(valid, 1) - 1, 0), jnp.int32)
    how = {"window": jnp.asarray(window, jnp.int32), "scale": 0.2, "cap": 9.0}
    return q, k, v, jnp.asarray(valid), at, how


@pytest.mark.parametrize("window", [FAR, 50])
def test_joined_parts_are_attention(window):
    q, k, v, valid, at, how = part_of(np.random.default_rng(0), window)

    @jax.jit
    def both(q, k, v, valid, at, window):
        the_rest = how | {"window": window, "q_positions": at[:, 128:]}
        parts = (
            attend_part(
                q, k[:, here], v[:, here], k_positions=at[:, here], k_valid=valid[:, here],
                **the_rest,
            )
            for here in (slice(128, None), slice(128))
        )  # fmt: skip
        want = attend(q, k, v, k_positions=at, k_valid=valid, **the_rest)
        return want, join_parts(*parts)[0]

    want, got = both(q, k, v, valid, at, how["window"])
    real = np.asarray(valid[:, 128:])
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=1e-5)
    assert np.isfinite(got).all()


def test_the_kernel_reads_parts_too():
    q, k, v, valid, at, how = part_of(np.random.default_rng(1))
    real = np.asarray(valid[:, 128:])
    for own, here in ((True, slice(128, None)), (False, slice(128))):
        keys = {"k_positions": at[:, here], "k_valid": valid[:, here]}
        mixed, sums = attend_part(q, k[:, here], v[:, here], q_positions=at[:, 128:], **keys, **how)
        got, found = attend_part_by_kernel(
            q, k[:, here], v[:, here], valid=valid[:, 128:], k_valid=valid[:, here], own=own,
            scale=0.2, cap=9.0, block=128, interpret=True,
        )  # fmt: skip
        assert np.isfinite(got).all() and np.isfinite(found).all()
        # A part of padding alone counts nothing, whatever is mixed of it.
        some = real & np.asarray(valid[:, here].any(1))[:, None]
        np.testing.assert_allclose(np.asarray(got)[some], np.asarray(mixed)[some], atol=1e-5)
        np.testing.assert_allclose(np.asarray(found)[some], np.asarray(sums)[some], atol=1e-5)
        assert (np.asarray(found)[real & ~some] < -1e30).all()


@pytest.mark.slow
def test_a_model_reads_parts_with_the_kernel(monkeypatch):
    config = small_config(head_dim=64, n_layers=1, n_heads=2, n_kv_heads=1)
    params, calls = small_params(config), []
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 97, (1, 256)), jnp.int32)
    valid = jnp.ones((1, 256), bool)

    def simulated(*args, own, **how):
        calls.append(own)
        return attend_part_by_kernel(*args, own=own, **how, block=128, interpret=True)

    def read(chunk):
        cache = empty_cache(config, 1, 260, jnp.float32)
        return forward(config, params, tokens, valid, cache, slots=256, chunks=reading(chunk, 256))

    want, _, _ = read(0)
    monkeypatch.setattr(prompt_attention, "serves", lambda config, length, dtype: length == 128)
    monkeypatch.setattr(prompt_attention, "attend_part_by_kernel", simulated)
    assert_close(read(128)[0], want)
    assert set(calls) == {True, False}
    far = dataclasses.replace(config, sliding_window=40, sliding_layers=(True,))
    assert not prompt_attention.serves_parts(far, 128, 128, "float32")


@pytest.mark.parametrize(
    ("chunk", "recipe", "message"),
    [
        (-1, None, "up to 128 tokens or a multiple of 128, such as 2048.*got -1"),
        (200, "ttq", "got 200"),
        (64, "paper", "prefill = 'quantized'.*known when the whole prompt"),
        (64, preset("ttq", prefill="both"), "prefill = 'both'"),
    ],
)
def test_what_cannot_be_read_in_parts_is_refused(chunk, recipe, message):
    recipe = preset(recipe) if isinstance(recipe, str) else recipe
    with pytest.raises(ConfigError, match=f"prefill_chunk: .*{message}"):
        check_chunk(chunk, recipe)
    check_chunk(0, recipe)
    check_chunk(2048, preset("best"))
    # Weights that are there before any prompt may read it.
    check_chunk(64, dataclasses.replace(preset("rtn"), prefill="quantized"))

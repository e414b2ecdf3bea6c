"""Whose moments: blends and conversations as weighted sums, up to the weights that follow."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import prompts_of, random_rows, small_config, small_params

from ttq_jax.config import ConfigError
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, plain
from ttq_jax.prefill import first_turn, prefill
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.grid import Grid
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.scaling import PowerLaw, SearchedAlpha
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.quant.source import Source, blend
from ttq_jax.types import SITES, Moments, Offline

CONFIG = small_config(
    d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, embed_dim=16
)
PARAMS = small_params(CONFIG)
WIDTHS = {"attn_in": 16, "attn_out": 16, "mlp_in": 16, "mlp_out": 24}
LENGTH = 24


@jax.jit
def activations(tokens):
    """What every site reads, [L, B, T, d_in]."""
    keep = lambda site, x, weights: (plain(site, x, weights)[0], x)  # noqa: E731
    cache = empty_cache(CONFIG, *tokens.shape, jnp.float32)
    return forward(CONFIG, PARAMS, tokens, jnp.ones(tokens.shape, bool), cache, project=keep)[2]


def sums_of(row, site, layer, powers):
    """(Σ|x|^p per power, Σ x xᵀ) over a row of tokens, by NumPy."""
    x = np.asarray(activations(jnp.asarray([row]))[site][layer, 0], np.float64)
    return np.stack([(np.abs(x) ** p).sum(0) for p in powers]), x.T @ x


@partial(jax.jit, static_argnames="recipe")
def read(prompts, offline, recipe):
    cache = empty_cache(CONFIG, *prompts.tokens.shape, jnp.float32)
    _, _, packed, moments, _ = prefill(
        PARAMS, prompts, cache, config=CONFIG, recipe=recipe, offline=offline
    )
    return packed, moments


def corpus(recipe, row):
    """A corpus's moments, of one window, per site."""
    powers, out = recipe.reads.powers, {}
    for site, width in WIDTHS.items():
        sums = np.stack([sums_of(row, site, layer, powers)[0] for layer in range(2)])
        assert sums.shape == (2, len(powers), width)
        count = jnp.full(2, float(len(row)), jnp.float32)
        out[site] = Moments(jnp.asarray(sums, jnp.float32), count, powers=powers)
    return out


@pytest.mark.parametrize(
    ("scale", "rounding"), [(PowerLaw(), ClipSearch(steps=3)), (SearchedAlpha(steps=4), None)]
)
def test_an_infinite_prior_is_the_corpus_recipe(scale, rounding):
    knobs = {"scale": scale, "grid": Grid(bits=3, group_size=8, store_dtype="float32")}
    if rounding is not None:
        knobs["rounding"] = rounding
    offline_recipe = Recipe(moments="corpus", **knobs)
    blended = Recipe(moments=Source(prior="corpus", prior_tokens=np.inf), **knobs)
    offline = Offline(moments=corpus(offline_recipe, random_rows([40], seed=3)[0]))
    prompts = prompts_of(random_rows([20]), LENGTH)
    theirs, _ = read(prompts, offline, offline_recipe)
    ours, _ = read(prompts, offline, blended)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_prior_of_next_to_nothing_is_the_prompt_recipe_and_more_of_it_is_not():
    how = {"grid": Grid(bits=3, group_size=8), "select": "layers/o"}
    alone = Recipe(**how)
    prompts = prompts_of(random_rows([20]), LENGTH)
    offline = Offline(moments=corpus(alone, random_rows([40], seed=3)[0]))
    want = read(prompts, Offline(), alone)[0]["layers"]["o"]["kernel"]
    for tokens, same in ((1e-30, True), (20.0, False)):
        blended = Recipe(moments=Source(prior="corpus", prior_tokens=tokens), **how)
        got = read(prompts, offline, blended)[0]["layers"]["o"]["kernel"]
        equal = jax.tree.map(lambda a, b: bool((a == b).all()), got, want)
        assert all(jax.tree.leaves(equal)) == same


def moments(seed, count, d_in=9, gram=True):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, d_in)) * np.exp(rng.normal(size=d_in))
    sums = np.stack([np.abs(x).sum(0), (x**2).sum(0)])
    blocks = (x.T @ x)[None] if gram else None
    return Moments(*(None if a is None else jnp.asarray(a, jnp.float32)
                     for a in (sums, float(count), blocks)), powers=(1.0, 2.0))  # fmt: skip


def test_a_blend_is_the_weighted_sum_and_lies_between():
    seen, prior = moments(0, 20), moments(1, 500)
    ends = [np.asarray(m.mean_power(2.0)) for m in (seen, prior)]
    at = []
    for n in (1.0, 20.0, 300.0):
        got = blend(seen, prior, Source(prior="corpus", prior_tokens=n))
        assert got.count == 20 + n
        for mixed, ours, theirs in zip(
            (got.sums, got.gram), (seen.sums, seen.gram), (prior.sums, prior.gram), strict=True
        ):
            want = np.asarray(ours, np.float64) + n * np.asarray(theirs, np.float64) / 500
            np.testing.assert_allclose(mixed, want, rtol=1e-5, atol=1e-4)
        at.append(np.asarray(got.mean_power(2.0)))
    path = [ends[0], *at, ends[1]]
    rising = ends[1] > ends[0]
    for before, after in itertools.pairwise(path):
        assert ((after > before) == rising).all()
    assert blend(seen, None, Source()) is seen
    assert blend(seen, prior, Source()) is seen


@pytest.mark.parametrize("tokens", [30.0, np.inf])
def test_a_prior_from_weights_has_no_unit(tokens):
    seen, source = moments(0, 20), Source(prior="weights", prior_tokens=tokens)
    one = dataclasses.replace(moments(2, 1), count=jnp.ones(()))
    one = dataclasses.replace(one, gram=jnp.diagonal(one.gram[0])[:, None, None])
    got = blend(seen, one, source)
    for unit in (1e-4, 7.0, 1e5):
        other = dataclasses.replace(
            one, sums=one.sums * jnp.asarray([[unit], [unit**2]], jnp.float32),
            gram=one.gram * unit**2,
        )  # fmt: skip
        same = blend(seen, other, source)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), same, got)
    # In the prompt's unit: the prior alone has the prompt's mean powers, and its own profile.
    if np.isinf(tokens):
        assert got.count == 1
        np.testing.assert_allclose(got.sums.mean(1), seen.sums.mean(1) / 20, rtol=1e-5)
        np.testing.assert_allclose(np.trace(got.gram[0]), np.trace(seen.gram[0]) / 20, rtol=1e-5)
        assert np.count_nonzero(got.gram) == len(one.gram)
        ratio = got.sums / one.sums
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-5)
    # A prompt of zeros, or a model of zeros, stays finite.
    for a, b in ((seen.scaled(0.0), one), (seen, one.scaled(0.0))):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(blend(a, b, source)))


@pytest.mark.parametrize(("decay", "span"), [(1.0, 0), (0.5, -1)])
def test_a_conversation_is_the_decayed_sum_of_its_turns(decay, span):
    recipe = Recipe(
        moments=Source(decay=decay), scale=PowerLaw(), grid=Grid(bits=3, group_size=8),
        select="layers/o", rounding=SecondOrder(steps=1) if span else Recipe().rounding,
    )  # fmt: skip
    turns, carried = random_rows([20, 11, 24], seed=5), first_turn(PARAMS, CONFIG, recipe)
    for turn in turns:
        _, carried = read(prompts_of([turn], LENGTH), Offline(carried=carried), recipe)
    weights = [decay**2, decay, 1.0]
    assert set(carried) == set(SITES)
    for site, layer in (("attn_in", 0), ("attn_out", 1), ("mlp_in", 1), ("mlp_out", 0)):
        each = [sums_of(turn, site, layer, (2.0,)) for turn in turns]
        at = jax.tree.map(lambda a, layer=layer: a[layer], carried[site])
        sums, gram = (sum(w * s[i] for w, s in zip(weights, each, strict=True)) for i in (0, 1))
        np.testing.assert_allclose(at.sums, sums, rtol=1e-4)
        np.testing.assert_allclose(at.count, np.dot(weights, [20, 11, 24]))
        assert (at.gram is None) == (span == 0)
        if span:
            np.testing.assert_allclose(at.gram[0], gram, rtol=1e-3, atol=1e-4 * gram.max())


def test_a_turn_is_quantized_for_what_was_said_before():
    recipe = Recipe(moments=Source(decay=1.0), grid=Grid(bits=3, group_size=8), select="layers/o")
    first, second = random_rows([20, 11], seed=5)
    start = Offline(carried=first_turn(PARAMS, CONFIG, recipe))
    _, carried = read(prompts_of([first], LENGTH), start, recipe)
    packed, _ = read(prompts_of([second], LENGTH), Offline(carried=carried), recipe)
    kernel = packed["layers"]["o"]["kernel"]
    for layer in (0, 1):
        power = sum(sums_of(row, "attn_out", layer, (2.0,))[0][0] for row in (first, second)) / 31
        root = np.sqrt(power)
        want = (root / root.mean() + 0.4) ** 0.5
        # Stored in bfloat16: 8 bits.
        np.testing.assert_allclose(
            np.asarray(kernel.channel_scale[layer], np.float64), want, rtol=2**-8
        )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"of": "mine"}, "moments.of: expected one of none, corpus, prompt, got 'mine'"),
        ({"prior": "mine"}, "moments.prior: expected one of none, corpus, weights, samples"),
        ({"decay": 1.5}, "0 <= decay <= 1"),
        ({"prior": "corpus"}, "expected a prior with prior_tokens above 0"),
        ({"prior_tokens": 5.0}, "expected a prior with prior_tokens above 0"),
        ({"of": "corpus", "decay": 0.5}, "need moments of the prompt"),
        ({"of": "none", "refresh": 4}, "need moments of the prompt"),
        ({"prior": "corpus", "prior_tokens": float("nan")}, "prior_tokens >= 0"),
    ],
)
def test_sources_that_make_no_sense_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        Source(**knobs)


def test_what_a_source_needs():
    assert not Source().keeps
    assert Source(decay=0.5).keeps
    assert Source(refresh=8).keeps
    assert Source(of="corpus").reads_corpus
    assert Source(prior="corpus", prior_tokens=3.0).reads_corpus
    for prior in ("weights", "samples"):
        assert not Source(prior=prior, prior_tokens=3.0).reads_corpus
        assert Recipe(moments=Source(prior=prior, prior_tokens=3.0)).reads_offline

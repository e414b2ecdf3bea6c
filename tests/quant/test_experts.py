"""Mixtures of experts: who reads which weight, and from which tokens it is made."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from oracle import round_groups
from small import prompts_of, random_rows, small_config, small_params

from ttq_jax.experts import gather_tokens, routed_linear, rows_per_block, sort_by_expert
from ttq_jax.generate import generate_tokens
from ttq_jax.linear import dense_weight
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, plain
from ttq_jax.offline.prior import for_unreached, prior_from_weights
from ttq_jax.prefill import decoded_shapes, first_turn, last_hidden, prefill
from ttq_jax.quant.grid import Grid
from ttq_jax.quant.moments import Reads
from ttq_jax.quant.presets import preset
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.quant.source import Source
from ttq_jax.quant.tree import quantize_params, replace_kernels, static_factors
from ttq_jax.quant.widths import Width
from ttq_jax.sampling import Sampling
from ttq_jax.sites import observing
from ttq_jax.types import Offline, effective_bits, kernels

E, K = 6, 2
CONFIG = small_config(
    d_model=32, embed_dim=32, n_heads=2, n_kv_heads=1, d_ff=24, n_experts=E, experts_per_token=K,
    norm_topk=True,
)  # fmt: skip
PARAMS = small_params(CONFIG)
PARAMS["layers"]["router"]["embedding"] *= 20.0
GRID = Grid(bits=4, group_size=8, store_dtype="float32")
TTQ = Recipe(grid=GRID)


def offline_of(recipe):
    return Offline(
        moments=for_unreached(
            PARAMS,
            prior_from_weights(PARAMS, config=CONFIG, reads=recipe.reads)
            if recipe.source.prior == "weights" else {},
            config=CONFIG, reads=recipe.reads,
        ),
        low_rank=static_factors(PARAMS, recipe),
    )  # fmt: skip


@partial(jax.jit, static_argnames="recipe")
def read(params, prompts, offline, recipe=TTQ):
    cache = empty_cache(CONFIG, *prompts.tokens.shape, jnp.float32)
    hidden, _, packed, _, unreached = prefill(
        params, prompts, cache, config=CONFIG, recipe=recipe, offline=offline
    )
    return last_hidden(hidden, prompts), packed, unreached


@jax.jit
def routing(params, prompts):
    """Per site what its experts get: rows [L, N, R, d], tokens [L, N, R] and experts [L, N]."""
    keep = lambda site, x, weights: (plain(site, x, weights)[0], x)  # noqa: E731
    cache = empty_cache(CONFIG, *prompts.tokens.shape, jnp.float32)
    seen = forward(CONFIG, params, prompts.tokens, prompts.valid, cache, project=keep)[2]
    return {site: (x.rows, x.token, x.expert) for site, x in seen.items() if "mlp" in site}


def rows_of(got, layer, expert, valid):
    """The activations of one expert's real tokens, float64."""
    rows, token, owner = (np.asarray(a[layer]) for a in got)
    real = np.append(np.asarray(valid).reshape(-1), False)[token] & (owner == expert)[:, None]
    return rows[real].astype(np.float64)


PROMPTS = prompts_of(random_rows([5, 3], seed=3), 8)
REACHED = routing(PARAMS, PROMPTS)
COUNTS = np.array([
    [len(rows_of(REACHED["mlp_in"], layer, e, PROMPTS.valid)) for e in range(E)]
    for layer in range(CONFIG.n_layers)
])  # fmt: skip


def test_the_prompts_of_these_tests_reach_some_experts_and_not_others():
    assert COUNTS.sum() == CONFIG.n_layers * 8 * K
    assert (COUNTS == 0).any() and (COUNTS > 3).any()


CHOICES = {
    "even": lambda rng, m: np.stack([rng.permutation(E)[:K] for _ in range(m)]),
    "all-to-two": lambda rng, m: np.broadcast_to([4, 1], (m, K)),
    "one-alone": lambda rng, m: np.stack([[e % E, (e + 1) % E] for e in range(m)]),
}


@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
@pytest.mark.parametrize("how", list(CHOICES))
def test_blocks_hold_every_row_once_and_sums_come_back(how, tokens):
    rng = np.random.default_rng(tokens)
    chosen = CHOICES[how](rng, tokens).astype(np.int32)
    valid = rng.random(tokens) < 0.8
    valid[0] = True
    x, w = rng.normal(size=(tokens, 3)), rng.normal(size=(E, 3, 5))
    share = rng.random((tokens, K))
    as_jax = [jnp.asarray(a, jnp.float32) for a in (x, w, share)]

    @jax.jit
    def run(x, w, share):
        routed, place = sort_by_expert(x, jnp.asarray(chosen), jnp.asarray(valid), E)
        ys = routed_linear(routed, {"up": {"kernel": w}})["up"]
        return routed, gather_tokens(ys, place, share)

    routed, got = run(*as_jax)
    size = rows_per_block(tokens * K, E)
    assert routed.rows.shape[1] == size and len(routed.rows) <= tokens * K
    counts = np.bincount(chosen[valid].ravel(), minlength=E)
    np.testing.assert_array_equal(np.diff(routed.first), -(-counts // size))
    for e in range(E):
        blocks = slice(int(routed.first[e]), int(routed.first[e + 1]))
        assert (np.asarray(routed.expert)[blocks] == e).all()
        held = np.asarray(routed.token)[blocks].ravel()
        mine = [i for i in range(tokens) if valid[i] and e in chosen[i]]
        np.testing.assert_array_equal(held[held < tokens], mine)
    want = sum(share[:, [j]] * np.einsum("td,tdo->to", x, w[chosen[:, j]]) for j in range(K))
    np.testing.assert_allclose(got, np.where(valid[:, None], want, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_moments_are_those_of_the_tokens_that_reach_an_expert(side):
    rows = random_rows([5, 3], seed=3)
    prompts, reads = prompts_of(rows, 8, side), Reads((1.0, 2.0), -1)

    @jax.jit
    def moments():
        cache = empty_cache(CONFIG, 2, 8, jnp.float32)
        see = observing(prompts.valid, reads)
        return forward(CONFIG, PARAMS, prompts.tokens, prompts.valid, cache, project=see)[2]

    got = moments()
    np.testing.assert_array_equal(got["mlp_in"].count, COUNTS)
    np.testing.assert_array_equal(got["mlp_out"].count, COUNTS)
    for site, width in (("mlp_in", 32), ("mlp_out", 24)):
        for layer, e in np.ndindex(*COUNTS.shape):
            x = rows_of(REACHED[site], layer, e, PROMPTS.valid)
            sums = np.stack([np.abs(x).sum(0), (x**2).sum(0)])
            np.testing.assert_allclose(got[site].sums[layer, e], sums, rtol=1e-3, atol=1e-6)
            gram = got[site].gram[layer, e, 0, :width, :width]
            np.testing.assert_allclose(gram, x.T @ x, rtol=1e-3, atol=1e-4)


def ttq_by_numpy(w, power):
    """Ŵ of a weight whose inputs have this mean square per channel, as the paper has it."""
    rms = np.sqrt(power)
    d = (rms / rms.mean() + 0.4) ** 0.5
    d = np.asarray(d, np.float32).astype(np.float64)[:, None]
    return round_groups(w * d, 4, 8, False, "float", "float32") / d


def test_an_expert_is_quantized_from_its_own_tokens_or_from_the_prior():
    _, packed, unreached = read(PARAMS, PROMPTS, offline_of(TTQ))
    assert float(unreached) == pytest.approx((COUNTS == 0).mean())
    prior = prior_from_weights(PARAMS, config=CONFIG, reads=TTQ.reads)
    for name, site in (("gate", "mlp_in"), ("up", "mlp_in"), ("down", "mlp_out")):
        got = np.asarray(dense_weight(packed["layers"][name]["kernel"]))
        for layer, e in np.ndindex(*COUNTS.shape):
            x = rows_of(REACHED[site], layer, e, PROMPTS.valid)
            power = (x**2).mean(0) if len(x) else np.asarray(prior[site].sums[layer, e, 0])
            w = np.asarray(PARAMS["layers"][name]["kernel"][layer, e], np.float64)
            want = ttq_by_numpy(w, power)
            # A tie may break the other way in float32: such a weight sits one step off.
            off = np.abs(got[layer, e] - want) > 1e-4 * np.abs(w).max()
            assert off.mean() < 0.01, (name, layer, e)


def spoiled(params, spoil):
    """With NaN in the weights of some experts, [L, E]."""
    bad = jnp.asarray(spoil)[:, :, None, None]
    dense = {n: params["layers"][n]["kernel"] for n in ("gate", "up", "down")}
    return replace_kernels(params, {n: jnp.where(bad, jnp.nan, w) for n, w in dense.items()})


def test_an_expert_that_no_token_chose_is_not_read():
    """Neither by the prompt nor, one token at a time, afterwards; padding chooses none."""

    @jax.jit
    def run(params):
        cache = empty_cache(CONFIG, 2, 8, jnp.float32)
        return forward(CONFIG, params, PROMPTS.tokens, PROMPTS.valid, cache)[0]

    real = np.asarray(PROMPTS.valid)
    got, want = run(spoiled(PARAMS, COUNTS == 0)), run(PARAMS)
    np.testing.assert_array_equal(got[real], want[real])
    assert np.isnan(run(spoiled(PARAMS, COUNTS > 0))[real]).any()
    alone = prompts_of(random_rows([1], seed=3), 1)
    chosen = np.zeros((CONFIG.n_layers, E), bool)
    for layer, e in enumerate(np.asarray(routing(PARAMS, alone)["mlp_in"][2])):
        chosen[layer, e] = True
    assert chosen.sum() == CONFIG.n_layers * K
    step = jax.jit(lambda params: read(params, alone, Offline(), None)[0])
    np.testing.assert_array_equal(step(spoiled(PARAMS, ~chosen)), step(PARAMS))


RECIPES = {
    "paper": dataclasses.replace(TTQ, prefill="quantized"),
    "second-order": dataclasses.replace(
        TTQ, rounding=SecondOrder(), moments=Source(prior="weights", prior_tokens=4.0)
    ),
    "low-rank": dataclasses.replace(
        TTQ, low_rank=dataclasses.replace(TTQ.low_rank, rank=2, error_rank=2)
    ),
    "widths": dataclasses.replace(
        TTQ, widths=(Width(select="layers/1/down", bits=3), Width(select="layers/0/up", bits=2))
    ),
    "widths-paper": dataclasses.replace(
        TTQ, prefill="quantized", widths=(Width(select="layers/1/(gate|down)", bits=3),)
    ),
    "some": dataclasses.replace(TTQ, select="layers/(q|down)"),
}  # fmt: skip


def matrices(tree):
    """Each kernel as the matrix it stands for, widths gathered in layer order."""
    out = {}
    for name, kernel in kernels(tree["layers"]).items():
        if hasattr(kernel, "stacks"):
            parts = [dense_weight(one) for one in kernel.stacks]
            pairs = zip(np.asarray(kernel.which), np.asarray(kernel.slot), strict=True)
            kernel = jnp.stack([parts[w][s] for w, s in pairs])
        out[name] = kernel if hasattr(kernel, "ndim") else dense_weight(kernel)
    return out


@pytest.mark.parametrize("name", slow_but(RECIPES, ["second-order", "low-rank", "widths-paper"]))
def test_packed_experts_answer_as_the_matrices_they_stand_for(name):
    recipe = RECIPES[name]
    given = offline_of(recipe)
    hidden, packed, _ = read(PARAMS, PROMPTS, given, recipe)
    dense = replace_kernels(packed, matrices(packed))
    got, _, _ = read(packed, PROMPTS, Offline(), None)
    want, _, _ = read(dense, PROMPTS, Offline(), None)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    reader = packed if recipe.prefill == "quantized" else PARAMS
    want, _, _ = read(reader, PROMPTS, Offline(), None)
    np.testing.assert_allclose(hidden, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    shapes = decoded_shapes(PARAMS, CONFIG, recipe, given)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), packed
    )
    assert 2 < effective_bits(packed) < 32


def test_packed_ahead_is_packed_in_the_program():
    recipe = preset("rtn", bits=4, group_size=8)
    _, packed, unreached = read(PARAMS, PROMPTS, Offline(), recipe)
    assert unreached is None
    ahead = quantize_params(PARAMS, recipe, Offline())
    jax.tree.map(np.testing.assert_array_equal, packed["layers"], ahead["layers"])


def answer(prompts, recipe, given, **changes):
    how = {"config": CONFIG, "recipe": recipe, "sampling": Sampling(), "capacity": 8,
           "eos_ids": ()} | changes  # fmt: skip
    limit = jnp.asarray(8, jnp.int32)
    return generate_tokens(PARAMS, prompts, given, jax.random.key(0), limit, **how)[:-1]


def test_prompts_of_a_batch_may_have_a_tree_each():
    recipe = dataclasses.replace(TTQ, batch="per_prompt")
    rows, given = random_rows([5, 3], seed=3), offline_of(TTQ)
    out, _, finite, _, unreached = answer(prompts_of(rows, 8), recipe, given)
    assert finite
    shares = []
    for row, got in zip(rows, out, strict=True):
        alone, _, _, _, share = answer(prompts_of([row], 8), TTQ, given)
        np.testing.assert_array_equal(got, alone[0])
        shares.append(float(share))
    assert float(unreached) == pytest.approx(np.mean(shares))


def test_a_conversation_reaches_more_experts_with_every_turn():
    source = Source(prior="weights", prior_tokens=4.0, decay=0.5, refresh=3)
    recipe = dataclasses.replace(TTQ, moments=source)
    given = dataclasses.replace(offline_of(recipe), carried=first_turn(PARAMS, CONFIG, recipe))
    *_, moments, first = answer(PROMPTS, recipe, given)
    # A refresh counts the generated tokens too: seven of each row were read.
    assert np.all(moments["mlp_in"].count.sum(1) == (8 + 2 * 7) * K)
    given = dataclasses.replace(given, carried=moments)
    *_, second = answer(prompts_of(random_rows([4], seed=8), 8), recipe, given)
    assert float(second) < float(first) == pytest.approx((COUNTS == 0).mean())


def test_experts_need_a_prior():
    with pytest.raises(ValueError, match="expected a prior for experts that no token reaches"):
        read(PARAMS, PROMPTS, Offline(), TTQ)

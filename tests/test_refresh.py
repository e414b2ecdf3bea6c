"""Refresh while decoding against a loop by hand, and the prior from the model's own weights."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import OPT, prompts_of, random_rows, small_config, small_params

from ttq_jax.evaluation.perplexity import Protocol, score_window
from ttq_jax.generate import generate_tokens
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits, plain
from ttq_jax.offline.prior import prior_from_weights
from ttq_jax.prefill import first_turn, last_hidden, prefill, requantize
from ttq_jax.quant.grid import Grid
from ttq_jax.quant.moments import Reads
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.source import Source
from ttq_jax.sampling import Sampling
from ttq_jax.types import Moments, Offline

CONFIG = small_config(
    d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, embed_dim=16
)
PARAMS = small_params(CONFIG)
LENGTH, CAPACITY, EVERY = 16, 14, 4
# Everything that a refresh must carry on: earlier turns, a prior, several projections.
REFRESHING = Recipe(
    moments=Source(prior="weights", prior_tokens=5.0, decay=0.5, refresh=EVERY),
    grid=Grid(bits=2, group_size=8), select="layers/(v|down)",
)  # fmt: skip
PRIOR = prior_from_weights(PARAMS, config=CONFIG, reads=REFRESHING.reads)
WINDOW = Protocol(window=30, prompt_tokens=LENGTH)


def offline(recipe):
    """With a first turn already behind it."""
    begun = jax.tree.map(lambda a: a + 3.0, first_turn(PARAMS, CONFIG, recipe))
    return Offline(moments=PRIOR, carried=begun)


@partial(jax.jit, static_argnames="recipe")
def read(prompts, offline, recipe):
    batch, length = prompts.tokens.shape
    cache = empty_cache(CONFIG, batch, length + CAPACITY, jnp.float32)
    hidden, cache, packed, moments, _ = prefill(
        PARAMS, prompts, cache, config=CONFIG, recipe=recipe, offline=offline
    )
    return last_hidden(hidden, prompts), cache, packed, moments


@jax.jit
def one_token(tree, token, cache):
    """Hidden state, cache, and what every site read, [L, B, d_in]."""
    keep = lambda site, x, weights: (plain(site, x, weights)[0], x[:, 0])  # noqa: E731
    hidden, cache, seen = forward(
        CONFIG, tree, token[:, None], jnp.ones((len(token), 1), bool), cache, project=keep
    )
    return hidden[:, 0], cache, seen


again = jax.jit(requantize, static_argnames="recipe")
scores = jax.jit(partial(logits, CONFIG))


def added(moments, seen, live):
    """The moments with a token of each live row, by NumPy."""
    out = {}
    for site, old in moments.items():
        power = (np.asarray(seen[site], np.float64) ** 2)[:, live].sum(1)
        out[site] = Moments(
            old.sums + jnp.asarray(power[:, None], jnp.float32), old.count + float(live.sum()),
            powers=old.powers,
        )  # fmt: skip
    return out


def by_hand(prompts, recipe, given, limit, eos=(), refreshing=True):
    """Greedy tokens of a Python loop, how many of each row count, and the moments at its end."""
    hidden, cache, tree, moments = read(prompts, given, recipe)
    rows, counts = [], np.zeros(len(hidden), int)
    done = np.zeros(len(hidden), bool)
    for step in range(limit):
        if step:
            hidden, cache, seen = one_token(tree, jnp.asarray(rows[-1]), cache)
            moments = added(moments, seen, ~done)
        rows.append(np.asarray(scores(tree, hidden)).argmax(-1).astype(np.int32))
        done |= np.isin(rows[-1], eos)
        counts += ~done
        if done.all():
            break
        if refreshing and step and step % recipe.source.refresh == 0:
            tree = again(PARAMS, moments, recipe, given)
    return np.stack(rows, 1), counts, moments


def arguments(prompts, recipe, given, limit, eos=()):
    dynamic = PARAMS, prompts, given, jax.random.key(0), jnp.asarray(limit, jnp.int32)
    static = {"config": CONFIG, "recipe": recipe, "sampling": Sampling(), "capacity": CAPACITY,
              "eos_ids": eos}  # fmt: skip
    return dynamic, static


def test_a_refreshing_program_is_the_loop_by_hand_and_compiles_once():
    given = offline(REFRESHING)
    batches = [prompts_of(random_rows(lengths, seed=seed), LENGTH)
               for lengths, seed in (([16, 9], 1), ([3, 16], 2), ([5, 5], 3))]  # fmt: skip
    # An end token that one row meets after a few tokens and the other much later, if ever: what
    # follows it must not be observed.
    tokens, _, _ = by_hand(batches[0], REFRESHING, given, CAPACITY)
    early = {*tokens[0, :2].tolist(), *tokens[1, :9].tolist()}
    eos = next((t,) for t in tokens[0, 2:6].tolist() if t not in early)
    before, changed = generate_tokens._cache_size(), []
    for prompts, limit in zip(batches, (CAPACITY, 10, 1), strict=True):
        dynamic, static = arguments(prompts, REFRESHING, given, limit, eos)
        out, counts, finite, moments, *_ = generate_tokens(*dynamic, **static)
        want, real, last = by_hand(prompts, REFRESHING, given, limit, eos)
        assert counts.tolist() == real.tolist()
        assert finite
        for row, other, n in zip(np.asarray(out), want, real, strict=True):
            np.testing.assert_array_equal(row[:n], other[:n])
        for site, got in moments.items():
            np.testing.assert_allclose(got.sums, last[site].sums, rtol=1e-3)
            np.testing.assert_array_equal(got.count, last[site].count)
        without, _, _ = by_hand(prompts, REFRESHING, given, limit, eos, refreshing=False)
        np.testing.assert_array_equal(without[:, : EVERY + 1], want[:, : EVERY + 1])
        changed.append(without.shape != want.shape or (without != want).any())
        if prompts is batches[0]:
            assert real[0] < 6 <= 9 <= real[1]
            assert last["attn_in"].count[0] < 0.5 * 3.0 + 25 + 2 * (CAPACITY - 1)
    assert generate_tokens._cache_size() == before + 1
    # The refreshes are seen in the tokens, where there were any.
    assert changed[0]
    assert not changed[2]


def test_a_refresh_that_never_comes_changes_nothing():
    prompts, outs = prompts_of(random_rows([16, 9], seed=1), LENGTH), []
    for every in (0, 100):
        recipe = Recipe(
            moments=Source(decay=0.5, refresh=every), grid=Grid(bits=2), select="layers/v"
        )
        given = offline(recipe)
        dynamic, static = arguments(prompts, recipe, given, CAPACITY)
        program = generate_tokens.lower(*dynamic, **static).compile()
        outs.append(program(*dynamic))
        # Without a refresh, what is carried on is the earlier turns' and the prompt's alone.
        read_too = 2 * (CAPACITY - 1) if every else 0
        assert outs[-1][3]["attn_in"].count.tolist() == [0.5 * 3.0 + 25 + read_too] * 2
    np.testing.assert_array_equal(outs[0][0], outs[1][0])
    np.testing.assert_array_equal(outs[0][1], outs[1][1])


def test_a_refreshing_window_is_scored_as_it_would_be_decoded():
    given, length = offline(REFRESHING), WINDOW.prompt_tokens
    window = np.asarray(random_rows([WINDOW.window], seed=6)[0], np.int32)
    got = score_window(
        PARAMS, jnp.asarray(window), given, config=CONFIG, recipe=REFRESHING, protocol=WINDOW
    )
    prompts, sums = prompts_of([window[:length].tolist()], LENGTH), []
    for refreshing in (True, False):
        hidden, cache, tree, moments = read(prompts, given, REFRESHING)
        nll = []
        for i, token in enumerate(window[length:]):
            z = np.asarray(scores(tree, hidden)[0], np.float64)
            nll.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[token])
            if i + 1 == WINDOW.scored:
                break
            hidden, cache, seen = one_token(tree, jnp.asarray([token]), cache)
            moments = added(moments, seen, np.array([True]))
            if refreshing and (i + 1) % EVERY == 0:
                tree = again(PARAMS, moments, REFRESHING, given)
        assert len(nll) == WINDOW.scored
        sums.append(sum(nll))
    np.testing.assert_allclose(got, sums[0], rtol=1e-4)
    # The score can tell: without a refresh it is another one.
    assert abs(sums[1] - got) > 1e-3 * got


VARIANTS = {
    "pre": {},
    "post": {"norm_placement": "post"},
    "branch": {"norm_placement": "branch", "embed_scale": 2.0, "residual_scale": 0.5},
    "gemma": {"norm": "rms_plus_one", "norm_placement": "sandwich", "activation": "gelu_tanh"},
    "opt": {k: v for k, v in OPT.items() if k != "n_kv_heads"},
}


def normal_mean(f):
    """E[f(z)] of a standard normal z."""
    z = np.linspace(-9, 9, 20001)
    return np.sum(f(z) * np.exp(-(z**2) / 2)) / np.sum(np.exp(-(z**2) / 2))


def activation(name, z):
    if name == "silu":
        return z / (1 + np.exp(-z))
    if name == "relu":
        return np.maximum(z, 0)
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def deviation(config, up, gate):
    """What taking up and gate for independent may cost of E[up² act(gate)²], relative to it.

    With correlation ρ it is ρ² (E[z² a²] / E[a²] − 1), a the activation of a normal z.
    """
    act = partial(activation, config.activation)
    sizes = np.sqrt((gate**2).mean(0))
    excess = np.array(
        [normal_mean(lambda z, s=s: z**2 * act(z * s) ** 2)
         / normal_mean(lambda z, s=s: act(z * s) ** 2) for s in sizes]
    ) - 1  # fmt: skip
    rho = (up * gate).mean(0) / np.sqrt((up**2).mean(0) * (gate**2).mean(0))
    return rho**2 * np.abs(excess)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prior_from_weights_is_white_noise_sent_through_the_block(variant):
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    rng, n = np.random.default_rng(0), 40000
    layers = {name: dict(leaf) for name, leaf in PARAMS["layers"].items()}
    for name, leaf in layers.items():
        biased = config.norm == "layer" if "norm" in name else config.qkv_bias
        if biased:
            width = leaf["scale" if "norm" in name else "kernel"].shape[-1]
            leaf["bias"] = jnp.asarray(0.3 * rng.normal(size=(2, width)), jnp.float32)
    tree = {"embed": PARAMS["embed"], "layers": layers}
    if variant == "branch":
        tree["layers"] = {n.replace("_norm", "_post_norm"): leaf for n, leaf in layers.items()}
    got = prior_from_weights(tree, config=config, reads=Reads((1.0, 2.0), -1))
    f64 = jax.tree.map(lambda a: np.asarray(a, np.float64), layers)

    def power_after(name, layer):
        """Of a normed vector: what the norm makes of a unit one, g times white noise plus b."""
        g = f64[f"{name}_norm"]["scale"][layer]
        shift = f64[f"{name}_norm"].get("bias", np.zeros((2, 16)))[layer]
        return (1 + g if config.norm == "rms_plus_one" else g) ** 2 + shift**2

    def through(x, name, layer):
        y = x @ f64[name]["kernel"][layer]
        # The noise has no sign of its own: each sample meets the bias with either.
        sign = rng.choice([-1.0, 1.0], size=(n, 1))
        return y + sign * f64[name]["bias"][layer] if "bias" in f64[name] else y

    for layer in (0, 1):
        at = {site: jax.tree.map(lambda a, layer=layer: a[layer], m) for site, m in got.items()}
        into = [power_after("attn", layer), power_after("mlp", layer)]
        if variant == "post":
            into = [power_after("mlp", layer - 1), power_after("attn", layer)]
        if variant == "branch":
            # Twice the embedding, and half of every norm that was added to it before.
            table = 2.0 * np.asarray(PARAMS["embed"]["embedding"], np.float64)
            into = [(table**2).mean(0)]
            for i in range(layer):
                into[0] = into[0] + (power_after("attn", i) + power_after("mlp", i)) / 4
            into.append(into[0] + power_after("attn", layer) / 4)
        for site, power in zip(("attn_in", "mlp_in"), into, strict=True):
            np.testing.assert_allclose(at[site].mean_power(2.0), power, rtol=1e-5)
        attn, mlp = (rng.normal(size=(n, 16)) * np.sqrt(power) for power in into)
        values = (through(attn, "v", layer) ** 2).mean(0).reshape(config.n_kv_heads, 8)
        mixed = np.repeat(values, config.n_heads // config.n_kv_heads, 0).ravel()
        # The mean of 40000 squares of a normal is known to 0.7 %: five of those.
        np.testing.assert_allclose(at["attn_out"].mean_power(2.0), mixed, rtol=0.035)
        act, up = partial(activation, config.activation), through(mlp, "up", layer)
        want, slack = (act(up) ** 2).mean(0), 0.0
        if config.gated:
            gate = through(mlp, "gate", layer)
            want, slack = (up**2 * act(gate) ** 2).mean(0), deviation(config, up, gate)
        # A product of two squares is known to 2 %; nine nodes integrate a kink to a few.
        off = np.abs(np.asarray(at["mlp_out"].mean_power(2.0)) / want - 1)
        assert (off <= 0.1 + slack).all()
        for m in at.values():
            assert m.count == 1
            np.testing.assert_allclose(m.gram[:, 0, 0], m.mean_power(2.0), rtol=1e-6)

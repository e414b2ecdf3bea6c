"""Every preset on every grid, jitted: compiled once, right, and inside the one program."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import round_groups
from small import prompts_of, random_rows, small_config, small_params

from ttq_jax.generate import generate_tokens
from ttq_jax.linear import dense_weight
from ttq_jax.offline.calibrate import observe_tokens
from ttq_jax.offline.prior import prior_from_weights
from ttq_jax.quant.convert import quantize_site
from ttq_jax.quant.grid import BITS, Grid
from ttq_jax.quant.head import head_of, joined
from ttq_jax.quant.lowrank import truncated_svd
from ttq_jax.quant.moments import Reads, observe
from ttq_jax.quant.presets import PRESETS, preset
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.scaling import SearchedAlpha
from ttq_jax.quant.tree import static_factors
from ttq_jax.sampling import Sampling
from ttq_jax.types import Offline

NAMES = [name for name, one in PRESETS.items() if one.recipe is not None]
GRIDS = [(symmetric, group) for symmetric in (False, True) for group in (8, 32, -1)]
# Every preset meets every width, every group size and both kinds of grid; over the presets, each
# width meets each of the six other choices.
SPACE = [
    (name, bits, *GRIDS[(i + 2 * j + j // 3) % 6])
    for i, name in enumerate(NAMES)
    for j, bits in enumerate(BITS)
]
D_IN, D_OUT = 44, 16


def test_the_design_covers_the_space():
    for name in NAMES:
        mine = [row for row in SPACE if row[0] == name]
        assert {row[1] for row in mine} == set(BITS)
        assert {row[2] for row in mine} == {False, True}
        assert {row[3] for row in mine} == {8, 32, -1}
    if len(NAMES) >= 6:
        assert len({row[1:] for row in SPACE}) == len(BITS) * len(GRIDS)


def moments_of(x, recipe):
    reads = recipe.reads
    if reads == Reads():
        return None
    return observe(jnp.asarray(x), jnp.ones(len(x), bool), reads)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_on_every_grid(name):
    rng = np.random.default_rng(0)
    w = {"q": rng.normal(size=(D_IN, D_OUT)).astype(np.float32)}
    scale = np.exp(rng.normal(size=D_IN))
    prompts = [(rng.normal(size=(30, D_IN)) * scale).astype(np.float32) for _ in range(2)]
    errors = {}
    for _, bits, symmetric, group in [row for row in SPACE if row[0] == name]:
        recipe = preset(name, bits=bits, symmetric=symmetric, group_size=group)
        factors = {}
        if recipe.low_rank.rank:
            factors = {"q": truncated_svd(jnp.asarray(w["q"]), recipe.low_rank.rank)}
        traced = []

        def run(weights, moments, factors, recipe=recipe, traced=traced):
            traced.append(None)
            return quantize_site(weights, moments, recipe, factors)[1]["q"]

        jitted, made = jax.jit(run), []
        for x in prompts:
            packed = jitted(jax.tree.map(jnp.asarray, w), moments_of(x, recipe), factors)
            assert (packed.bits, packed.zeros is None) == (bits, symmetric)
            assert packed.group_size == {8: 8, 32: 32, -1: 48}[group]
            made.append(np.asarray(dense_weight(packed)))
            wrong = np.linalg.norm(x @ (made[-1] - w["q"])) / np.linalg.norm(x @ w["q"])
            errors.setdefault(bits, []).append(wrong)
        assert len(traced) == 1
        per_prompt = recipe.reads != Reads()
        assert (made[0] != made[1]).any() == per_prompt
    # A code of one more bit halves the step; group and kind of grid cost less than that.
    worst = {bits: max(e) for bits, e in errors.items()}
    assert worst[2] < 1.5
    assert worst[3] < 0.45
    assert worst[8] < 0.02


def rules_of(name):
    """The kinds of choices that a preset makes."""
    recipe = PRESETS[name].recipe
    source = recipe.source
    return {
        ("scale", type(recipe.scale)),
        ("rounding", type(recipe.rounding)),
        ("prefill", recipe.prefill),
        ("moments", source.of),
        ("prior", source.prior),
        ("decay", source.decay > 0),
        ("refresh", source.refresh > 0),
        ("batch", recipe.batch),
        ("static", recipe.low_rank.rank > 0),
        ("error", recipe.low_rank.error_rank > 0),
        ("widths", len(recipe.widths) > 0),
    }


def covering():
    """Few presets that make every choice which any preset makes: programs are dear."""
    chosen = list(NAMES)
    for name in NAMES:
        others = [rules_of(other) for other in chosen if other != name]
        if rules_of(name) <= set().union(*others):
            chosen.remove(name)
    return chosen


CONFIG = small_config(
    d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, embed_dim=16
)
PARAMS = small_params(CONFIG)


@pytest.mark.parametrize("name", covering())
def test_every_kind_of_choice_in_the_one_program(name):
    bits, symmetric, group = SPACE[NAMES.index(name) * len(BITS) + 1][1:]
    # Two that read one input, and a ragged one: the others only make the program larger.
    knobs = {"bits": bits, "symmetric": symmetric, "group_size": group}
    recipe = preset(name, **knobs, select="layers/(q|v|down)")
    window = jnp.asarray(random_rows([32], seed=3), jnp.int32)
    moments = {}
    if recipe.source.reads_corpus:
        moments = observe_tokens(PARAMS, window, config=CONFIG, reads=recipe.reads)
    elif recipe.source.prior == "weights":
        moments = prior_from_weights(PARAMS, config=CONFIG, reads=recipe.reads)
    offline = Offline(
        moments=moments, low_rank=static_factors(PARAMS, recipe, moments),
        head=head_of(PARAMS, recipe),
    )  # fmt: skip
    params, offline = joined(PARAMS, recipe, offline)
    key, limit = jax.random.key(0), jnp.asarray(6, jnp.int32)
    how = {"config": CONFIG, "sampling": Sampling(), "capacity": 8, "eos_ids": ()}
    # A program compiled ahead refuses whatever it was not compiled for: it serves both prompts.
    program = generate_tokens.lower(
        params, prompts_of([[1]], 16), offline, key, limit, recipe=recipe, **how
    ).compile()
    outs = []
    for row in random_rows([16, 5], seed=4):
        out, counts, finite, *_ = program(params, prompts_of([row], 16), offline, key, limit)
        assert counts.tolist() == [6]
        assert finite
        assert ((out >= 0) & (out < CONFIG.vocab_size)).all()
        outs.append(np.asarray(out))
    assert (outs[0] != outs[1]).any()
    # Recipes are compared by value: one built again finds the same program.
    again = preset(name, **knobs, select="layers/(q|v|down)")
    assert again == recipe
    assert hash(again) == hash(recipe)


def test_a_shared_alpha_is_the_best_one_for_the_sum_of_errors():
    rng = np.random.default_rng(7)
    x = (rng.normal(size=(200, 64)) * np.exp(np.linspace(-2, 2, 64))).astype(np.float32)
    # Rows that grow and rows that shrink with their channel: each weight wants an α of its own.
    weights = {
        "q": rng.normal(size=(64, 24)),
        "k": rng.normal(size=(64, 8)) * np.exp(np.linspace(-3, 3, 64))[:, None],
        "v": rng.normal(size=(64, 8)) * np.exp(np.linspace(2, -2, 64))[:, None],
    }
    weights = {n: w.astype(np.float32) for n, w in weights.items()}
    m, h, steps = np.abs(x).mean(0), (x.astype(np.float64) ** 2).mean(0), 8

    def candidate(i):
        d = np.maximum(m / m.mean(), 1e-4) ** (i / steps)
        return d / np.sqrt(d.max() * d.min())

    def error(w, d):
        wrong = round_groups(w * d[:, None], 3, 32, False, "float") / d[:, None] - w
        return (h[:, None] * wrong**2).sum()

    errors = {n: np.array([error(w, candidate(i)) for i in range(steps)])
              for n, w in weights.items()}  # fmt: skip
    grid = Grid(bits=3, group_size=32, store_dtype="float32")

    @partial(jax.jit, static_argnames="recipe")
    def run(moments, recipe):
        packed = quantize_site({n: jnp.asarray(w) for n, w in weights.items()}, moments, recipe, {})
        return {n: one.channel_scale for n, one in packed[1].items()}

    alone = Recipe(moments="corpus", scale=SearchedAlpha(steps=steps), grid=grid)
    shared = dataclasses.replace(alone, scale=SearchedAlpha(steps=steps, shared=True))
    own = {n: int(e.argmin()) for n, e in errors.items()}
    best = int(sum(errors.values()).argmin())
    assert len({*own.values(), best}) > 1
    for recipe, want in ((alone, own), (shared, dict.fromkeys(weights, best))):
        got = run(moments_of(x, recipe), recipe)
        for name, i in want.items():
            np.testing.assert_allclose(got[name], candidate(i), rtol=1e-4)

"""The static low-rank part of a function's parameters is made once, and no prompt pays for it."""

import jax
import jax.numpy as jnp
import pytest
from function_checks import RECIPE, same_bits

import ttq_jax as ttq
from ttq_jax.config import ConfigError
from ttq_jax.functions import is_packed


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape) / 6


W = {
    "layers": normal(0, 3, 32, 32),
    "up": normal(1, 4, 32, 16),
    "out": normal(2, 16, 24),
}
X = 6 * normal(3, 2, 8, 32) * jnp.exp(6 * normal(4, 32))


def model(w, x):
    """Layers in a scan, experts in a batched product, and a plain weight."""
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w["layers"])[0]
    return jnp.einsum("btd,edf->btf", x, w["up"]) @ w["out"]


def recipe_of(**how):
    rule = ttq.LowRankRule(rank=3, **how)
    source = ttq.Source(prior="corpus", prior_tokens=4.0) if rule.weighted else ttq.Source()
    return ttq.Recipe(moments=source, grid=ttq.Grid(bits=3, group_size=16), low_rank=rule)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_prompt_pays_for_no_decomposition_and_gets_the_same_weights(weighted):
    recipe = recipe_of(weighted=weighted)
    prior = ttq.observe(model, recipe)(W, X[::-1])[1] if weighted else None
    shapes = jax.ShapeDtypeStruct(X.shape, X.dtype)
    static = ttq.static_factors(model, recipe, prior=prior)(W, shapes)

    def each_time(w, x, prior, _):
        return ttq.read(model, recipe, prior=prior)(w, x)[1]

    def once(w, x, prior, static):
        return ttq.read(model, recipe, prior=prior, static=static)(w, x)[1]

    def in_two_steps(w, x, prior, static):
        observed = ttq.observe(model, recipe)(w, x)[1]
        return ttq.quantize(w, observed, recipe, prior=prior, static=static)

    given = (W, X, prior, static)
    assert "svd" in str(jax.make_jaxpr(each_time)(*given))
    wanted = jax.jit(each_time)(*given)
    for prepared in (once, in_two_steps):
        assert "svd" not in str(jax.make_jaxpr(prepared)(*given))
        same_bits(jax.jit(prepared)(*given), wanted)
    for leaf in filter(is_packed, jax.tree.leaves(wanted, is_leaf=is_packed)):
        assert leaf.views[0].low_rank.down.shape[-1] == 3


def test_recipes_that_have_no_static_factors_to_make():
    with pytest.raises(ConfigError, match=r"low_rank\.rank: expected a static part, got rank 0"):
        ttq.static_factors(model, RECIPE)
    of_corpus = ttq.Recipe(moments="corpus", low_rank=ttq.LowRankRule(rank=3, weighted=True))
    with pytest.raises(ConfigError, match=r"quantize makes its static part .*: leave static out"):
        ttq.static_factors(model, of_corpus)


def test_factors_of_another_recipe_or_function():
    recipe = recipe_of()
    static = jax.eval_shape(ttq.static_factors(model, recipe, select="out"), W, X)
    with pytest.raises(ConfigError, match=(
        "static: expected factors of rank 0 with weighted=False, as the recipe says, got rank 3"
    )):  # fmt: skip
        ttq.read(model, RECIPE, static=static)
    with pytest.raises(ttq.FunctionError, match=(
        r"static: expected factors of layers, read as .*, got none; make them with static_factors"
    )):  # fmt: skip
        jax.eval_shape(lambda s: ttq.read(model, recipe, static=s)(W, X), static)
    with pytest.raises(ttq.Error, match="static: expected what static_factors made"):
        ttq.read(model, recipe, static={})

"""Widths by rule: which grid a layer gets, and that a mixed stack is its layers one by one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import prompts_of, random_rows, small_config, small_params

from ttq_jax.config import ConfigError
from ttq_jax.linear import dense_weight
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward
from ttq_jax.offline.calibrate import observe_tokens
from ttq_jax.prefill import decoded_shapes, prefill
from ttq_jax.quant.convert import quantize
from ttq_jax.quant.grid import Grid
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.quant.tree import quantize_params, replace_kernels
from ttq_jax.quant.widths import Width, grids_of
from ttq_jax.types import (
    SITE_OF,
    MixedLinear,
    Offline,
    QuantizedLinear,
    effective_bits,
    kernels,
    leaf_bits,
    stored_bytes,
)

CONFIG = small_config(
    d_model=16, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, embed_dim=16
)
PARAMS = small_params(CONFIG)
PROMPTS = prompts_of(random_rows([24]), 24)
# A rule for a projection, and one for a layer of it; q is as the recipe says, the rest dense.
RULES = (Width(select="layers/down", bits=3), Width(select="layers/1/down", bits=8, group_size=8))
BITS = {"q": (4, 4, 4), "down": (3, 8, 3)}
MIXED = {"grid": Grid(bits=4, group_size=16), "widths": RULES, "select": "layers/(q|down)"}


@partial(jax.jit, static_argnames="recipe")
def read(prompts, recipe, offline):
    cache = empty_cache(CONFIG, *prompts.tokens.shape, jnp.float32)
    hidden, _, packed, *_ = prefill(
        PARAMS, prompts, cache, config=CONFIG, recipe=recipe, offline=offline
    )
    return hidden, packed


@jax.jit
def hidden_of(tree):
    cache = empty_cache(CONFIG, *PROMPTS.tokens.shape, jnp.float32)
    return forward(CONFIG, tree, PROMPTS.tokens, PROMPTS.valid, cache)[0]


packing = jax.jit(quantize, static_argnames="recipe")
unpacked = jax.jit(dense_weight)


def grid_at(name, layer):
    bits = BITS[name][layer]
    return Grid(bits=bits, group_size=8 if bits == 8 else 16)


def layers_of(kernel):
    """Each layer's packed weight, whatever holds it."""
    for layer in range(CONFIG.n_layers):
        stack, at = kernel, layer
        if isinstance(kernel, MixedLinear):
            stack, at = kernel.stacks[int(kernel.which[layer])], int(kernel.slot[layer])
        yield jax.tree.map(lambda a, at=at: a[at], stack)


def dense(tree):
    """The tree with the matrix that each packed layer stands for."""
    made = {
        name: jnp.stack([unpacked(one) for one in layers_of(kernel)])
        for name, kernel in kernels(tree["layers"]).items()
        if isinstance(kernel, QuantizedLinear | MixedLinear)
    }
    return replace_kernels(tree, made)


def assert_layer_by_layer(packed, observed, **knobs):
    """A mixed tree is each layer quantized alone, to its width, for the moments of its input."""
    assert {n for n, k in kernels(packed["layers"]).items() if not hasattr(k, "ndim")} == set(BITS)
    for name, bits in BITS.items():
        kernel = packed["layers"][name]["kernel"]
        assert isinstance(kernel, MixedLinear) == (len(set(bits)) > 1)
        for layer, one in enumerate(layers_of(kernel)):
            assert (one.bits, one.group_size) == (bits[layer], grid_at(name, layer).group_size)
            recipe = Recipe(grid=grid_at(name, layer), **knobs)
            seen = jax.tree.map(lambda a, layer=layer: a[layer], observed[SITE_OF[name]])
            alone = packing(PARAMS["layers"][name]["kernel"][layer], seen, recipe)
            got, want = np.asarray(unpacked(one)), np.asarray(unpacked(alone))
            # The scale depends on the moments' last digit, which depends on the program: it may
            # land on the next bfloat16, which moves the row it belongs to, or on a tie.
            assert (np.abs(got - want) > 1e-6).mean() <= 0.02
            np.testing.assert_allclose(got, want, atol=2 * np.asarray(alone.scales).max())


@pytest.mark.parametrize(
    "knobs",
    [{}, {"prefill": "quantized"}, {"rounding": SecondOrder(steps=1), "prefill": "quantized"}],
    ids=["full", "quantized", "second-order"],
)
def test_a_mixed_tree_is_its_layers_one_by_one(knobs):
    recipe = Recipe(**MIXED, **knobs)
    hidden, packed = read(PROMPTS, recipe, Offline())
    stand_for = dense(packed)
    reader = PARAMS
    if recipe.prefill == "quantized":
        # Every layer has read what the quantized layers before it wrote.
        reader = stand_for
        np.testing.assert_allclose(hidden, hidden_of(reader), atol=2e-4)
    moments = observe_tokens(reader, PROMPTS.tokens, config=CONFIG, reads=recipe.reads)
    assert_layer_by_layer(packed, moments, **knobs)
    # Decoding from the packed layers is decoding from the matrices they stand for.
    got, want = hidden_of(packed), hidden_of(stand_for)
    np.testing.assert_allclose(got, want, atol=3e-5 * np.abs(want).max())
    assert np.abs(want - hidden_of(PARAMS)).max() > 0.05 * np.abs(want).max()


def test_ahead_of_any_prompt_too():
    recipe = Recipe(**MIXED, moments="corpus")
    moments = observe_tokens(PARAMS, PROMPTS.tokens, config=CONFIG, reads=recipe.reads)
    packed = quantize_params(PARAMS, recipe, Offline(moments=moments))
    assert_layer_by_layer(packed, moments, moments="corpus")


def test_effective_bits_are_counted_layer_by_layer():
    recipe = Recipe(**MIXED)
    packed = decoded_shapes(PARAMS, CONFIG, recipe, Offline())
    made = kernels(packed["layers"])
    total, weights = 0, 0
    for name, kernel in kernels(PARAMS["layers"]).items():
        _, d_in, d_out = kernel.shape
        weights += kernel.size
        if name not in BITS:
            total += 32 * kernel.size
            continue
        bits = 0
        for layer, width in enumerate(BITS[name]):
            rows = grid_at(name, layer).rows_per_group(d_in)
            groups = -(-d_in // rows)
            # Codes with the padding of the last group; scale and zero point; the channel scale.
            bits += width * groups * rows * d_out + 2 * 16 * groups * d_out + 16 * d_in
        if len(set(BITS[name])) > 1:
            bits += 2 * 32 * CONFIG.n_layers  # which stack, which place in it
        assert leaf_bits(made[name]) == bits / kernel.size
        total += bits
    assert effective_bits(packed) == total / weights == 8 * stored_bytes(made) / weights


@pytest.mark.parametrize(
    ("rules", "name", "want"),
    [
        ((), "down", (4, 4, 4)),
        ((Width(select="layers/down", bits=2),), "down", (2, 2, 2)),
        ((Width(select="layers/down", bits=2),), "o", (4, 4, 4)),
        ((Width(select="layers/1/down", bits=2),), "down", (4, 2, 4)),
        # The last match counts, alone: rules do not add up.
        (
            (Width(select="layers/down", bits=2), Width(select="layers/.*/down", bits=8)),
            "down",
            (8, 8, 8),
        ),
        (
            (Width(select="layers/.*", bits=8), Width(select="layers/2/down", bits=3)),
            "down",
            (8, 8, 3),
        ),
        (
            (Width(select="layers/2/down", bits=3), Width(select="layers/.*", bits=8)),
            "down",
            (8, 8, 8),
        ),
        # The whole path, not a part of it.
        ((Width(select="down", bits=2), Width(select="layers/1", bits=2)), "down", (4, 4, 4)),
        ((Width(select="layers/[01]/(up|down)", bits=5),), "up", (5, 5, 4)),
    ],
)
def test_rules(rules, name, want):
    grids = grids_of(Grid(bits=4), rules, name, 3)
    assert tuple(g.bits for g in grids) == want
    assert Recipe(widths=rules).grids(name, 3) == grids


def test_a_rule_changes_only_what_it_names():
    grid = Grid(bits=4, group_size=64, symmetric=True, store_dtype="float32")
    grids = grids_of(grid, (Width(select="layers/0/q", group_size=8),), "q", 2)
    assert grids[0] == Grid(bits=4, group_size=8, symmetric=True, store_dtype="float32")
    assert grids[1] == grid


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"select": "(", "bits": 2}, "not a regular expression"),
        ({"select": "layers/q"}, "expected bits or group_size for 'layers/q', got neither"),
        ({"select": "layers/q", "bits": 7}, "bits: expected one of 2, 3, 4, 5, 8, got 7"),
        ({"select": "layers/q", "group_size": 12}, "got 12"),
    ],
)
def test_bad_rules_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        Width(**knobs)

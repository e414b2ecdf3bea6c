"""The vocabulary's tables in few bits: against NumPy, in every program, and what is refused."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import OPT, prompts_of, random_rows, small_config

from ttq_jax.config import ConfigError, Rope
from ttq_jax.generate import generate_tokens
from ttq_jax.linear import dense_weight
from ttq_jax.models.cache import activation_dtype, empty_cache
from ttq_jax.models.decoder import embed, forward, init_params, logits
from ttq_jax.models.traffic import bytes_per_token
from ttq_jax.offline.prior import prior_from_weights
from ttq_jax.prefill import decoded_shapes
from ttq_jax.quant import head
from ttq_jax.quant.head import check_head, head_bits, head_of, joined, pack_head
from ttq_jax.quant.presets import PRESETS, preset
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.recipe_text import from_toml, recipe_named, to_toml, with_settings
from ttq_jax.sampling import Sampling
from ttq_jax.types import Offline, QuantizedLinear, model_bits, stored_bytes

# What differs between families about the tables; 72 channels are no whole number of groups.
SWITCHES = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "awkward": {"embed_dim": 72, "d_model": 72, "n_heads": 4, "head_dim": 18},
    "opt": OPT,
    "opt-projected": {**OPT, "embed_dim": 40},
    "opt-350m": {**OPT, "embed_dim": 40, "norm_placement": "post", "final_norm": False},
    "gemma": {"norm": "rms_plus_one", "norm_placement": "sandwich", "embed_scale": 8.0,
              "logit_softcap": 1.5, "activation": "gelu_tanh"},
    "granite": {"embed_scale": 3.0, "logit_divisor": 1.5, "residual_scale": 0.4},
    "granite-untied": {"embed_scale": 3.0, "logit_divisor": 1.5, "tie_embeddings": False},
    "olmo2": {"norm_placement": "branch", "qk_norm": True, "qk_norm_over": "all"},
    "experts": {"n_experts": 4, "experts_per_token": 2},
    "qwen3-untied": {"qk_norm": True, "tie_embeddings": False},
    "phi3": {"rope": Rope(theta=10000.0, partial=0.5)},
}  # fmt: skip


def params_of(config, dtype="float32"):
    params = init_params(config, jax.random.key(0))
    # Rows of very different size, as of rare and common tokens, and one of zeros.
    spread = np.exp(np.random.default_rng(5).normal(size=(config.vocab_size, 1)))
    spread[3] = 0.0
    params["embed"]["embedding"] = params["embed"]["embedding"] * jnp.asarray(spread, jnp.float32)
    return jax.tree.map(lambda a: a.astype(dtype), params)


def numpy_table(table, bits, store):
    """A table [V, E] rounded by the formulas alone, float64: symmetric, coded, groups of 64."""
    to = {"float32": np.float32, "bfloat16": jnp.bfloat16}[store]
    out = np.zeros(table.shape, np.float64)
    for v, row in enumerate(np.asarray(table, np.float32)):
        groups = [row[i : i + 64] for i in range(0, len(row), 64)]
        steps = [np.float32(np.abs(g).max()) / np.float32(2 ** (bits - 1) - 1) for g in groups]
        column = np.float64(np.float32(np.max(steps) / np.float32(255)).astype(to))
        column = column or 1.0
        for i, (g, step) in enumerate(zip(groups, steps, strict=True)):
            scale = np.clip(np.round(step / column), 1, 255) * column
            top = 2 ** (bits - 1) - 1
            out[v, 64 * i : 64 * i + len(g)] = scale * np.clip(np.round(g / scale), -top - 1, top)
    return out


def dense_tables(params):
    """The tree with the matrices that its packed tables stand for."""
    out = {**params, "embed": {"embedding": dense_weight(params["embed"]["embedding"]).T}}
    if "head" in params:
        out["head"] = {"kernel": dense_weight(params["head"]["kernel"])}
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_table_is_rounded_as_the_formulas_say(bits):
    config = small_config(**SWITCHES["awkward"])
    params = params_of(config)
    got = dense_weight(pack_head(params, bits)["embed"]["embedding"]).T
    want = numpy_table(params["embed"]["embedding"], bits, "bfloat16")
    step = np.abs(np.asarray(params["embed"]["embedding"])).max(1) / (2 ** (bits - 1) - 1)
    # A weight half way between two codes may go to either; nowhere else is there a difference.
    differs = np.abs(np.asarray(got, np.float64) - want) > 1e-5 * np.abs(want)
    assert differs.mean() < 2e-3
    assert np.all(np.abs(got - want).max(1) <= 1.01 * step)
    np.testing.assert_array_equal(got[3], 0)


def test_any_cut_of_the_vocabulary_gives_the_same_bits(monkeypatch):
    for tied in (True, False):
        params = params_of(small_config(tie_embeddings=tied))
        whole = pack_head(params, 8)
        monkeypatch.setattr(head, "BLOCK", 30)  # 97 tokens: the last block overlaps
        jax.tree.map(np.testing.assert_array_equal, jax.jit(partial(pack_head, bits=8))(params),
                     whole)  # fmt: skip
        monkeypatch.undo()
        assert set(whole) == ({"embed"} if tied else {"embed", "head"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_rows_and_logits_are_those_of_the_matrix_it_stands_for(switches, dtype):
    config = small_config(**switches)
    params = params_of(config, dtype)
    packed = {**params, **pack_head(params, 8)}
    same = jax.tree.map(lambda a: a.astype(dtype), dense_tables(packed))
    tokens = jnp.asarray([[0, 96, 3, 50], [7, 7, 1, 95]], jnp.int32)
    at = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32)[None], tokens.shape)
    got, want = (embed(config, tree, tokens, at) for tree in (packed, same))
    assert got.dtype == dtype
    # The very same numbers: a row is unpacked, never approximated.
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))

    x = np.random.default_rng(0).normal(size=(3, config.d_model))
    hidden = jnp.asarray(x, dtype)
    out = logits(config, packed, hidden)
    assert out.dtype == jnp.float32
    h = np.asarray(hidden, np.float64)
    if "project_out" in params:
        h = h @ np.asarray(params["project_out"]["kernel"], np.float64)
        h = np.asarray(jnp.asarray(h, jnp.float32).astype(dtype), np.float64)
    matrix = packed["embed"]["embedding"] if config.tie_embeddings else packed["head"]["kernel"]
    exact = h @ np.asarray(dense_weight(matrix), np.float64) / config.logit_divisor
    if config.logit_softcap:
        exact = config.logit_softcap * np.tanh(exact / config.logit_softcap)
    # Of bfloat16 activations too the sums stay float32; only a projection before them is rounded.
    loose = 1e-2 if "project_out" in params and dtype == "bfloat16" else 2e-6
    np.testing.assert_allclose(out, exact, atol=loose * np.abs(exact).max())


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_every_family_reads_with_it(switches):
    config = small_config(**switches)
    params = params_of(config)
    packed = {**params, **pack_head(params, 8)}
    prompts = prompts_of(random_rows([9]), 9)

    @jax.jit
    def read(tree):
        cache = empty_cache(config, 1, 9, activation_dtype(tree))
        hidden, *_ = forward(config, tree, prompts.tokens, prompts.valid, cache)
        return logits(config, tree, hidden)

    got, want = read(packed), read(dense_tables(packed))
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    # It is seen that the tables are others than before.
    assert np.abs(got - read(params)).max() > 1e-4 * np.abs(want).max()


def program_of(config, recipe, params, offline=None, limit=6):
    """`generate_tokens` for one batch, from a dense tree, and its arguments."""
    given = offline or Offline(head=head_of(params, recipe))
    params, given = joined(params, recipe, given)
    prompts = prompts_of(random_rows([9]), 16)
    dynamic = params, prompts, given, jax.random.key(0), jnp.asarray(limit, jnp.int32)
    static = {"config": config, "recipe": recipe, "sampling": Sampling(), "capacity": 8,
              "eos_ids": ()}  # fmt: skip
    return dynamic, static


def test_the_program_gets_no_dense_table_and_compiles_once():
    config = small_config(tie_embeddings=False)
    params, recipe = params_of(config), preset("ttq", head=8, select="layers/q")
    dynamic, static = program_of(config, recipe, params)
    tables = {a.shape for a in jax.tree.leaves(dynamic) if a.dtype == jnp.float32 and 97 in a.shape}
    assert not tables
    before = generate_tokens._cache_size()
    for seed in (0, 1, 2):
        prompts = prompts_of(random_rows([9 + seed], seed=seed), 16)
        got = generate_tokens(dynamic[0], prompts, *dynamic[2:], **static)
    assert generate_tokens._cache_size() == before + 1
    # The same tokens as from the matrices that the tables stand for.
    other = dense_tables(dynamic[0]), prompts, *dynamic[2:]
    want = generate_tokens(*other, **static | {"recipe": dataclasses.replace(recipe, head=None)})
    np.testing.assert_array_equal(got[0], want[0])
    assert got[2]


def test_another_width_is_refused_with_what_to_do():
    config = small_config()
    params = params_of(config)
    recipe = preset("ttq", head=8)
    packed = {**params, **pack_head(params, 8)}
    check_head(packed, recipe)
    assert head_of(packed, recipe) is None
    for other, said in ((preset("ttq", head=5), "head=5"), (preset("ttq"), "head=None"),
                        (None, "head=None")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"packed in 8 bits.*{said}.*head=8"):
            check_head(packed, other)
    eight = Offline(head=pack_head(params, 8))
    for wanted, offline in ((recipe, Offline()), (preset("ttq", head=4), eight), (None, eight)):
        with pytest.raises(ConfigError, match=r"head: .*prepared.*prepare\(\)"):
            joined(params, wanted, offline)
    with pytest.raises(ConfigError, match="head: expected one of 2, 3, 4, 5, 8, or none"):
        preset("ttq", head=6)
    with pytest.raises(ValueError, match="expected a tree with tables of 8 bits, got None"):
        dynamic, static = program_of(config, None, params)
        generate_tokens(*dynamic, **static | {"recipe": recipe})
    tree, besides = joined(params, recipe, eight)
    assert head_bits(tree) == 8
    assert besides.head is None


def test_it_is_said_only_where_it_is():
    assert {n for n, p in PRESETS.items() if p.recipe and p.recipe.head} == {"fast", "best"}
    assert "head" not in Recipe().describe()
    assert Recipe(head=8).describe()["head"] == 8
    json.dumps(Recipe(head=8).describe())
    for recipe in (Recipe(), Recipe(head=5)):
        assert from_toml(to_toml(recipe)) == recipe
    assert 'head = "none"' in to_toml(Recipe())
    assert with_settings(Recipe(), ["head=3"]).head == 3
    assert with_settings(Recipe(head=3), ["head=none"]).head is None
    assert recipe_named("fast", {"head": "none"}).head is None
    assert recipe_named("ttq", {"head": "4"}).head == 4
    for wrong in ("head=six", "head=6", "head=8.0"):
        with pytest.raises(ConfigError, match="head: expected"):
            with_settings(Recipe(), [wrong])


def test_bytes_per_token_by_hand():
    config = small_config(tie_embeddings=False)
    params = params_of(config)
    small = stored_bytes(params["final_norm"]) + stored_bytes(params["layers"])
    assert bytes_per_token(params, config) == small + 4 * 64 * 97 + 4 * 64
    tied = {name: entry for name, entry in params.items() if name != "head"}
    assert bytes_per_token(tied, small_config()) == small + 4 * 64 * 97

    shapes = decoded_shapes(tied, small_config(), preset("ttq", head=8), Offline())
    # A byte per weight, and per token one of a group's scale and two of its column's number.
    head_size = 97 * (64 + 1 + 2)
    assert stored_bytes(shapes["embed"]) == head_size
    want = stored_bytes(shapes["layers"]) + stored_bytes(shapes["final_norm"]) + head_size
    assert bytes_per_token(shapes, small_config()) == want
    dense = decoded_shapes(tied, small_config(), preset("ttq"), Offline())
    assert model_bits(shapes) < model_bits(dense)
    assert isinstance(shapes["embed"]["embedding"], QuantizedLinear)

    experts = small_config(n_experts=4, experts_per_token=2)
    tree = params_of(experts)
    each = sum(stored_bytes(tree["layers"][n]["kernel"]) for n in ("gate", "up", "down"))
    assert bytes_per_token(tree, experts) == stored_bytes(tree) - each // 2

    opt = small_config(**OPT)
    tree = params_of(opt)
    positions = stored_bytes(tree["positions"])
    assert bytes_per_token(tree, opt) == stored_bytes(tree) - positions + 4 * 64


def test_a_tree_per_prompt_shares_the_table():
    config = small_config()
    packed = params_of(config) | pack_head(params_of(config), 8)
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(3, 64)), jnp.float32)
    each = jax.vmap(lambda row: logits(config, packed, row[None]))(hidden)[:, 0]
    np.testing.assert_allclose(each, logits(config, packed, hidden), rtol=1e-5, atol=1e-6)


def test_a_prior_that_reads_the_embedding_reads_the_packed_one():
    config, reads = small_config(norm_placement="branch"), preset("fast").reads
    packed = params_of(config) | pack_head(params_of(config), 2)
    got, want = (
        prior_from_weights(tree, config=config, reads=reads)["attn_in"].sums
        for tree in (packed, dense_tables(packed))
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)

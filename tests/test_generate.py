"""The one program: what it computes, what it does not depend on, and how often it compiles."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from small import OPT, prompts_of, random_rows, small_config, small_params

from ttq_jax.generate import generate_tokens
from ttq_jax.linear import dense_weight
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.prefill import decoded_shapes, last_hidden, prefill
from ttq_jax.prompts import PromptError, bucket, pad_prompts
from ttq_jax.quant.presets import preset
from ttq_jax.quant.tree import quantize_params, replace_kernels, static_factors
from ttq_jax.sampling import Sampling, sample
from ttq_jax.types import Offline, QuantizedLinear, effective_bits, kernels, stored_bytes

CONFIG = small_config()
PARAMS = small_params(CONFIG)
TTQ = preset("ttq", bits=4)
# Nearly all the time here is XLA's: what holds of a loop or of a program holds of these.
FEW = "layers/(q|down)"
SOME = preset("ttq", bits=4, select=FEW)


def run(prompts, *, params=PARAMS, config=CONFIG, recipe=TTQ, offline=None, seed=0, limit=8,
        sampling=Sampling(), capacity=8, eos_ids=()):  # fmt: skip
    out, counts, finite, *_ = generate_tokens(
        params, prompts, offline or Offline(), jax.random.key(seed), jnp.asarray(limit, jnp.int32),
        config=config, recipe=recipe, sampling=sampling, capacity=capacity, eos_ids=eos_ids,
    )  # fmt: skip
    assert finite
    return np.asarray(out), np.asarray(counts)


@partial(jax.jit, static_argnames=("config", "recipe"))
def read(params, prompts, config=CONFIG, recipe=TTQ, offline=None):
    cache = empty_cache(config, *prompts.tokens.shape, jnp.float32)
    hidden, cache, packed, *_ = prefill(
        params, prompts, cache, config=config, recipe=recipe, offline=offline or Offline()
    )
    return last_hidden(hidden, prompts), packed


def dense(tree):
    """The tree with each packed kernel replaced by the matrix it stands for."""
    return replace_kernels(
        tree,
        {n: dense_weight(k) for n, k in kernels(tree["layers"]).items()
         if isinstance(k, QuantizedLinear)},
    )  # fmt: skip


PACKED = [(2, 0), (3, 4), (4, 0), (5, 4), (8, 0)]


@pytest.mark.parametrize(("bits", "rank"), slow_but(PACKED, [(3, 4), (5, 4), (8, 0)]))
def test_packed_logits_are_those_of_the_matrices_it_stands_for(bits, rank):
    recipe = preset("ttq", bits=bits, rank=rank, symmetric=bits == 5)
    prompts = prompts_of(random_rows([20, 9]), 32)
    factors = static_factors(PARAMS, recipe)
    _, packed = read(PARAMS, prompts, recipe=recipe, offline=Offline(low_rank=factors))
    assert set(kernels(packed["layers"])) == {"q", "k", "v", "o", "gate", "up", "down"}
    a, _ = read(packed, prompts, recipe=None)
    b, _ = read(dense(packed), prompts, recipe=None)
    np.testing.assert_allclose(a, b, atol=3e-5 * np.abs(b).max())


def test_greedy_decoding_is_the_argmax_of_a_full_forward_pass():
    prompts = prompts_of(random_rows([13]), 32)
    _, packed = read(PARAMS, prompts)
    out, counts = run(prompts)
    assert counts.tolist() == [8]
    row = [*np.asarray(prompts.tokens)[0, :13], *out[0]]
    for recipe, tree in ((TTQ, packed), (None, PARAMS)):
        tokens = out[0] if recipe else run(prompts, recipe=None)[0][0]
        row = [*np.asarray(prompts.tokens)[0, :13], *tokens]
        # With a full-precision prefill the prompt's keys come from the unquantized weights.
        cache = empty_cache(CONFIG, 1, 32, jnp.float32)
        first = jnp.asarray([row[:13]])
        hidden, cache, _ = forward(CONFIG, PARAMS, first, jnp.ones((1, 13), bool), cache)
        rest = jnp.asarray([row[13:]])
        after, _, _ = forward(CONFIG, tree, rest, jnp.ones((1, 8), bool), cache)
        states = jnp.concatenate([hidden[:, -1:], after[:, :-1]], axis=1)
        head = tree if recipe else PARAMS
        np.testing.assert_array_equal(logits(CONFIG, head, states)[0].argmax(-1), tokens)


MODELS = {
    "llama": {}, "opt": OPT,
    "sliding": {"n_layers": 3, "sliding_window": 5, "sliding_layers": (True, False, True)},
}  # fmt: skip
EACH = [(model, flavour) for model in MODELS for flavour in ("full", "quantized")]
QUICK = [("llama", "quantized"), ("opt", "full"), ("sliding", "full")]


@pytest.mark.parametrize(("model", "flavour"), slow_but(EACH, QUICK))
def test_left_right_and_no_padding_agree(model, flavour):
    changes = MODELS[model]
    config = small_config(**changes)
    params = small_params(config)
    recipe = preset("ttq", bits=3, prefill=flavour, store_dtype="float32")
    row = random_rows([21])
    states, trees = [], []
    for length, side in ((21, "right"), (32, "right"), (32, "left")):
        state, packed = read(params, prompts_of(row, length, side), config=config, recipe=recipe)
        states.append(np.asarray(state))
        trees.append(packed)
    for state in states[1:]:
        np.testing.assert_allclose(state, states[0], atol=2e-4 * np.abs(states[0]).max())
    for tree in trees[1:]:
        for name, kernel in kernels(tree["layers"]).items():
            scale = kernels(trees[0]["layers"])[name].channel_scale
            # What later layers see passes through codes in the paper's flavour, and a tie that
            # breaks the other way is no rounding error.
            rtol = 1e-5 if flavour == "full" else 1e-2
            np.testing.assert_allclose(kernel.channel_scale, scale, rtol=rtol)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("flavour", slow_but(["full", "quantized"], ["full"]))
def test_what_stands_in_the_padding_changes_nothing_bit_for_bit(side, flavour):
    recipe = preset("ttq", bits=3, prefill=flavour)
    rows = random_rows([20, 3])
    results = [read(PARAMS, prompts_of(rows, 32, side, fill), recipe=recipe) for fill in (0, 96)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    tokens = [run(prompts_of(rows, 32, side, fill), recipe=recipe)[0] for fill in (0, 96)]
    np.testing.assert_array_equal(*tokens)


def test_moments_are_the_prompts_and_pooled_over_the_batch():
    rows = random_rows([20, 9, 32])
    recipe = preset("ttq", bits=2, select=FEW)
    alone = [run(prompts_of([r], 32), recipe=recipe)[0][0] for r in rows]
    batch = prompts_of(rows, 32)
    each = run(batch, recipe=dataclasses.replace(recipe, batch="per_prompt"))[0]
    np.testing.assert_array_equal(each, np.stack(alone))
    pooled = run(batch, recipe=recipe)[0]
    assert (pooled != each).any(), "at 2 bits pooled and own moments cannot agree everywhere"


def test_prefill_flavours_differ_in_what_later_layers_see():
    prompts = prompts_of(random_rows([24]), 32)
    full_state, full = read(PARAMS, prompts, recipe=preset("ttq", bits=2))
    own_state, own = read(PARAMS, prompts, recipe=preset("ttq", bits=2, prefill="quantized"))
    plain_state, _ = read(PARAMS, prompts, recipe=None)
    np.testing.assert_array_equal(full_state, plain_state)
    assert np.abs(own_state - full_state).max() > 1e-2
    for i, same in ((0, True), (2, False)):
        a, b = (t["layers"]["q"]["kernel"].channel_scale[i] for t in (full, own))
        assert bool(jnp.all(a == b)) is same


def test_end_token_stops_a_row_and_then_the_loop():
    prompts = prompts_of(random_rows([20, 9]), 32)
    free, _ = run(prompts, recipe=SOME)
    end = int(free[0, 3])
    out, counts = run(prompts, recipe=SOME, eos_ids=(end, 0))
    first = [row.tolist().index(end) if end in row else 8 for row in free]
    assert counts.tolist() == first
    for got, want, n in zip(out, free, counts, strict=True):
        np.testing.assert_array_equal(got[:n], want[:n])


@pytest.mark.parametrize("limit", [1, 5, 8])
def test_limit_is_dynamic(limit):
    prompts = prompts_of(random_rows([20]), 32)
    run(prompts)
    before = generate_tokens._cache_size()
    out, counts = run(prompts, limit=limit)
    assert counts.tolist() == [limit]
    np.testing.assert_array_equal(out[:, :limit], run(prompts)[0][:, :limit])
    assert generate_tokens._cache_size() == before


def test_one_token_prompt():
    out, counts = run(prompts_of([[5]], 32), recipe=preset("ttq", bits=2, clip=True))
    assert counts.tolist() == [8]
    assert ((out >= 0) & (out < 97)).all()


def test_seeds_reproduce_and_matter():
    prompts = prompts_of(random_rows([20, 9]), 32)
    hot = Sampling(temperature=2.0, top_k=50, top_p=0.99)
    a, b, c = (run(prompts, recipe=SOME, sampling=hot, seed=s)[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert (a[0] != a[1]).any()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.3),
        Sampling(temperature=0.7, top_k=5),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1.5, top_k=8, top_p=0.8),
        Sampling(temperature=1.0, top_k=1),
        Sampling(),
    ],
    ids=str,
)
def test_sampled_frequencies_are_the_filtered_softmax(sampling):
    z = np.random.default_rng(0).normal(size=20) * 2
    keys = jax.random.split(jax.random.key(0), 20000)
    batch = jnp.asarray(z[None], jnp.float32)
    got = np.bincount(
        np.asarray(jax.vmap(lambda k: sample(k, batch, sampling)[0])(keys)), minlength=20
    )
    p = np.exp(z / (sampling.temperature or 1e-3) - (z / (sampling.temperature or 1e-3)).max())
    p /= p.sum()
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    keep = np.searchsorted(np.cumsum(p[order]), sampling.top_p) + 1
    p[order[keep:]] = 0
    p /= p.sum()
    np.testing.assert_allclose(got / 20000, p, atol=4 * np.sqrt(0.25 / 20000))
    assert (got[p == 0] == 0).all()


def test_a_second_prompt_recipe_or_batch_of_a_bucket_compiles_nothing():
    first = prompts_of(random_rows([20, 9], seed=1), 64)
    run(first, recipe=preset("ttq", bits=3, rank=0, select=FEW))
    before = generate_tokens._cache_size()
    again = preset("ttq", bits=3, rank=0, select=FEW)
    run(prompts_of(random_rows([41, 64], seed=2), 64), recipe=again, seed=3)
    assert generate_tokens._cache_size() == before
    # The counter does see a retrace: another group size is another program.
    run(first, recipe=preset("ttq", bits=3, group_size=64, select=FEW))
    assert generate_tokens._cache_size() == before + 1


@pytest.mark.parametrize("name", ["rtn", "awq"])
def test_recipes_without_a_prompt_may_be_packed_ahead_or_in_the_program(name):
    prompts = prompts_of(random_rows([20]), 32)
    moments = "corpus" if name == "awq" else "none"
    recipe = preset(name, bits=3, moments=moments, select=FEW)
    offline = Offline()
    if name == "awq":
        from ttq_jax.offline.calibrate import observe_tokens

        seen = observe_tokens(PARAMS, prompts.tokens[:, :20], config=CONFIG, reads=recipe.reads)
        offline = Offline(moments=seen)
    ahead = quantize_params(PARAMS, recipe, offline)
    np.testing.assert_array_equal(
        run(prompts, recipe=recipe, offline=Offline(packed=ahead))[0],
        run(prompts, recipe=recipe, offline=offline)[0],
    )


def test_awq_on_the_prompts_own_moments_is_the_prompt_recipe():
    from ttq_jax.offline.calibrate import observe_tokens

    prompts = prompts_of(random_rows([32]), 32)
    closed = preset("ttq", bits=3, moments="corpus")
    seen = observe_tokens(PARAMS, prompts.tokens, config=CONFIG, reads=closed.reads)
    _, ours = read(PARAMS, prompts, recipe=preset("ttq", bits=3))
    theirs = quantize_params(PARAMS, closed, Offline(moments=seen))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_selection_leaves_the_rest_dense():
    recipe = preset("ttq", bits=3, select="layers/(gate|up|down)")
    _, packed = read(PARAMS, prompts_of(random_rows([20]), 32), recipe=recipe)
    kinds = {n: isinstance(k, QuantizedLinear) for n, k in kernels(packed["layers"]).items()}
    assert kinds == {"q": False, "k": False, "v": False, "o": False,
                     "gate": True, "up": True, "down": True}  # fmt: skip


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (5, True), (8, False)])
def test_stored_bytes_are_what_effective_bits_says(bits, symmetric):
    recipe = preset("ttq", bits=bits, symmetric=symmetric, rank=2)
    offline = Offline(low_rank=static_factors(PARAMS, recipe))
    _, packed = read(PARAMS, prompts_of(random_rows([20]), 32), recipe=recipe, offline=offline)
    ours = kernels(packed["layers"])
    weights = sum(k.size for k in kernels(PARAMS["layers"]).values())
    np.testing.assert_allclose(effective_bits(packed), 8 * stored_bytes(ours) / weights)
    assert effective_bits(decoded_shapes(PARAMS, CONFIG, recipe, offline)) == effective_bits(packed)
    by_hand = 0.0
    for name, kernel in kernels(PARAMS["layers"]).items():
        layers, d_in, d_out = kernel.shape
        codes = sum(p.nbytes for p in ours[name].planes)
        assert codes * 8 == layers * d_in * d_out * bits
        per_group = 16 + (0 if symmetric else 16)
        by_hand += layers * (
            d_in * d_out * (bits + per_group / 32) + 16 * d_in + 32 * (d_in + d_out)
        )
    np.testing.assert_allclose(effective_bits(packed), by_hand / weights)
    assert effective_bits(PARAMS) == 32


def test_packed_trees_are_not_packed_twice():
    _, packed = read(PARAMS, prompts_of(random_rows([20]), 32))
    with pytest.raises(ValueError, match="expected a dense weight to quantize, got a packed one"):
        read(packed, prompts_of(random_rows([20]), 32))
    with pytest.raises(ValueError, match=r"reads no prompt, got moments\.of = 'prompt'"):
        quantize_params(PARAMS, TTQ, Offline())


def test_prompts_are_padded_to_buckets():
    assert [bucket(n) for n in (1, 32, 33, 64, 65, 1000)] == [32, 32, 64, 64, 128, 1024]
    batch = pad_prompts([[1, 2, 3], [4]], max_positions=64)
    assert batch.tokens.shape == (2, 32)
    assert np.asarray(batch.valid).sum(1).tolist() == [3, 1]


@pytest.mark.parametrize(
    ("rows", "new", "message"),
    [
        ([], 1, "at least one prompt"),
        ([[1], []], 1, "prompt 2 of 2 is empty"),
        (
            [[1] * 60],
            8,
            "prompt 1 has 60 tokens and asks for 8 more, but the model's context is 64",
        ),
    ],
)
def test_bad_prompts_are_refused(rows, new, message):
    with pytest.raises(PromptError, match=message):
        pad_prompts(rows, max_positions=64, max_new_tokens=new)

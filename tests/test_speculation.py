"""Packed weights draft, unquantized ones verify: the answer is the unquantized model's."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from scipy import stats
from small import OPT, prompts_of, random_rows, small_config, small_params

from ttq_jax import speculation
from ttq_jax.checkpoint import Model
from ttq_jax.config import ConfigError, Rope
from ttq_jax.generate import generate_tokens
from ttq_jax.generation import Drafts
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.offline.prior import for_unreached
from ttq_jax.prefill import first_turn, prefill
from ttq_jax.quant.head import head_of
from ttq_jax.quant.presets import preset
from ttq_jax.quant.widths import Width
from ttq_jax.sampling import Sampling, filtered
from ttq_jax.stream import go_on, start
from ttq_jax.types import Offline

CONFIG = small_config()
PARAMS = small_params(CONFIG)
TTQ = preset("ttq", bits=3)
MIXED = (Width(select="layers/1/(q|down)", bits=2),)
CAPACITY = 16


def run(prompts, *, recipe=TTQ, drafts=0, params=PARAMS, config=CONFIG, offline=None, limit=13,
        eos_ids=(), sampling=Sampling(), seed=0):  # fmt: skip
    """Tokens up to each row's count, and what became of the drafts."""
    out, counts, finite, _, _, stats = generate_tokens(
        params, prompts, offline or Offline(), jax.random.key(seed), jnp.asarray(limit, jnp.int32),
        config=config, recipe=recipe, sampling=sampling, capacity=CAPACITY, eos_ids=eos_ids,
        drafts=drafts,
    )  # fmt: skip
    assert finite
    rows = [row[:n].tolist() for row, n in zip(np.asarray(out), np.asarray(counts), strict=True)]
    return rows, None if stats is None else [Drafts(*row) for row in np.asarray(stats).tolist()]


@jax.jit
def quantized_for(prompts):
    cache = empty_cache(CONFIG, *prompts.tokens.shape, jnp.float32)
    return prefill(PARAMS, prompts, cache, config=CONFIG, recipe=TTQ, offline=Offline())[2]


def mixture():
    config = small_config(n_experts=4, experts_per_token=2)
    params = small_params(config)
    prior = for_unreached(params, {}, config=config, reads=TTQ.reads)
    return {"config": config, "params": params, "offline": Offline(moments=prior)}


def of(**changes):
    config = small_config(**changes)
    return {"config": config, "params": small_params(config)}


FAST = preset("fast", bits=2, group_size=32, moments="prompt")
CASES = {
    "two": ([13, 29], 3, {}),
    "five": ([3, 30, 9, 21, 14], 5, {}),
    "most": ([7, 8], 16, {}),
    "quantized prefill": ([13, 6], 4, {"recipe": preset("paper", bits=3)}),
    "packed head": ([13, 6], 4, {"recipe": FAST, "offline": Offline(head=head_of(PARAMS, FAST))}),
    "per prompt, two streams": ([13, 6], 4, {
        "recipe": preset("ttq", bits=3, batch="per_prompt", prefill="both")
    }),
    "mixed widths, two streams": ([13, 6], 4, {
        "recipe": dataclasses.replace(TTQ, widths=MIXED, prefill="both")
    }),
    "sliding window": ([13, 27], 4, of(sliding_window=8, sliding_layers=(True, False))),
    "opt": ([13, 6], 4, of(**OPT)),
    "mixture": ([13, 6], 4, mixture()),
}  # fmt: skip


QUICK = ("five", "mixture")


@pytest.mark.parametrize("name", slow_but(CASES, QUICK))
def test_greedy_answers_are_the_unquantized_models(name):
    lengths, drafts, case = CASES[name]
    side = "left" if name in {"five", "sliding window"} else "right"
    prompts = prompts_of(random_rows(lengths), 32, side=side, fill=5)
    model = {key: case[key] for key in ("config", "params") if key in case}
    plain, none = run(prompts, recipe=None, **model)
    assert none is None
    rows, found = run(prompts, drafts=drafts, **case)
    assert rows == plain
    assert all(len(row) == 13 for row in rows)
    for row in found:
        assert row.tokens == 12, "the first token comes from the prompt"
        assert row.drafted == drafts * row.passes
        assert row.passes <= row.tokens <= row.kept + row.passes
        assert 0 <= row.kept <= row.drafted
    assert sum(row.kept for row in found) > 0, "no draft was ever any good: the case shows nothing"
    assert len({row.passes for row in found}) > 1 or len(found) == 1 or name != "five"


def test_ends_and_limits_inside_a_cycle():
    prompts = prompts_of(random_rows([13, 9, 20]), 32)
    plain, _ = run(prompts, recipe=None)
    # One row ends early, another later, the third never.
    eos_ids = (plain[0][3], plain[1][7])
    assert not set(eos_ids) & set(plain[2])
    ends = [min(row.index(i) for i in eos_ids if i in row) for row in plain[:2]]
    for limit in range(1, 14):
        out, counts, _, _, _, stats = generate_tokens(
            PARAMS, prompts, Offline(), jax.random.key(0), jnp.asarray(limit, jnp.int32),
            config=CONFIG, recipe=TTQ, sampling=Sampling(), capacity=CAPACITY, eos_ids=eos_ids,
            drafts=5,
        )  # fmt: skip
        for i, end in enumerate([*ends, 13]):
            assert counts[i] == min(end, limit)
            # An end token is written, nothing after it or after the limit is.
            written = min(end + 1, limit)
            assert out[i].tolist() == [*plain[i][:written], *[0] * (CAPACITY - written)]
            assert stats[i, 3] == written - 1, "tokens that were decoded"


def test_acceptance_is_that_of_the_two_trees():
    """Drafts one by one, from caches that hold what the verifier read."""
    drafts, (row,) = 3, random_rows([13])
    prompts = prompts_of([row], 32)
    (answer,), (found,) = run(prompts, drafts=drafts)
    packed = quantized_for(prompts)

    @jax.jit
    def read(tree, tokens, valid, cache):
        hidden, cache, _ = forward(CONFIG, tree, tokens, valid, cache)
        return jnp.argmax(logits(CONFIG, tree, hidden[0, -1])), cache

    def read_text(tokens):
        text = prompts_of([tokens], 32)
        return read(PARAMS, text.tokens, text.valid, empty_cache(CONFIG, 1, 64, jnp.float32))[1]

    at, kept, passes = 1, 0, 0
    while at < 13:
        text = [*row, *answer[:at]]
        cache, token, agreed = read_text(text[:-1]), text[-1], []
        for _ in range(drafts):
            token, cache = read(packed, jnp.full((1, 1), token), jnp.ones((1, 1), bool), cache)
            agreed.append(int(token))
        right = [a == b for a, b in zip(agreed, answer[at:], strict=False)]
        n = right.index(False) if False in right else len(right)
        at, kept, passes = at + n + 1, kept + n, passes + 1
    assert (found.kept, found.passes) == (kept, passes)
    assert found.acceptance == kept / (drafts * passes)


SAMPLED = Sampling(temperature=1.5)
FILTERED = Sampling(temperature=2.0, top_k=6, top_p=0.9)
TINY = small_config(vocab_size=8)
TINY_PARAMS = small_params(TINY)


def distribution(row, sampling):
    """The probability of every pair of tokens that may follow, by the unquantized model."""

    def after(rows):
        tokens = jnp.asarray(rows, jnp.int32)
        cache = empty_cache(TINY, *tokens.shape, jnp.float32)
        hidden, _, _ = forward(TINY, TINY_PARAMS, tokens, jnp.ones(tokens.shape, bool), cache)
        scores = logits(TINY, TINY_PARAMS, hidden[:, -1])
        return np.asarray(jax.nn.softmax(filtered(scores, sampling)), np.float64)

    first = after([row])[0]
    second = after([[*row, a] for a in range(8)])
    third = after([[*row, a, b] for a in range(8) for b in range(8)]).reshape(8, 8, 8)
    return first[:, None, None] * second[:, :, None] * third


def p_value(sampling, drafts=2, rows=6000):
    """Of the chi-square test of the first three tokens' joint distribution."""
    row = random_rows([5], vocab=8)[0]
    prompts = prompts_of([row] * rows, 8)
    recipe = preset("ttq", bits=2, group_size=96)
    out, *_ = generate_tokens(
        TINY_PARAMS, prompts, Offline(), jax.random.key(3), jnp.asarray(3, jnp.int32), config=TINY,
        recipe=recipe, sampling=sampling, capacity=4, eos_ids=(), drafts=drafts,
    )  # fmt: skip
    seen = np.zeros((8, 8, 8))
    np.add.at(seen, tuple(np.asarray(out)[:, :3].T), 1)
    expected = distribution(row, sampling) * rows
    assert not seen[expected == 0].any(), "a token was drawn that the filters leave out"
    # Cells of fewer than ten expected draws are taken together.
    many = expected >= 10
    counts = [*seen[many], seen[~many].sum()]
    wanted = [*expected[many], expected[~many].sum()]
    if wanted[-1] < 5:
        counts, wanted = counts[:-1], wanted[:-1]
    statistic = sum((c - w) ** 2 / w for c, w in zip(counts, wanted, strict=True))
    return stats.chi2.sf(statistic, len(wanted) - 1)


EACH = slow_but([SAMPLED, FILTERED], [FILTERED])


@pytest.mark.parametrize("sampling", EACH, ids=["plain", "filtered"])
def test_sampled_answers_have_the_unquantized_models_distribution(sampling):
    assert p_value(sampling) > 1e-3


def test_the_test_sees_drafts_that_are_always_accepted(monkeypatch):
    real = speculation._accept

    def always(scores, drafted, by, keys, sampling):
        agreed, tokens = real(scores, drafted, by, keys, sampling)
        first = jnp.pad(drafted, ((0, 0), (0, 1)))
        return jnp.full_like(agreed, drafted.shape[1]), first.at[:, -1].set(tokens[:, -1])

    monkeypatch.setattr(speculation, "_accept", always)
    jax.clear_caches()
    try:
        assert p_value(SAMPLED, drafts=3) < 1e-6
    finally:
        jax.clear_caches()


def test_a_seed_gives_the_same_answer_whoever_is_beside_it():
    # A tree that every batch shares: one from the prompts would be pooled over the batch.
    rows = random_rows([13, 9, 20])
    packed = quantized_for(prompts_of(rows, 32))
    how = {"drafts": 3, "sampling": SAMPLED, "offline": Offline(packed=packed)}
    together = run(prompts_of(rows, 32), seed=5, **how)[0]
    assert together == run(prompts_of(rows, 32), seed=5, **how)[0]
    assert together != run(prompts_of(rows, 32), seed=6, **how)[0]
    assert together[0] == run(prompts_of(rows[:1], 32), seed=5, **how)[0][0]


def test_a_stream_gives_the_same_tokens():
    prompts = prompts_of(random_rows([13]), 32)
    how = {"config": CONFIG, "recipe": TTQ, "sampling": Sampling(), "eos_ids": (), "drafts": 4}
    begun, state = start(
        PARAMS, prompts, Offline(), jax.random.key(0), **how, capacity=CAPACITY
    )  # fmt: skip
    for limit in (3, 4, 11, 13):
        _, state = go_on(PARAMS, Offline(), begun, state, jnp.asarray(limit, jnp.int32), **how)
        assert state.counts.tolist() == [limit]
    assert np.asarray(state.out)[0, :13].tolist() == run(prompts, recipe=None)[0][0]


def test_a_conversation_hands_on_what_it_hands_on_without_drafts():
    recipe = dataclasses.replace(TTQ, moments=dataclasses.replace(TTQ.source, decay=0.5))
    offline = Offline(carried=first_turn(PARAMS, CONFIG, recipe))
    prompts = prompts_of(random_rows([13]), 32)
    both = [
        generate_tokens(
            PARAMS, prompts, offline, jax.random.key(0), jnp.asarray(9, jnp.int32), config=CONFIG,
            recipe=recipe, sampling=Sampling(), capacity=CAPACITY, eos_ids=(), drafts=drafts,
        )[3]
        for drafts in (0, 3)
    ]  # fmt: skip
    assert set(both[0]) == {"attn_in", "attn_out", "mlp_in", "mlp_out"}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), *both)


def test_another_prompt_of_the_bucket_compiles_nothing():
    run(prompts_of(random_rows([13]), 32), drafts=3)
    before = generate_tokens._cache_size()
    run(prompts_of(random_rows([22], seed=1), 32), drafts=3, limit=5)
    assert generate_tokens._cache_size() == before


def model_of(config=CONFIG, params=PARAMS):
    tokenizer = SimpleNamespace(vocab_size=97, bos_id=None)
    return Model(config=config, params=params, tokenizer=tokenizer, name="tiny", eos_ids=())


@pytest.mark.parametrize(
    ("drafts", "recipe", "model", "message"),
    [
        (17, TTQ, None, "expected 0 to 16 drafts per cycle, got 17"),
        (-1, TTQ, None, "expected 0 to 16 drafts per cycle, got -1"),
        (2, None, None, "got the unquantized model; choose another recipe"),
        (2, preset("ttq", moments=dataclasses.replace(TTQ.source, refresh=8)), None,
         "set moments.refresh to 0"),
        (2, FAST, model_of(params=PARAMS | head_of(PARAMS, FAST)), "load it without head="),
    ],
)  # fmt: skip
def test_what_cannot_be_drafted_or_verified_is_refused(drafts, recipe, model, message):
    with pytest.raises(ConfigError, match=message):
        speculation.check(drafts, recipe, model)


def test_more_is_refused(monkeypatch):
    speculation.check(0, None)
    speculation.check(16, TTQ, model_of())
    monkeypatch.setattr(Rope, "grows", True)
    with pytest.raises(ConfigError, match="turns every key by the length of the text"):
        speculation.check(2, TTQ, model_of())


def test_what_a_result_says_of_its_drafts():
    both = Drafts(drafted=8, kept=6, passes=2, tokens=8) + Drafts(4, 0, 1, 1)
    assert both == Drafts(12, 6, 3, 9)
    assert both.describe() == {
        "drafted": 12, "kept": 6, "passes": 3, "tokens": 9, "acceptance": 0.5, "tokens_per_pass": 3,
    }  # fmt: skip
    assert "50% of 12 drafts were kept, 3 tokens per pass" in both.in_words()
    one = Drafts(0, 0, 0, 0)
    assert one.acceptance is None
    assert one.tokens_per_pass is None
    assert "drafts" not in one.in_words()

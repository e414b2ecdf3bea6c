"""Cycles that choose their number of drafts: the choice, and that it changes no answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import in_host, prompts_of, random_rows, small_config, small_params
from test_speculation import model_of

from ttq_jax import measured_drafts, speculation
from ttq_jax.config import ConfigError
from ttq_jax.draft_costs import FADE, LENGTHS, PRIOR, DraftCosts, choose, faded
from ttq_jax.generation import Drafts
from ttq_jax.measured_drafts import CYCLES, RUNS, forced, measure
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.quant.presets import preset
from ttq_jax.sampling import Sampling, filtered
from ttq_jax.stages import go_on, start
from ttq_jax.types import Offline

CONFIG = small_config(n_layers=1)
PARAMS = small_params(CONFIG)
TTQ = preset("ttq", bits=2, select="layers/(q|down)")
ROWS = random_rows([13, 29])
CAPACITY, LIMIT = 32, 13
SHORT = (0, 2, 5)
"""A verification for each is compiled: here fewer than `LENGTHS`, for time's sake."""


def stated(evidence, costs, left, lengths):
    """The choice in NumPy, each expectation summed over what may happen."""
    kept, rejected = PRIOR[0] + evidence[0], PRIOR[1] + evidence[1]
    a = kept / (kept + rejected)
    rates = []
    for k, cost in zip(lengths, costs, strict=True):
        # i drafts are kept and another is rejected, or all k are; one token more, up to the limit.
        chances = [a**i * (1 - a) for i in range(k)] + [a**k]
        rates.append(sum(p * min(i + 1, left) for i, p in enumerate(chances)) / cost)
    return rates


def test_the_choice_is_the_best_expected_rate():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        evidence = rng.uniform(0, 40, 2) * (1, rng.choice([0.05, 1]))
        costs = 1 + np.asarray(LENGTHS) * rng.uniform(0.05, 1)
        left = int(rng.integers(1, 12))
        got = choose(
            jnp.asarray(evidence, jnp.float32), jnp.asarray(costs, jnp.float32),
            jnp.asarray(left, jnp.int32), LENGTHS,
        )  # fmt: skip
        rates = stated(evidence, costs, left, LENGTHS)
        assert rates[int(got)] == pytest.approx(max(rates), rel=1e-5)
        seen.add(int(got))
    assert seen == set(range(len(LENGTHS)))


def test_evidence_counts_what_was_tried_and_fades():
    old, kept, rejected = np.float32([10, 2]), np.int32([4, 0, 2]), np.int32([0, 1, 1])
    got = faded(*map(jnp.asarray, (old, kept, rejected)))
    np.testing.assert_allclose(got, [10 * FADE + 6, 2 * FADE + 2], rtol=1e-6)


def how(sampling=Sampling(), eos_ids=()):
    return {"config": CONFIG, "recipe": TTQ, "sampling": sampling, "eos_ids": eos_ids,
            "drafts": SHORT}  # fmt: skip


def begun(prompts, **kind):
    parts = {"capacity": CAPACITY, "chunk": 9}
    return start(PARAMS, prompts, Offline(), jax.random.key(0), **parts, **how(**kind))


def answers(prompts, costs, limit=LIMIT, **kind):
    """Tokens of each row, and what became of the drafts."""
    first, state = begun(prompts, **kind)
    operands = jnp.asarray(limit, jnp.int32), jnp.asarray(costs, jnp.float32)
    _, state = go_on(PARAMS, Offline(), first, state, *operands, **how(**kind))
    assert state.finite
    return np.asarray(state.out), [*map(Drafts.of, np.asarray(speculation.stats(state)))], state


ONLY = {k: [1.0 if k == n else 1e30 for n in SHORT] for k in SHORT}


@jax.jit
def following(tokens):
    """The unquantized model's logits after every token of a row."""
    cache = empty_cache(CONFIG, 1, tokens.shape[1], jnp.float32)
    hidden, _, _ = forward(CONFIG, PARAMS, tokens, jnp.ones(tokens.shape, bool), cache)
    return logits(CONFIG, PARAMS, hidden)[0]


def plain_scores(row, answer):
    """Logits for each token of an answer."""
    text = np.zeros((1, 64), np.int32)
    text[0, : len(row) + len(answer)] = [*row, *answer]
    return following(jnp.asarray(text))[len(row) - 1 : len(row) - 1 + len(answer)]


def unlike(drafts, k):
    """Passes over another number of drafts than k, but for those that the limit made shorter."""
    return sum(n for n, of in zip(drafts.lengths, SHORT, strict=True) if of != k)


def test_greedy_answers_are_the_unquantized_models_whatever_is_chosen():
    prompts = prompts_of(ROWS, 32)
    free = [1.0, 1.2, 1.4]
    by = {k: answers(prompts, ONLY[k]) for k in SHORT}
    compiled = go_on._cache_size()
    by["free"] = answers(prompts, free)
    assert go_on._cache_size() == compiled, "other costs compile nothing"
    for i, row in enumerate(ROWS):
        rows = {name: out[i, :LIMIT].tolist() for name, (out, _, _) in by.items()}
        told = np.argmax(plain_scores(row, rows["free"]), axis=-1).tolist()
        assert rows == dict.fromkeys(by, told)
        for k in SHORT:
            drafts = by[k][1][i]
            assert drafts.tokens == LIMIT - 1
            assert sum(drafts.lengths) == drafts.passes
            assert drafts.drafted == k * drafts.passes
            assert unlike(drafts, k) == 0
        assert by[0][1][i].passes == LIMIT - 1, "plain decoding"
    assert by[5][1][0].kept > 0, "no draft was ever any good: the case shows nothing"
    chosen = sum(by["free"][1][1:], by["free"][1][0])
    assert sum(n > 0 for n in chosen.lengths) > 1, "the choice never changed"
    # The first choice knows nothing but the prior, and the last one the limit.
    _, _, state = answers(prompts, free, limit=2)
    assert np.argmax(np.asarray(state.lengths)[0]) == np.argmax(stated([0, 0], free, 1, SHORT))


def test_ends_inside_a_cycle():
    prompts = prompts_of(ROWS, 32)
    plain, _, _ = answers(prompts, ONLY[0])
    eos = int(plain[0, 6])
    ends = [row[:LIMIT].index(eos) if eos in row[:LIMIT] else LIMIT for row in plain.tolist()]
    out, drafts, state = answers(prompts, ONLY[5], eos_ids=(eos,))
    assert state.counts.tolist() == ends
    for i, end in enumerate(ends):
        written = min(end + 1, LIMIT)
        assert out[i].tolist() == [*plain[i, :written], *[0] * (CAPACITY - written)]
        assert drafts[i].tokens == written - 1


def test_a_seed_gives_the_same_answer_whatever_is_chosen():
    """Each token is drawn with the noise of its place, from the unquantized model's logits."""
    sampling, prompts = Sampling(temperature=1.5, top_k=20), prompts_of(ROWS, 32)
    outs = [answers(prompts, ONLY[k], sampling=sampling) for k in SHORT]
    assert sum(drafts.kept for drafts in outs[-1][1]) > 0
    for out, _, _ in outs[1:]:
        np.testing.assert_array_equal(out, outs[0][0])
    for i, row in enumerate(ROWS):
        answer = outs[0][0][i, :LIMIT]
        scores = filtered(plain_scores(row, answer.tolist())[1:], sampling)
        keys = speculation.keys_of(
            jax.random.key(0), jnp.asarray(i, jnp.int32), jnp.asarray(1, jnp.int32),
            count=LIMIT - 1,
        )  # fmt: skip
        told = speculation.draw_each(keys, scores, 0)
        assert answer[1:].tolist() == told.tolist()


def test_costs_are_measured_by_the_program_that_answers():
    prompts = prompts_of(ROWS, 32)
    answers(prompts, ONLY[0])
    compiled = go_on._cache_size()
    first, state = begun(prompts)
    now, calls = [0.0], []
    fixed, each = 7.0, {0: 1.0, 2: 1.5, 5: 2.25}

    def timed(*operands, **static):
        found = go_on(*operands, **static)
        chosen = SHORT[int(np.argmin(operands[-1]))]
        passes = int(np.max(found[1].passes))
        now[0] += fixed + passes * each[chosen]
        calls.append((chosen, passes))
        return found

    # The measurement chooses among `LENGTHS`; `SHORT` stands in for them here.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured_drafts, "LENGTHS", SHORT)
        patch.setattr(measured_drafts, "DraftCosts", tuple)
        patch.setattr(measured_drafts, "go_on", timed)
        seconds = measure(PARAMS, Offline(), first, state, how(), clock=lambda: now[0])
        assert len(calls) == 1 + RUNS * (1 + len(SHORT))
        again = measure(PARAMS, Offline(), first, state, how(), clock=lambda: now[0])
    assert again is seconds and len(calls) == 1 + RUNS * (1 + len(SHORT))
    assert go_on._cache_size() == compiled
    # What a call takes besides its cycles is no cycle's cost.
    assert seconds == pytest.approx(tuple(each.values()))
    assert dict(calls).keys() == set(SHORT) and (0, CYCLES) in calls and (0, 0) in calls
    assert state.made.tolist() == [1, 1], "it was left as it is"


def test_forced_costs_leave_no_other_choice():
    for i in range(len(LENGTHS)):
        evidence = jnp.asarray([0, 1000], jnp.float32)
        left = jnp.asarray(1, jnp.int32)
        assert int(choose(evidence, jnp.asarray(forced(i)), left, LENGTHS)) == i


COSTS = DraftCosts((0.02, 0.03, 0.04, 0.05, 0.08))


@pytest.mark.parametrize(
    ("drafts", "recipe", "model", "message"),
    [
        ("auto", None, None, "got the unquantized model; choose another recipe"),
        (COSTS, preset("ttq", batch="per_prompt"), None, "set batch to pooled, or give the number"),
        ("auto", preset("ttq", moments=dataclasses.replace(TTQ.source, refresh=8)), None,
         "set moments.refresh to 0"),
        ("auto", TTQ, "host", "nothing to weigh where the unquantized weights come from"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_refused(drafts, recipe, model, message):
    model = model and model_of(params=in_host(PARAMS))
    with pytest.raises(ConfigError, match=message):
        speculation.check(drafts, recipe, model)


def test_several_processes_are_refused(monkeypatch):
    speculation.check("auto", TTQ, model_of())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="times differ from process to process, got 2"):
        speculation.check("auto", TTQ, model_of())


@pytest.mark.parametrize(
    "seconds",
    [(1.0, 2.0), (1.0, 1.0, 1.0, 1.0, 0.0), (1.0, 1.0, 1.0, 1.0, float("nan"))],
)
def test_what_is_no_cost_is_refused(seconds):
    with pytest.raises(ConfigError, match="expected a tuple of 5 positive numbers"):
        DraftCosts(seconds)


def test_what_a_result_says_of_its_choices():
    assert COSTS.describe() == {"0": 1.0, "1": 1.5, "2": 2.0, "4": 2.5, "8": 4.0}
    assert "1.50 with 1, 2.00 with 2, 2.50 with 4, 4.00 with 8" in COSTS.in_words()
    both = Drafts(8, 6, 3, 9, (1, 0, 0, 2, 0)) + Drafts(2, 0, 1, 1, (0, 0, 1, 0, 0))
    assert both == Drafts(10, 6, 4, 10, (1, 0, 1, 2, 0))
    said = both.describe()
    assert said["drafts_per_pass"] == 2.5
    assert said["passes_by_drafts"] == {"0": 1, "1": 0, "2": 1, "4": 2, "8": 0}
    assert both.in_words().endswith("passes by drafts: 1 of 0, 1 of 2, 2 of 4")
    none = Drafts(0, 0, 12, 12, (12, 0, 0, 0, 0))
    assert "drafting was not worth its cost, all 12 passes were plain" in none.in_words()


def test_no_cycle_copies_the_cache():
    """XLA would, into the branches of a conditional."""
    first, state = begun(prompts_of(ROWS[:1], 32))
    operands = jnp.asarray(LIMIT, jnp.int32), jnp.ones(len(SHORT), jnp.float32)
    program = go_on.lower(PARAMS, Offline(), first, state, *operands, **how()).compile()
    cache = "f32[" + ",".join(map(str, state.cache.k.shape)) + "]"
    made = [line for line in program.as_text().splitlines() if f"= {cache}" in line]
    assert made
    assert not [line for line in made if " copy(" in line]

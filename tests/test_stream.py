"""An answer decoded a few tokens at a time is the answer of the one program."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from small import prompts_of, random_rows, small_config, small_params
from tiny_files import write_model

import ttq_jax as ttq
from ttq_jax.config import ConfigError
from ttq_jax.generate import carried, generate_tokens
from ttq_jax.offline.prior import prior_from_weights
from ttq_jax.prefill import first_turn
from ttq_jax.quant.grid import Grid
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.source import Source
from ttq_jax.sampling import Sampling
from ttq_jax.stream import go_on, start
from ttq_jax.types import Offline

CONFIG = small_config(
    d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, embed_dim=16
)
PARAMS = small_params(CONFIG)
CAPACITY, EVERY = 14, 4
GRID = {"grid": Grid(bits=2, group_size=8), "select": "layers/(v|down)"}
REFRESHING = Recipe(
    moments=Source(prior="weights", prior_tokens=5.0, decay=0.5, refresh=EVERY), **GRID
)
GREEDY, HOT = Sampling(), Sampling(temperature=1.5, top_k=40)
CASES = {
    "unquantized, sampled": (None, HOT),
    "refreshed, greedy": (REFRESHING, GREEDY),
    "a tree per prompt, sampled": (Recipe(batch="per_prompt", **GRID), HOT),
}


@pytest.mark.parametrize("case", slow_but(CASES, [*CASES][1:]))
def test_in_chunks_of_any_length_the_tokens_are_those_of_the_one_program(case):
    recipe, sampling = CASES[case]
    prompts = prompts_of(random_rows([16, 9], seed=1), 16)
    offline = Offline()
    if recipe is REFRESHING:
        prior = prior_from_weights(PARAMS, config=CONFIG, reads=recipe.reads)
        begun = jax.tree.map(lambda a: a + 3.0, first_turn(PARAMS, CONFIG, recipe))
        offline = Offline(moments=prior, carried=begun)
    arrays = PARAMS, prompts, offline, jax.random.key(3)
    how = {"config": CONFIG, "recipe": recipe, "sampling": sampling, "capacity": CAPACITY}
    free = np.asarray(generate_tokens(*arrays, jnp.asarray(CAPACITY), **how, eos_ids=(97,))[0])
    # One row ends after a few tokens, the other goes on.
    end = next(int(t) for t in free[0, 3:] if t not in free[1] and t not in free[0, :3])
    how["eos_ids"] = (end, 97)
    out, counts, finite, moments, *_ = generate_tokens(*arrays, jnp.asarray(CAPACITY), **how)
    assert counts[0] < counts[1] == CAPACITY
    assert finite
    del how["capacity"]
    before = None
    # 5 = 1 + EVERY stops where a refresh is due; 6 stops after it.
    for limits in (range(2, CAPACITY + 1), (5, 6, 9, CAPACITY), (CAPACITY,)):
        begun, state = start(*arrays, **how, capacity=CAPACITY)
        for limit in limits:
            new, state = go_on(PARAMS, offline, begun, state, jnp.asarray(limit, jnp.int32), **how)
            assert (new is None) == (recipe is not REFRESHING)
            begun = new or begun
        got = np.asarray(state.out).reshape(2, CAPACITY)
        assert np.asarray(state.counts).ravel().tolist() == counts.tolist()
        for row, want, n in zip(got, np.asarray(out), counts, strict=True):
            np.testing.assert_array_equal(row[:n], want[:n])
        if moments:
            assert moments.keys() == carried(recipe, begun.moments).keys()
            jax.tree.map(np.testing.assert_array_equal, begun.moments, moments)
        before = before or go_on._cache_size()
    assert go_on._cache_size() == before


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ttq.load(write_model(tmp_path_factory.mktemp("tiny") / "tiny"))


RECIPE = ttq.preset("ttq", bits=3, select="layers/q")


@pytest.mark.parametrize("how", [{}, {"sampling": HOT, "seed": 5}], ids=["greedy", "sampled"])
def test_pieces_are_the_text_and_are_never_taken_back(model, how):
    sizes = None
    for prompt in ("Größe", "a longer one, in the same bucket"[:20]):
        made = ttq.generate(model, [prompt], recipe=RECIPE, max_new_tokens=40, **how)
        answer = ttq.stream(model, prompt, recipe=RECIPE, max_new_tokens=40, **how)
        pieces = list(answer)
        assert "".join(pieces) == made.texts[0]
        assert len(pieces) > 2
        got = answer.generation
        for field in ("tokens", "texts", "prompt_tokens", "stopped", "effective_bits"):
            assert getattr(got, field) == getattr(made, field), field
        assert 0 < answer.first_token < got.seconds
        now = start._cache_size(), go_on._cache_size()
        sizes = sizes or now
        assert now == sizes


def test_a_character_is_held_until_its_bytes_are_there(model, monkeypatch):
    """The tiny model has a token per byte; what it "says" here is given."""
    said = "naïve €, 漢字 \ufffd."
    ids = model.tokenizer.encode(said, add_bos=False)
    answer = ttq.stream(model, "x", recipe=None, max_new_tokens=len(ids))
    count = 1
    answer._new, answer._ended = ids[:1], False

    def seen():
        nonlocal count
        count += 1
        return ids[:count], count == len(ids)

    monkeypatch.setattr(answer, "_seen", seen)
    pieces = list(answer)
    assert "".join(pieces) == said
    assert [p for p in pieces if "\ufffd" in p] == ["\ufffd."]
    assert "€" in pieces
    assert "漢" in pieces


def test_a_broken_end_is_told_where_byte_fallback_spoils_what_was_said(model):
    texts = iter(["", "ab€", "ab" + 4 * "\ufffd", "ab" + 5 * "\ufffd"])
    answer = ttq.stream(model, "x", recipe=None, max_new_tokens=4)
    tokenizer = SimpleNamespace(continuation=lambda prompt, new: next(texts))
    answer._model = SimpleNamespace(tokenizer=tokenizer, mesh=None)
    ends = iter([([1], False), ([1, 2], False), ([1, 2, 3], True)])
    answer._new, answer._ended, answer._seen = [0], False, lambda: next(ends)
    assert list(answer) == ["ab€", 4 * "\ufffd"]


def test_several_processes_have_no_answer_before_its_end(model, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"stream: expected one process, .* got 2; use gener"):
        ttq.stream(model, "Hello", recipe=None)


def test_a_reader_may_stop(model):
    answer = ttq.stream(model, "abc", recipe=RECIPE, max_new_tokens=40)
    first, half = next(answer), answer.generation
    assert half.stopped == ["caller"]
    assert 1 <= len(half.tokens[0]) < 40
    whole = ttq.generate(model, ["abc"], recipe=RECIPE, max_new_tokens=40)
    assert half.tokens[0] == whole.tokens[0][: len(half.tokens[0])]
    # What was handed out stays as it is when the stream goes on.
    assert first + "".join(answer) == whole.texts[0]
    assert answer.generation.stopped == whole.stopped
    assert half.tokens[0] == whole.tokens[0][: len(half.tokens[0])]

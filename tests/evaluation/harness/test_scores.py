"""lm-evaluation-harness on weights made from each prompt: log-likelihoods."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from asked import PAIRS, RECIPES, TOWN, answers, causal, requests, scores
from tiny_files import CONTEXT, write_model

import ttq_jax as ttq
from ttq_jax.config import ConfigError
from ttq_jax.evaluation import harness
from ttq_jax.evaluation.continuations import score_padded, stretches
from ttq_jax.generate import generate_tokens
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.prompts import PromptError


def log_probs_by_hand(model, tokens):
    cache = empty_cache(model.config, 1, len(tokens), jnp.float32)
    row = jnp.asarray(tokens, jnp.int32)[None]
    hidden, _, _ = forward(model.config, model.params, row, jnp.ones(row.shape, bool), cache)
    z = np.asarray(logits(model.config, model.params, hidden)[0], np.float64)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", ["rtn", "paper", "fast", "refresh"])
def test_a_score_is_that_of_the_causal_protocol(model, name):
    pairs = [PAIRS[i] for i in (0, 1, 3)]
    got = scores(harness.TTQModel(model, RECIPES[name]), *pairs)
    for (context, continuation), (score, _) in zip(pairs, got, strict=True):
        encode = model.tokenizer.encode
        expected = causal(model, RECIPES[name], encode(context), encode(continuation))
        np.testing.assert_allclose(score, expected, rtol=2e-5)


def test_scores_and_rolled_texts_are_those_of_the_adapter_for_transformers(model, reference):
    adapter = harness.TTQModel(model, None, max_length=64)
    pairs = [*PAIRS, ("x" * 70, "y" * 20), ("", "z" * 64)]
    expected = scores(reference, *pairs)
    got = scores(adapter, *pairs)
    np.testing.assert_allclose([s for s, _ in got], [s for s, _ in expected], rtol=1e-4)
    assert [g for _, g in got] == [g for _, g in expected]
    texts = requests("loglikelihood_rolling", ("Short.",), ("A long text. " * 12,), ("",))
    expected = reference.loglikelihood_rolling(texts, disable_tqdm=True)
    got = adapter.loglikelihood_rolling(texts, disable_tqdm=True)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert got[2] == 0


@pytest.mark.parametrize("name", ["none", "fast"])
def test_greedy_is_what_greedy_decoding_gives(model, name):
    recipe = RECIPES[name]
    tokens = ttq.generate(model, ["An odd start"], recipe=recipe, max_new_tokens=5).tokens[0]
    other = [*tokens[:-1], (tokens[-1] + 1) % 256]
    prompt = model.tokenizer.encode("An odd start")
    adapter = harness.TTQModel(model, recipe)
    asked = [(("", ""), prompt, row) for row in (tokens, other, tokens[:2], other[-1:])]
    got = [greedy for _, greedy in adapter._loglikelihood_tokens(asked, disable_tqdm=True)]
    assert got == [True, False, True, tokens[0] == other[-1]]


def test_company_and_order_change_no_score(model):
    adapter = harness.TTQModel(model, RECIPES["fast"])
    # Eleven continuations of one prompt: more than are read side by side.
    pairs = [*PAIRS[:4], *((TOWN, " is" * n) for n in range(1, 6)), *((TOWN, c) for c in "abc")]
    together, backwards = scores(adapter, *pairs), scores(adapter, *pairs[::-1])[::-1]
    alone = [scores(adapter, pair)[0] for pair in pairs]
    for got in (backwards, alone):
        np.testing.assert_allclose([s for s, _ in got], [s for s, _ in together], rtol=1e-5)
        assert [g for _, g in got] == [g for _, g in together]


def test_a_prompt_is_read_once_for_all_its_continuations(model, monkeypatch):
    prompts = []
    real = harness.score_continuations
    monkeypatch.setattr(
        harness, "score_continuations",
        lambda model, prompt, rows, **rest: prompts.append(len(rows)) or real(
            model, prompt, rows, **rest),
    )  # fmt: skip
    scores(harness.TTQModel(model, None), *PAIRS)
    assert sorted(prompts) == [1, 1, 1, 3]


def test_a_second_request_of_a_bucket_compiles_nothing(model):
    adapter = harness.TTQModel(model, RECIPES["fast"])
    first = [("A prompt", text) for text in (" one", " two", " 3")]
    again = [
        (prompt, text) for prompt in ("Another prompt", "Last") for text in ("a", "b", " of c")
    ]
    scores(adapter, *first)
    before = score_padded._cache_size()
    scores(adapter, *again)
    assert score_padded._cache_size() == before
    asked = lambda text, **kw: requests("generate_until", (text, {"max_gen_toks": 40} | kw))  # noqa: E731
    adapter.generate_until(asked("A prompt", until=["a"]), disable_tqdm=True)
    before = generate_tokens._cache_size()
    adapter.generate_until(asked("Another", until="qq", max_gen_toks=60), disable_tqdm=True)
    assert generate_tokens._cache_size() == before


def test_begin_of_text_is_where_the_model_has_it(tmp_path):
    model = ttq.load(write_model(tmp_path / "model", bos=True))
    adapter = harness.TTQModel(model, None)
    a, b, c = model.tokenizer.encode("abc", add_bos=False)
    assert adapter.tok_encode("ab") == [256, a, b]
    assert adapter.tok_encode("ab", add_special_tokens=False) == [a, b]
    assert adapter.tok_encode("<s>ab") == [256, a, b]
    assert adapter.tok_encode("<s>ab", add_special_tokens=True) == [256, a, b]
    each = log_probs_by_hand(model, [256, a, b, c])[range(3), [a, b, c]]
    got = scores(adapter, ("ab", "c"), ("", "ab"))
    np.testing.assert_allclose([s for s, _ in got], [each[2], each[:2].sum()], rtol=1e-5)
    rolled = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", ("abc",)))
    np.testing.assert_allclose(rolled, [each.sum()], rtol=1e-5)


def test_without_a_begin_of_text_a_text_follows_an_end_of_text(model):
    tokenizer = SimpleNamespace(**vars(model.tokenizer) | {"bos_id": None})
    nameless = SimpleNamespace(tokenizer=tokenizer, name="m", eos_ids=(257,), config=model.config)
    assert harness.TTQModel(nameless, None, offline=ttq.prepare(model, None)).prefix_token_id == 257
    nameless.eos_ids = ()
    with pytest.raises(ConfigError, match="begin- or end-of-text"):
        _ = harness.TTQModel(nameless, None, offline=ttq.prepare(model, None)).prefix_token_id


ROLLED = "Some prose to be rolled over. " * 2 + "It has no end, nor a point..."


def test_a_rolled_text_is_scored_by_what_stands_before_each_stretch(model):
    recipe, tokens = RECIPES["fast"], [256, *model.tokenizer.encode(ROLLED)]
    assert len(tokens) == 90
    # Windows of 60 tokens: those after the begin-of-text token; then what is left, after as many
    # as fit before it.
    expected = sum(
        causal(model, recipe, window[:start], window[start:end])
        for window, start, end in ((tokens, 1, 32), (tokens, 32, 61), (tokens[29:], 32, 61))
    )
    adapter = harness.TTQModel(model, recipe, max_length=60)
    got = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", (ROLLED,)))
    np.testing.assert_allclose(got, [expected], rtol=2e-5)


def test_weights_that_know_no_prompt_score_a_window_in_one_piece(model, monkeypatch):
    pieces = []
    monkeypatch.setattr(
        harness, "score_continuations",
        lambda model, prompt, rows, **rest: pieces.append((len(prompt), *map(len, rows)))
        or [(-1.0, False)] * len(rows),
    )  # fmt: skip
    adapter = harness.TTQModel(model, RECIPES["rtn"], max_length=60)
    got = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", (ROLLED,), ("ab",)))
    assert (got, sorted(pieces)) == ([-2.0, -1.0], [(1, 60, 2), (32, 29)])


@pytest.mark.parametrize("sizes", [(1, 1), (1, 31), (1, 32), (1, 300), (32, 1), (40, 100), (99, 1)])
def test_stretches_cover_a_text_and_never_look_ahead(sizes):
    context, scored = np.split(np.arange(sum(sizes)), sizes[:1])
    pieces = list(stretches(context.tolist(), scored.tolist()))
    assert [t for _, piece in pieces for t in piece] == scored.tolist()
    for prompt, piece in pieces:
        assert prompt == list(range(piece[0]))
        # At least half of what a token follows, but for the first bucket.
        assert len(prompt) * 2 >= piece[-1] or piece[-1] < 32


def test_a_context_that_is_too_long_is_cut_on_the_left_and_said(model, capsys):
    text, encode = "A prompt with more to say than its context holds", model.tokenizer.encode
    adapter = harness.TTQModel(model, RECIPES["fast"], max_length=27)
    got = scores(adapter, (text, " of text"))[0][0]
    expected = causal(model, RECIPES["fast"], encode(text)[-20:], encode(" of text"))
    np.testing.assert_allclose(got, expected, rtol=2e-5)
    assert "1 of 1 requests are longer than 27 tokens" in capsys.readouterr().err
    adapter = harness.TTQModel(model, None, max_length=27)
    answer = answers(adapter, (text, {"max_gen_toks": 8}))
    assert answer == ttq.generate(model, [text[-19:]], recipe=None, max_new_tokens=8).texts
    assert "cut on the left to its last 19" in capsys.readouterr().err


def test_continuations_that_cannot_be_scored_are_refused(model):
    adapter = harness.TTQModel(model, None, max_length=16)
    for continuation, found in (([], 0), ([1] * 17, 17)):
        with pytest.raises(PromptError, match=f"1 to 16 tokens, got {found}"):
            adapter._loglikelihood_tokens([(("", ""), [1], continuation)])
    with pytest.raises(PromptError, match="fewer new tokens than the context of 16, got 16"):
        adapter.generate_until(requests("generate_until", ("a", {"max_gen_toks": 16})))
    for length in (1, CONTEXT + 1):
        with pytest.raises(ConfigError, match=f"2 to {CONTEXT} tokens, got {length}"):
            harness.TTQModel(model, None, max_length=length)

"""lm-evaluation-harness on weights made from each prompt: generated answers."""

import string

import numpy as np
import pytest
from asked import RECIPES, TOWN, answers

import ttq_jax as ttq
from ttq_jax.evaluation import harness


def test_an_answer_is_that_of_generate_up_to_the_first_stop(model):
    whole = ttq.generate(model, ["Once upon"], recipe=None, max_new_tokens=150).texts[0]
    at = {whole.find(c): c for c in string.printable if c in whole}
    # Found in the first run of the program, in a later one, and nowhere.
    early, late = min(at), max(at)
    assert early < 20 and late > 50
    adapter = harness.TTQModel(model, None)
    for until, end in (([at[late], at[early]], early), (at[late], late), (["\0\0"], None)):
        got = answers(adapter, ("Once upon", {"until": until, "max_gen_toks": 150}))
        assert got == [whole[:end]]


@pytest.mark.parametrize("name", ["none", "fast"])
def test_an_answer_is_made_by_the_weights_of_its_prompt(model, name):
    expected = ttq.generate(model, [TOWN], recipe=RECIPES[name], max_new_tokens=16).texts
    asked = (TOWN, {"max_gen_toks": 16})
    assert answers(harness.TTQModel(model, RECIPES[name]), asked) == expected


def test_answers_are_those_of_the_adapter_for_transformers(model, reference):
    asked = [(text, {"until": [stop], "max_gen_toks": 24}) for text, stop in
             (("Once upon", "\n"), ("A", "e"), ("Zero one two three", "qq"))]  # fmt: skip
    assert answers(harness.TTQModel(model, None), *asked) == answers(reference, *asked)


def test_a_special_token_ends_an_answer(model, monkeypatch):
    seen = []

    def generate_nothing(*args, eos_ids, **kwargs):
        seen.append(eos_ids)
        return np.zeros((1, 32), np.int32), np.zeros(1, np.int32), np.True_, {}

    monkeypatch.setattr("ttq_jax.evaluation.continuations.generate_tokens", generate_nothing)
    answers(harness.TTQModel(model, None), ("a", {"until": ["<s>", "b"], "max_gen_toks": 4}))
    assert seen == [(256, 257)]


def test_sampled_answers_depend_on_the_prompt_and_the_seed_alone(model):
    sampled = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12}
    adapter = harness.TTQModel(model, None)
    first = answers(adapter, ("One", sampled), ("One", sampled), ("Two", sampled))
    assert len(set(first)) == 3
    assert answers(adapter, ("Two", sampled), ("One", sampled), ("One", sampled)) == [
        first[2], first[0], first[1]
    ]  # fmt: skip
    other = answers(harness.TTQModel(model, None, seed=1), ("One", sampled))
    assert other[0] not in first

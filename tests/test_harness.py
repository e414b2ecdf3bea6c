"""lm-evaluation-harness on weights made from each prompt: scores, answers, and whole tasks."""

import hashlib
import json
import socket
import string
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_files import CONTEXT, write_model

import ttq_jax as ttq
from ttq_jax import harness
from ttq_jax.calibrate import prepare
from ttq_jax.config import ConfigError
from ttq_jax.continuations import score_padded, stretches
from ttq_jax.generate import generate_tokens
from ttq_jax.harness_arguments import generation_of, load_arguments, recipe_from
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.perplexity import Protocol, score_window
from ttq_jax.prompts import PromptError
from ttq_jax.quant.recipe import preset
from ttq_jax.quant.recipe_text import save_recipe, with_settings
from ttq_jax.sampling import Sampling

# Most of a test's time compiles packed products: two projections are enough to tell weights apart.
SOME = "layers/(v|down)"
RECIPES = {
    "none": None,
    "rtn": preset("rtn", bits=3, select=SOME),
    "paper": preset("paper", bits=3, select=SOME),
    "fast": preset("fast", bits=3, select=SOME),
    "refresh": with_settings(preset("ttq", bits=3, select=SOME), ["moments.refresh=5"]),
}
# Tokens are bytes. Lengths repeat, so that programs do: prompts of 20, continuations of 8.
TOWN = "The capital of Paris"
PAIRS = [
    (TOWN, " is what"),
    (TOWN, " is near"),
    ("Two and two make up ", "4, or so"),
    (TOWN, "? I ask!"),
    ("", "A text from nowhere"),
    ("A context that ends in spaces  ", "and goes on"),
]


@pytest.fixture(autouse=True, scope="module")
def no_network():
    """Whatever would look something up fails at once."""

    def refuse(*args, **kwargs):
        raise AssertionError("a test reached for the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """These programs run for a millisecond: time goes into compiling them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("harness") / "model", bos=False)


@pytest.fixture(scope="module")
def model(directory):
    return ttq.load(directory)


@pytest.fixture(scope="module")
def reference(directory):
    """lm_eval's own adapter for transformers, on the same files."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    made = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return HFLM(made, tokenizer=tokenizer, device="cpu", max_length=64)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def scores(adapter, *pairs):
    return adapter.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


def causal(model, recipe, prompt, continuation):
    """The log-likelihood by the project's own perplexity."""
    tokens = jnp.asarray([*prompt, *continuation], jnp.int32)
    protocol = Protocol(window=len(tokens), prompt_tokens=len(prompt))
    return -float(
        score_window(
            model.params, tokens, prepare(model, recipe), config=model.config, recipe=recipe,
            protocol=protocol,
        )
    )  # fmt: skip


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
    assert adapter.tok_encode("<s>ab", add_special_tokens=True) == [256, 256, a, b]
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
    with pytest.raises(PromptError, match="fewer new tokens than the context has, 16, got 16"):
        adapter.generate_until(requests("generate_until", ("a", {"max_gen_toks": 16})))
    for length in (1, CONTEXT + 1):
        with pytest.raises(ConfigError, match=f"2 to {CONTEXT} tokens, got {length}"):
            harness.TTQModel(model, None, max_length=length)


def answers(adapter, *arguments):
    return adapter.generate_until(requests("generate_until", *arguments), disable_tqdm=True)


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
        return np.zeros((1, 32), np.int32), np.zeros(1, np.int32), {}

    monkeypatch.setattr("ttq_jax.continuations.generate_tokens", generate_nothing)
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


def test_generation_kwargs():
    assert generation_of({}) == ([], 256, Sampling())
    assert generation_of({"until": "x", "max_new_tokens": 5, "do_sample": False,
                          "temperature": 0.7}) == (["x"], 5, Sampling())  # fmt: skip
    assert generation_of({"until": ["x", ""], "temperature": 0.5, "top_k": 3, "top_p": 0.9}) == (
        ["x"], 256, Sampling(temperature=0.5, top_k=3, top_p=0.9)
    )  # fmt: skip
    assert generation_of({"do_sample": True})[2] == Sampling(temperature=1.0)
    for kwargs, message in (
        ({"num_beams": 4}, "got 'num_beams', which ttq cannot do"),
        ({"max_gen_toks": 4, "max_tokens": 5}, "one length, got max_gen_toks and max_tokens"),
        ({"max_gen_toks": 0}, "at least 1 token, got 0"),
        ({"do_sample": True, "temperature": 0.0}, "temperature above 0"),
        ({"temperature": -1.0}, "temperature >= 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            generation_of(kwargs)


def test_model_arguments_say_what_options_say(tmp_path):
    # As lm_eval reads them: -1 is a float to it, and none may be None.
    arguments = {
        "recipe": "best", "bits": 3, "group_size": -1.0, "symmetric": False,
        "rounding.damping": 0.5, "low_rank.error_rank": 4, "moments.prior": None,
        "moments.prior_tokens": 0.0,
    }  # fmt: skip
    settings = ["rounding.damping=0.5", "low_rank.error_rank=4", "moments.prior=none"]
    settings.append("moments.prior_tokens=0")
    expected = with_settings(preset("best", bits=3, group_size=-1, symmetric=False), settings)
    assert recipe_from(arguments) == ("best", expected)
    arguments = {"recipe": "ttq", "scale": "searched", "rank": 2, "prefill": "quantized"}
    settings = ["scale=searched", "low_rank.rank=2", "prefill=quantized"]
    assert recipe_from(arguments) == ("ttq", with_settings(preset("ttq"), settings))
    save_recipe(tmp_path / "my.toml", expected)
    assert recipe_from({"recipe": str(tmp_path / "my.toml")}) == ("my.toml", expected)
    assert recipe_from({}) == ("fast", preset("fast"))
    assert recipe_from({"recipe": None}) == recipe_from({"recipe": "none"}) == ("none", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "fast"}, "expected model=NAME"),
        (
            {"model": "m", "bist": 3},
            r"model_args: expected some of .*got 'bist'; did you mean bits",
        ),
        ({"model": "m", "pretrained": "x"}, "got 'pretrained'"),
        ({"model": "m", "rounding.dampin": 1}, "rounding.dampin: no such key"),
        ({"model": "m", "recipe": "fats"}, "recipe: expected one of none, rtn"),
        (
            {"model": "m", "recipe": "none", "bits": 3},
            "quantizes nothing, so grid.bits=3 has no use",
        ),
        ({"model": "m", "recipe": "awq"}, "recipe awq reads a corpus's moments"),
        ({"model": "no-such-model"}, "no such file or directory"),
        ({"model": "m", "bits": "many"}, "grid.bits: expected a whole number"),
    ],
)
def test_bad_model_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_arguments(arguments)


TASKS = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
        "doc_to_target": "label", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "answers": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "answer",
        "generation_kwargs": {"until": [], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "prose": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, model):
    """Three tasks over one file of six documents; half of the answers are the model's own."""
    home = tmp_path_factory.mktemp("tasks")
    questions = [f"{i}: what is a {topic}? " for i, topic in enumerate(
        ("stone", "light", "glass", "paper", "river", "cloud"))]  # fmt: skip
    own = [ttq.generate(model, [q[:-1]], recipe=RECIPES["fast"], max_new_tokens=16).texts[0]
           for q in questions]  # fmt: skip
    stop = next(c for c in own[1] if c in string.printable)
    documents = [
        {"question": question[:-1], "choices": ["nothing", "a kind.", f"{i} times"], "label": i % 3,
         "answer": own[i].split(stop)[0] if i % 2 else "something else",
         "text": f"{i} notes on {question[14:19]}, of which there is no more to be said here."}
        for i, question in enumerate(questions)
    ]  # fmt: skip
    (home / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    for name, task in TASKS.items():
        if name == "answers":
            task["generation_kwargs"]["until"] = [stop]
        # JSON is YAML.
        (home / f"{name}.yaml").write_text(json.dumps({
            "task": name, "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(home / "data.jsonl")}}, **task,
        }))  # fmt: skip
    return home, documents, stop


@pytest.fixture
def quiet_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def evaluate(adapter, home, names=tuple(TASKS), **options):
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(home), include_defaults=False)
    return lm_eval.simple_evaluate(
        adapter, tasks=list(names), task_manager=manager, bootstrap_iters=0, **options
    )


def test_tasks_give_what_the_protocol_gives(model, tasks, quiet_datasets):
    home, documents, stop = tasks
    recipe = RECIPES["fast"]
    adapter = harness.TTQModel(model, recipe)
    made = evaluate(adapter, home)
    encode = model.tokenizer.encode
    right, right_norm, exact, nll, words, size = [], [], [], 0.0, 0, 0
    for document in documents:
        choices = document["choices"]
        each = [
            causal(model, recipe, encode(document["question"]), encode(f" {choice}"))
            for choice in choices
        ]
        right.append(np.argmax(each) == document["label"])
        lengths = [len(choice) for choice in choices]
        right_norm.append(np.argmax(np.divide(each, lengths)) == document["label"])
        answer = ttq.generate(model, [document["question"]], recipe=recipe, max_new_tokens=16)
        exact.append(answer.texts[0].split(stop)[0] == document["answer"])
        whole = [256, *encode(document["text"])]
        assert len(whole) == 61
        for start, end in ((1, 32), (32, 61)):
            nll -= causal(model, recipe, whole[:start], whole[start:end])
        words += len(document["text"].split())
        size += len(document["text"].encode())
    results = made["results"]
    assert 0 < np.mean(right) < 1 and 0 < np.mean(exact) < 1
    assert results["choices"]["acc,none"] == pytest.approx(np.mean(right))
    assert results["choices"]["acc_norm,none"] == pytest.approx(np.mean(right_norm))
    assert results["answers"]["exact_match,none"] == pytest.approx(np.mean(exact))
    got = results["prose"]
    assert got["bits_per_byte,none"] == pytest.approx(nll / size / np.log(2), rel=1e-4)
    assert np.log(got["word_perplexity,none"]) == pytest.approx(nll / words, rel=1e-4)
    said = made["config"]["ttq"]
    assert said["effective_bits"] == pytest.approx(adapter.effective_bits, abs=1e-4)
    # Two projections at 3 bits and some, the others at 32.
    assert 20 < said["effective_bits"] < 28
    assert said["recipe"] == recipe.describe() and said["method"] == "custom"
    assert said["model"] == "model" and "window before" in said["weights_from"][
        "loglikelihood_rolling"]  # fmt: skip
    assert {"jax", "ttq_jax"} <= said["versions"].keys()


def test_unquantized_tasks_give_what_the_adapter_for_transformers_gives(
    model, reference, tasks, quiet_datasets
):
    home = tasks[0]
    ours, theirs = (
        evaluate(lm, home)["results"] for lm in (harness.TTQModel(model, None), reference)
    )
    for name in TASKS:
        numbers = {key: value for key, value in theirs[name].items() if isinstance(value, float)}
        assert numbers
        for key, value in numbers.items():
            assert ours[name][key] == pytest.approx(value, rel=1e-4), (name, key)


def command_line(monkeypatch, capsys, *arguments):
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(sys, "argv", ["harness", *map(str, arguments)])
    monkeypatch.setattr(harness, "keep_compiled_programs", lambda *_: None)
    # Thousands of tasks need not be looked through for one of ours.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    # Else lm_eval would go on to log to what is stderr now.
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", True)
    code = harness.main()
    return code, capsys.readouterr()


def test_the_command_line(directory, tasks, tmp_path, quiet_datasets, monkeypatch, capsys):
    code, said = command_line(
        monkeypatch, capsys, "--model", "ttq", "--tasks", "choices", "--include_path", tasks[0],
        "--model_args", f"model={directory},recipe=fast,bits=3", f"select={SOME}", "--limit", 3,
        "--output_path", tmp_path,
    )  # fmt: skip
    assert code == 0, said.err
    assert "ttq: fast, 3 bits, group 64, moments prompt + weights prior" in said.err
    assert "|choices" in said.out
    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text())
    assert results["n-samples"]["choices"]["effective"] == 3
    config = results["config"]["ttq"]
    assert (config["method"], config["recipe"]) == ("fast", RECIPES["fast"].describe())
    assert str(directory) not in json.dumps(config)


def test_unusable_input_is_one_line(tasks, monkeypatch, capsys):
    code, said = command_line(
        monkeypatch, capsys, "--model", "ttq", "--tasks", "choices", "--include_path", tasks[0],
        "--model_args", "model=smollm2,bist=3",
    )  # fmt: skip
    last = said.err.splitlines()[-1]
    assert code == 2 and last.startswith("ttq: error: ") and "did you mean bits?" in last
    assert "Traceback" not in said.err


def test_a_calibration_text_is_named_by_its_hash(directory, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Some prose to calibrate on. " * 20)
    adapter = harness.TTQModel.create_from_arg_string(
        f"model={directory},recipe=awq,bits=3,scale.steps=2,select=layers/v,calibration={corpus},"
        "calibration_tokens=128",
        {"batch_size": 1, "device": "cuda:0"},
    )
    said = adapter.get_model_info()["ttq"]
    assert (said["method"], said["calibration"]) == ("awq", "corpus.txt")
    assert said["calibration_sha256"] == hashlib.sha256(corpus.read_bytes()).hexdigest()
    assert said["calibration_tokens"] == 128
    assert str(tmp_path) not in json.dumps(said)


def test_chat_templates_are_refused(model, tasks, quiet_datasets):
    with pytest.raises(ConfigError, match="leave out --apply_chat_template"):
        evaluate(harness.TTQModel(model, None), tasks[0], ["choices"], apply_chat_template=True)


def test_without_lm_eval_the_extra_is_named():
    program = (
        "import runpy, sys; sys.modules['lm_eval'] = None\n"
        "runpy.run_module('ttq_jax.harness', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        'ttq: error: lm_eval is not installed; it comes with: pip install "ttq-jax[lm-eval]"\n'
    )
    assert not done.stdout

"""Chat templates: rendered as by transformers, without a second BOS; a bad one is refused."""

import dataclasses
import json
import time

import pytest
from chat_templates import TEMPLATES
from tiny_files import write_model
from tokenizers import AddedToken, Tokenizer

import ttq_jax as ttq
from ttq_jax.chat import worker
from ttq_jax.chat.ask import Asked, ask
from ttq_jax.chat.render import Renderer
from ttq_jax.checkpoint.chat_template import ChatTemplate, gguf_template, read_template
from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.hf_tokenizer import load_tokenizer
from ttq_jax.checkpoint.hub import _UNWANTED, _WANTED
from ttq_jax.prompts import PromptError

USER = {"role": "user", "content": "  Wie groß ist 2 < 3? "}
TALK = [USER, {"role": "assistant", "content": " 漢字\n\n"}, {"role": "user", "content": "{{ 1 }}"}]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ttq.load(write_model(tmp_path_factory.mktemp("tiny") / "tiny"))


@pytest.fixture(scope="module")
def render():
    with Renderer() as opened:
        yield opened


def with_template(model, directory, text, bos="<s>", eos="</s>", special=()):
    """The model with the tokenizer and template of a directory that is written here."""
    directory.mkdir(exist_ok=True)
    tokens = dict.fromkeys(t for t in (bos, eos, *special) if t)
    backend = Tokenizer.from_str(model.tokenizer._backend.to_str())
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in tokens])
    backend.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos,
        "add_bos_token": bos is not None, "chat_template": text,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    size = backend.get_vocab_size()
    tokenizer = load_tokenizer(directory, rows=size, ends=[backend.token_to_id(eos)])
    config = dataclasses.replace(model.config, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(
        model, config=config, tokenizer=tokenizer, eos_ids=tokenizer.eos_ids,
        chat=read_template(directory, tokenizer)[0],
    )  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_published_template_is_rendered_as_transformers_does(model, render, tmp_path, name):
    from transformers import PreTrainedTokenizerFast

    text, bos, eos, special, end = TEMPLATES[name]
    model = with_template(model, tmp_path, text, bos, eos, special)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    refused = 0
    for messages in ([USER], TALK, [SYSTEM, USER], [SYSTEM, *TALK]):
        how = {"conversation": messages, "add_generation_prompt": True}
        try:
            want = theirs.apply_chat_template(**how, tokenize=False)
        except Exception as e:
            refused += 1
            with pytest.raises(PromptError, match=f"template refuses the messages: {e}"):
                ask(model, [messages], chat=True, render=render)
            continue
        asked = ask(model, [messages], chat=True, render=render)
        assert asked.texts == [want]
        assert asked.rows == [theirs.apply_chat_template(**how, return_dict=False)]
        # The template writes the begin of text, if it wants one.
        assert [i == model.tokenizer.bos_id for i in asked.rows[0][:2]] in (
            [want.startswith(bos or "?"), False], [False, False],
        )  # fmt: skip
        ends = [model.tokenizer.token(i) for i in asked.eos_ids]
        assert ends == list(dict.fromkeys((eos, end)))
    assert refused == (
        2 if name in {"mistralai/Mistral-7B-Instruct-v0.2", "google/gemma-7b-it"} else 0
    )


def test_where_templates_are_found(model, tmp_path):
    def found(**files):
        for name, content in files.items():
            content = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name.replace("__", ".")).write_text(content)
        try:
            return read_template(tmp_path, model.tokenizer)[0]
        finally:
            for name in files:
                (tmp_path / name.replace("__", ".")).unlink()

    assert found() is None
    assert found(tokenizer_config__json={"chat_template": None}) is None
    plain = found(
        tokenizer_config__json={"chat_template": "A", "eos_token": {"content": "<end>"}},
        special_tokens_map__json={"eos_token": "<old>", "unk_token": "<unk>"},
    )
    assert plain == ChatTemplate(
        "A", {"bos_token": "<s>", "eos_token": "<end>", "unk_token": "<unk>"}
    )
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert found(tokenizer_config__json={"chat_template": several}).text == "D"
    with pytest.raises(CheckpointError, match="template named default, found tool_use"):
        found(tokenizer_config__json={"chat_template": several[:1]})
    with pytest.raises(CheckpointError, match="chat_template: expected null or a text"):
        found(tokenizer_config__json={"chat_template": 3})
    assert found(chat_template__json={"chat_template": "J"}).text == "J"
    everywhere = {
        "chat_template__json": {"chat_template": "J"}, "chat_template__jinja": "F",
        "tokenizer_config__json": {"chat_template": "A"},
    }  # fmt: skip
    assert found(**everywhere).text == "F"
    assert found(**{k: v for k, v in everywhere.items() if "jinja" not in k}).text == "A"
    assert gguf_template({"tokenizer.chat_template": "G"}, model.tokenizer, "x").text == "G"
    assert gguf_template({}, model.tokenizer, "x") is None
    with pytest.raises(CheckpointError, match=r"x: tokenizer\.chat_template: expected a text"):
        gguf_template({"tokenizer.chat_template": 3}, model.tokenizer, "x")


def test_a_download_brings_them():
    from huggingface_hub.utils import filter_repo_objects

    names = ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"]
    files = [*names, "onnx/chat_template.jinja", "README.md", "pytorch_model.bin"]
    how = {"allow_patterns": list(_WANTED), "ignore_patterns": list(_UNWANTED)}
    assert list(filter_repo_objects(files, **how)) == names


BAD = {
    "{% for m in messages": "refuses the messages: line 1: unexpected end of template",
    "{{ raise_exception('no\n\x1b[2Jway') }}": "refuses the messages: no \ufffd[2Jway",
    "{{ messages.append }}{{ messages.append(1) }}": "attribute 'append' of 'list' object",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages[0].content.nothing.at_all }}": "has no attribute",
    "{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}": "a text of 9899901 characters; at mo",
    "{{ 'x' * 10 ** 11 }}": "MemoryError",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_template_is_refused_in_a_line(model, render, text):
    bad = dataclasses.replace(model, chat=ChatTemplate(text, {}))
    with pytest.raises(PromptError, match="chat template") as told:
        ask(bad, ["hello"], chat=True, render=render)
    assert BAD[text] in str(told.value)
    assert "\n" not in str(told.value)


def test_an_endless_template_ends(model, monkeypatch):
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    endless = dataclasses.replace(model, chat=ChatTemplate(loop, {}))
    start = time.process_time()
    with Renderer() as render:
        with pytest.raises(PromptError, match="more than 5 seconds of computing"):
            ask(endless, ["hello"], chat=True, render=render)
        # Its process is gone; the next one gets another.
        fine = dataclasses.replace(model, chat=ChatTemplate("{{ messages[0].content }}", {}))
        assert ask(fine, ["hello"], chat=True, render=render).texts == ["hello"]
    assert time.process_time() - start < 5


def test_a_process_that_waits_for_ever_ends(model, monkeypatch, tmp_path):
    (tmp_path / "transformers.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(worker, "PATIENCE", 1)
    fine = dataclasses.replace(model, chat=ChatTemplate("x", {}))
    with pytest.raises(PromptError, match="or more than 1 seconds"):
        ask(fine, ["hello"], chat=True)


def test_a_broken_installation_is_told(model, monkeypatch, tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fine = dataclasses.replace(model, chat=ChatTemplate("x", {}))
    with pytest.raises(PromptError, match="transformers cannot be used; install ttq-jax again"):
        ask(fine, ["hello"], chat=True)


def test_conversations_are_checked(model):
    fine = dataclasses.replace(model, chat=ChatTemplate("{{ messages[0].content }}", {}))
    with pytest.raises(PromptError, match=r"tiny: has no chat template, so that its messages have"):
        ask(model, ["hello"], chat=True)
    for texts, says in [
        ([], 'texts: expected a list of conversations, as in [[{"role"'),
        ("hello", "texts: expected a list of conversations"),
        ([[]], "a conversation: expected messages of which the last one"),
        ([3], "a conversation: expected messages"),
        ([[USER, TALK[1]]], "got an assistant's message at the end"),
        ([[{"role": "user"}]], "a message: expected a role and a content, both texts"),
        ([[{"role": "user", "content": 3}]], "a message: expected a role"),
        ([[USER | {"name": "x"}]], "a message: expected a role"),
        ([[3]], "a message: expected a role"),
    ]:
        with pytest.raises(PromptError) as told:
            ask(fine, texts, chat=True)
        assert says in str(told.value)


def test_a_question_that_is_ready_is_asked_as_it_is(model):
    asked = Asked(["a", "b", "c"], [[1], [2], [3]], (9,))
    assert ask(model, asked, chat=True) is asked
    assert asked.part(1, 3) == Asked(["b", "c"], [[2], [3]], (9,))

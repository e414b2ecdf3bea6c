"""`ttq generate` with --chat, --stream and --conversation."""

import json

import pytest

import ttq_jax as ttq
from ttq_jax.checkpoint.store import load_messages

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow

SELECT = ("--recipe", "rtn", "--select", "layers/q")
SHORT = ("--max-new-tokens", 4, *SELECT)


@pytest.fixture
def chat(cli_json, instruct):
    def run(*args):
        return cli_json("generate", "--model", instruct, "--chat", *SHORT, *args)

    return run


def test_a_prompt_is_a_message(chat, cli, instruct):
    (got,) = chat("--prompt", "Hi", "--system", "Be brief.")
    assert got["prompt"] == "<s>system\nBe brief.</s>\n<s>user\nHi</s>\n<s>assistant\n"
    # A byte is a token here; a mark is one too, and there is no second begin of text.
    assert got["prompt_tokens"] == len(got["prompt"].replace("<s>", "#").replace("</s>", "#"))
    assert [m["role"] for m in got["messages"]] == ["system", "user"]
    model = ttq.load(instruct)
    recipe = ttq.preset("rtn", select="layers/q")
    made = ttq.generate(model, [got["messages"]], recipe=recipe, max_new_tokens=4, chat=True)
    assert made.texts == [got["text"]]
    code, out, err = cli(
        "generate", "--model", instruct, "--chat", *SHORT, "--prompt", "Hi", "--system",
        "Be brief.", "--no-compilation-cache",
    )  # fmt: skip
    assert (code, out) == (0, got["text"] + "\n")
    assert "instruct" not in err


def test_the_end_of_a_turn_ends_an_answer(instruct):
    """</s>, which no file of this model names as the end of a text."""
    from ttq_jax.chat.ask import ask

    model = ttq.load(instruct)
    assert ask(model, ["a"]).eos_ids == (256,)
    assert ask(model, ["a"], chat=True).eos_ids == (256, 257)


def test_json_lines_are_conversations(chat, cli, instruct, tmp_path):
    talk = [{"role": "user", "content": c} for c in "ab"]
    talk.insert(1, {"role": "assistant", "content": "x"})
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps(talk) + "\n" + json.dumps({"id": 1, "messages": talk[:1]}) + "\n")
    got = chat("--prompts-file", path)
    assert [g["messages"] for g in got] == [talk, talk[:1]]
    both = chat("--prompts-file", path, "--batch-size", 2)
    assert [g["prompt"] for g in both] == [g["prompt"] for g in got]
    for line, says in {
        '{"role": "user", "content": "a"}': "line 1: expected a list of messages, or an object",
        "3": "line 1: expected a list of messages",
        "{": "line 1: expected valid JSON",
        '[{"role": "assistant", "content": "a"}]': "an assistant's message at the end",
        '[{"role": "user"}]': "a message: expected a role and a content",
    }.items():
        path.write_text(line + "\n")
        code, _, err = cli("generate", "--model", instruct, "--chat", "--prompts-file", path)
        assert (code, err.count("\n")) == (2, 1)
        assert says in err


@pytest.mark.parametrize("chat", [False, True])
def test_a_streamed_answer_is_the_same_answer(cli, instruct, tmp_path, chat):
    path = tmp_path / "prompts.txt"
    path.write_text("first\nGröße, the second\n", "utf-8")
    args = ["--model", instruct, "--prompts-file", path, "--max-new-tokens", 20, *SELECT]
    args += ["--no-compilation-cache", *(["--chat"] if chat else [])]
    code, whole, _ = cli("generate", *args)
    assert code == 0
    code, out, err = cli("generate", *args, "--stream")
    assert (code, out) == (0, whole)
    assert "compiling and reading the prompt" in err
    assert "stopped by" in err


def test_pieces_are_written_as_they_come(cli, tiny, monkeypatch):
    from ttq_jax.commands import output

    written, write = [], output.write
    monkeypatch.setattr(output, "write", lambda text: (written.append(text), write(text)))
    code, out, _ = cli(
        "generate", "--model", tiny, "--prompt", "ab", "--stream", "--max-new-tokens", 30, *SELECT,
        "--no-compilation-cache",
    )  # fmt: skip
    assert code == 0
    assert "".join(written) == out
    assert len(written) > 4
    assert written[0] == "ab"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--stream", "--json"], "--stream: JSON is printed when it is complete"),
        (["--stream", "--batch-size", 2], "--stream: expected --batch-size 1"),
        (["--system", "x"], "--system: a system message needs roles; add --chat"),
        (["--chat"], "has no chat template"),
    ],
)
def test_what_does_not_go_together_is_refused(cli, tiny, options, says):
    code, out, err = cli("generate", "--model", tiny, "--prompt", "a", "--quiet", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_an_instruct_model_without_chat_is_told(cli, instruct, tiny):
    for model, told in ((instruct, True), (tiny, False)):
        code, _, err = cli(
            "generate", "--model", model, "--prompt", "a", *SHORT, "--no-compilation-cache"
        )
        assert code == 0
        assert ("is an instruct model: --chat" in err) is told


def test_a_conversation_keeps_messages_and_moments(chat, cli, instruct, tmp_path):
    place = tmp_path / "talk"
    model = ttq.load(instruct)
    (one,) = chat("--prompt", "first", "--system", "S", "--conversation", place)
    (two,) = chat("--prompt", "second", "--conversation", place)
    assert two["messages"] == [
        *one["messages"], {"role": "assistant", "content": one["text"]},
        {"role": "user", "content": "second"},
    ]  # fmt: skip
    assert load_messages(place, model)[-1] == {"role": "assistant", "content": two["text"]}
    # Two turns of one call are the same as two calls.
    (tmp_path / "turns.txt").write_text("first\nsecond\n")
    again = chat("--prompts-file", tmp_path / "turns.txt", "--system", "S", "--conversation",
                 tmp_path / "other")  # fmt: skip
    assert [g["text"] for g in again] == [one["text"], two["text"]]

    def refused(*args):
        code, _, err = cli("generate", "--model", instruct, "--conversation", place, *args)
        assert (code, err.count("ttq: error")) == (2, 1)
        return err

    assert "another system message" in refused("--chat", "--prompt", "x", "--system", "T", *SHORT)
    decay = ("--recipe", "ttq", "--select", "layers/q", "--set", "moments.decay=0.5")
    assert "keeps messages; add --chat" in refused("--prompt", "x", *decay)
    (tmp_path / "t.jsonl").write_text(json.dumps(one["messages"]) + "\n")
    assert "got whole conversations" in refused("--chat", "--prompts-file", tmp_path / "t.jsonl")


def test_a_conversation_without_messages_goes_on_as_a_chat(cli_json, instruct, tmp_path):
    """As every version before wrote it: moments alone."""
    decay = ("--recipe", "ttq", "--select", "layers/q", "--set", "moments.decay=0.5",
             "--max-new-tokens", 3)  # fmt: skip
    place = tmp_path / "old"
    common = ("generate", "--model", instruct, *decay, "--conversation", place)
    cli_json(*common, "--prompt", "before")
    model = ttq.load(instruct)
    recipe = ttq.with_settings(ttq.preset("ttq", select="layers/q"), ["moments.decay=0.5"])
    assert load_messages(place, model) == []
    before = ttq.load_conversation(place, model, recipe)
    (got,) = cli_json(*common, "--prompt", "now", "--chat")
    assert [m["content"] for m in got["messages"]] == ["now"]
    assert [m["role"] for m in load_messages(place, model)] == ["user", "assistant"]
    after = ttq.load_conversation(place, model, recipe)
    want = 0.5 * float(before["attn_in"].count[0]) + got["prompt_tokens"]
    assert float(after["attn_in"].count[0]) == want


def test_a_real_instruct_model_answers_as_an_assistant(cli_json):
    """Its GGUF file brings the template; without it the same words are a text to be continued."""
    question = "What is the capital of France?"
    (got,) = cli_json(
        "generate", "--model", "smollm2", "--chat", "--prompt", question, "--max-new-tokens", 24
    )
    assert got["prompt"].startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )
    assert got["prompt"].endswith(f"user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    assert "Paris" in got["text"]
    assert (got["stopped"], got["text"]) == ("end", got["text"].strip())

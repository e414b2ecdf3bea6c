"""`ttq chat`: a script of lines, a terminal, Ctrl-C, and how often it compiles."""

import contextlib
import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
from compilers import QUICKLY
from safetensors.numpy import load_file, save_file

import ttq_jax as ttq
from ttq_jax.checkpoint.store import load_messages
from ttq_jax.stream import go_on, start

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow

SELECT = ("--recipe", "rtn", "--select", "layers/q")
TTQ = [sys.executable, "-m", "ttq_jax", "chat"]


@pytest.fixture
def chat(cli, instruct, monkeypatch):
    """Runs a script of lines: (exit code, stdout, stderr)."""

    def run(*lines, options=SELECT, model=instruct, new=4):
        script = "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(script), "utf-8"))
        return cli(
            "chat", "--model", model, *options, "--max-new-tokens", new, "--no-compilation-cache"
        )

    return run


def test_a_session_with_drafts_answers_as_the_unquantized_model(chat):
    options = (*SELECT, "--speculate", 2)
    code, plain, err = chat("Hi", options=("--recipe", "none"))
    assert code == 0, err
    code, out, err = chat("Hi", "/stats", options=options)
    assert code == 0, err
    assert out.startswith(plain)
    assert "drafts were kept" in out
    code, _, err = chat("/recipe none", options=options)
    assert code == 2
    assert "expected a recipe whose quantized weights draft" in err


def test_a_session_is_a_conversation_and_compiles_once(chat, instruct, tmp_path):
    # A byte is a token: with this the session stays in one bucket, that of 256.
    system, place = "x" * 150, tmp_path / "kept"
    before = start._cache_size(), go_on._cache_size()
    code, out, err = chat(
        "Hi", "größer", "", " /no command", options=(*SELECT, "--system", system,
                                                    "--conversation", place),
    )  # fmt: skip
    assert code == 0, err
    assert (start._cache_size(), go_on._cache_size()) == (before[0] + 1, before[1] + 1)
    assert err.count("compiling and reading …") == 1
    model, recipe = ttq.load(instruct), ttq.preset("rtn", select="layers/q")
    messages = [{"role": "system", "content": system}]
    for text in ("Hi", "größer", "/no command"):
        messages.append({"role": "user", "content": text})
        made = ttq.generate(model, [messages], recipe=recipe, max_new_tokens=4, chat=True)
        messages.append({"role": "assistant", "content": made.texts[0]})
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    assert out == "".join(f"{text}\n" for text in said)
    assert load_messages(place, model) == messages
    # And it goes on there.
    code, _, err = chat("more", options=(*SELECT, "--conversation", place))
    assert code == 0
    assert "7 messages were said before" in err
    assert len(load_messages(place, model)) == 9


def test_commands_do_what_they_say(chat):
    code, out, err = chat(
        "/stats", "/help", "Hi", "/stats", "Hi", "/recipe hqq", "Hi", "/stats", "/reset", "/stats",
        "Hi", "/quit", "never read",
    )  # fmt: skip
    assert code == 0, err
    lines = out.splitlines()
    assert lines.count("nothing was answered yet") == 2
    assert [line.split()[0] for line in lines if line.startswith("/")] == [
        "/recipe", "/stats", "/reset", "/help", "/quit"
    ]  # fmt: skip
    first, second = (i for i, line in enumerate(lines) if "bits per weight" in line)
    assert lines[first].startswith("rtn, 4 bits")
    assert lines[second].startswith("hqq, 4 bits")
    assert lines[first + 1].startswith("2 messages, ")
    assert lines[second + 1].startswith("6 messages, ")
    assert "new; stopped by: " in lines[first + 2]
    assert "compiling included" in lines[first + 3]
    assert "never read" not in out
    # After /reset the first question is the first again.
    read = [int(line.split()[0]) for line in lines if "tokens read" in line]
    assert read[0] == len("#user\nHi#\n#assistant\n")
    assert "a new conversation begins" in err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/stat", "/stat: no such command; /help lists them"),
        ("/recipe", "/recipe: expected a name"),
        ("/recipe nope", "/recipe: "),
        ("/recipe awq", "calibrat"),
        ("x" * 4096, "the conversation is full: it has 4115 tokens with this message"),
    ],
    ids=["command", "no name", "no recipe", "no corpus", "too long"],
)
def test_a_script_ends_at_a_line_that_cannot_be_done(chat, line, says):
    code, out, err = chat(line, "Hi")
    assert (code, out, err.count("ttq: error")) == (2, "", 1)
    assert says in err


def test_what_cannot_chat_is_refused(chat, tiny, monkeypatch, cli):
    code, _, err = chat("Hi", model=tiny)
    assert (code, "has no chat template" in err) == (2, True)
    code, _, err = chat("Hi", options=("--recipe", "awq"))
    assert (code, "needs a calibration corpus" in err) == (2, True), err
    code, _, err = chat("Hi", new=0)
    assert (code, "--max-new-tokens of at least 1" in err) == (2, True)
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = cli("chat", "--model", tiny)
    assert (code, "it is closed" in err) == (2, True)


@pytest.fixture(scope="module")
def endless(instruct, tmp_path_factory):
    """The same model with answers that never end: no likeliest token has a logit of zero."""
    place = tmp_path_factory.mktemp("endless") / "tiny"
    shutil.copytree(instruct, place)
    tensors = load_file(place / "model.safetensors")
    tensors["model.embed_tokens.weight"][256:258] = 0
    save_file(tensors, place / "model.safetensors")
    return str(place)


def environment():
    return os.environ | QUICKLY | {"TERM": "dumb"}


def long_answers(model):
    return [*TTQ, "--model", model, *SELECT, "--max-new-tokens", "3500", "--no-compilation-cache"]


@contextlib.contextmanager
def started(command, **options):
    """A process that does not outlive the test."""
    with subprocess.Popen(command, env=environment(), **options) as process:
        try:
            yield process
        finally:
            process.kill()


PIPES = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
# What a busy machine may need: an interrupt waits for the compiler.
PATIENCE = 300


def test_ctrl_c_stops_the_answer_and_keeps_the_session(endless):
    with started(long_answers(endless), **PIPES) as process:
        check_one_interrupt(process)


def check_one_interrupt(process):
    process.stdin.write(b"Hi\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(b"/stats\n/quit\n", timeout=PATIENCE)
    assert process.returncode == 0, err
    assert b"stopped by: caller" in out
    assert b"2 messages" in out
    assert b"stopping; Ctrl-C again ends the session" in err


def test_ctrl_c_twice_ends_it(endless):
    with started(long_answers(endless), **PIPES) as process:
        process.stdin.write(b"Hi\n")
        process.stdin.flush()
        read_until(process.stderr, b"compiling")
        process.send_signal(signal.SIGINT)
        read_until(process.stderr, b"stopping")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 130


def read_until(pipe, word):
    """Reads lines up to one with a word; the end of the process is an error, not an empty line."""
    while word not in (line := pipe.readline()):
        assert line, f"the process ended before it said {word}"


def test_at_a_terminal_lines_are_edited_and_mistakes_are_told(instruct):
    ours, theirs = pty.openpty()
    command = [
        *TTQ, "--model", instruct, *SELECT, "--max-new-tokens", "4", "--no-compilation-cache"
    ]  # fmt: skip
    with started(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        use_terminal(process, ours)
    os.close(ours)


def use_terminal(process, ours):
    seen = b""

    def until(text, keys=b"", again=lambda: None):
        """Reads up to a text; calls `again` every two seconds without one."""
        nonlocal seen
        os.write(ours, keys)
        end = time.monotonic() + PATIENCE
        again()
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 2)[0]:
                seen += os.read(ours, 1000)
            else:
                again()
        before, _, seen = seen.partition(text)
        return before

    until(b"> ")
    until(b"no such command", b"/statz\n")  # told, and the session goes on
    until(b"> ")
    until(b"nothing was answered yet", b"/statz\x7fs\n")  # backspace
    until(b"> ")
    until(b"nothing was answered yet", b"\x10\n")  # the line before, by Ctrl-P
    until(b"> ")
    # Between its prompt and its first look at the keyboard readline misses a signal.
    until(b"/quit or Ctrl-D ends the session", again=lambda: process.send_signal(signal.SIGINT))
    until(b"> ")
    until(b"> ", b"Hi\n")
    os.write(ours, b"\x04")
    assert process.wait(timeout=PATIENCE) == 0

import json

import pytest
from tiny_files import write_model

from ttq_jax.commands import compiled
from ttq_jax.commands.main import main


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Path of a tiny model that begins texts with <s>."""
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny"))


CHATML = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def instruct(tmp_path_factory):
    """Path of a tiny model with a chat template, whose end of a turn is not its end of a text."""
    place = tmp_path_factory.mktemp("chat") / "tiny"
    write_model(place, eos_token_id=256, max_position_embeddings=4096)
    settings = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": CHATML, "eos_token": None})
    )
    return str(place)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Path of a text of some thousand bytes, which are the tiny model's tokens."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("".join(f"Line {i}: naïve résumé, {i * i}.\n" for i in range(120)), "utf-8")
    return str(path)


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs the command line in this process: (exit code, stdout, stderr)."""
    # A setting of the whole process, and other tests run in it; test_process sees it at work.
    monkeypatch.setattr(compiled, "keep_compiled_programs", lambda directory, progress: None)

    def run(*args):
        code = main([*map(str, args)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def cli_json(cli):
    """Runs a command with --json that must succeed: the objects it printed."""

    def run(*args):
        code, out, err = cli(*args, "--json", "--no-compilation-cache")
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]

    return run

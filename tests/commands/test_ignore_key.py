"""`--ignore-key`, the user's word that a setting changes nothing: wherever a model is loaded."""

import json

import pytest
from tiny_files import write_model
from tiny_gguf import random_llama, write_gguf

from ttq_jax.checkpoint import CheckpointError
from ttq_jax.commands.parsers import build_parser
from ttq_jax.config import ConfigError
from ttq_jax.evaluation import preparation
from ttq_jax.evaluation.harness_arguments import check_arguments, load_arguments
from ttq_jax.sweeps.rows import read_rows

NOTE = "odd_key = 1 is ignored, as asked"


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A tiny model with a key in its config.json that nobody knows."""
    return str(write_model(tmp_path_factory.mktemp("odd") / "model", odd_key=1))


def test_without_it_the_message_names_it(cli, odd):
    code, out, err = cli("inspect", "--model", odd)
    assert (code, out) == (2, "")
    assert "unknown key odd_key" in err and "--ignore-key odd_key" in err


def test_notes_are_on_stderr_and_in_the_json(cli, cli_json, odd):
    words = ["generate", "--model", odd, "--prompt", "hello", "--max-new-tokens", 2,
             "--method", "none", "--ignore-key", "odd_key"]  # fmt: skip
    code, _, err = cli(*words, "--no-compilation-cache")
    assert code == 0
    assert f"ttq: {NOTE}\n" in err
    (row,) = cli_json(*words)
    assert row["notes"] == [NOTE]


def test_a_key_that_counts_cannot_be_ignored(cli, odd):
    code, _, err = cli("inspect", "--model", odd, "--ignore-key", "odd_key", "--ignore-key",
                       "hidden_size")  # fmt: skip
    assert code == 2
    assert "--ignore-key hidden_size: this key counts" in err


def options_of():
    """The options of each command."""
    commands = next(
        action.choices for action in build_parser()._actions if isinstance(action.choices, dict)
    )
    return {
        name: {option for action in parser._actions for option in action.option_strings}
        for name, parser in commands.items()
    }


def test_every_command_that_takes_a_model_takes_it():
    for name, options in options_of().items():
        assert ("--ignore-key" in options) == ("--model" in options), name
    assert "--ignore-key" in options_of()["inspect"]


# What each command asks for besides a model.
NEEDS = {
    "generate": ["--prompt", "x"], "chat": [], "perplexity": ["--corpus", "builtin:prose"],
    "acceptance": ["--corpus", "builtin:prose"],
    "prepare": ["--recipe", "rtn", "--out", "prepared"], "inspect": [], "kernels": [],
    "allocate": ["--corpus", "builtin:prose", "--budget", "4", "--out", "mine.toml"],
}  # fmt: skip


@pytest.mark.parametrize("form", ["directory", "gguf", "alias", "released"])
def test_no_form_of_a_model_takes_it_silently(form, cli, odd, tmp_path, monkeypatch):
    """The loader gets it and answers for it; where none is asked, the command refuses it."""
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "m.gguf", "llama", *random_llama())
    forms = {"directory": odd, "gguf": "m.gguf", "alias": "smollm2", "released": "qwen3-8b"}

    def load(model, *, ignore_keys, **how):
        raise CheckpointError(f"{model} was asked to ignore {' '.join(ignore_keys)}")

    monkeypatch.setattr(preparation, "load", load)
    # `ttq plan` loads nothing: see its own test.
    assert {name for name, options in options_of().items() if "--ignore-key" in options} == {
        *NEEDS, "plan",
    }  # fmt: skip
    for name, needs in NEEDS.items():
        words = [name, "--model", forms[form], *needs, "--ignore-key", "third"]
        code, out, err = cli(*words, "--no-compilation-cache")
        assert (code, out) == (2, ""), name
        refused = name == "kernels" and form == "released"
        assert ("--ignore-key: the sizes of" if refused else "asked to ignore third") in err, name


def test_a_sweep_has_it_as_an_axis(cli, odd, text_file, tmp_path):
    path, out = tmp_path / "sweep.toml", tmp_path / "out"
    path.write_text(
        f'model = "odd={odd}"\ncorpus = "{text_file}"\nrecipe = "none"\nwindow = 16\n'
        'prompt_tokens = 8\nmax_windows = 1\nignore_key = "odd_key third"\n'
    )
    code, _, err = cli("sweep", path, "--out", out, "--no-compilation-cache")
    assert code == 0, err
    notes = [NOTE, "--ignore-key third has no effect: there is no such key"]
    (row,) = read_rows(out).values()
    assert row["notes"] == notes
    assert row["cell"]["ignore_key"] == "odd_key third"
    for note in notes:
        assert f"ttq: model: {note}\n" in err
    assert json.loads((out / "rows.jsonl").read_text())["notes"] == notes


def test_the_harness_has_it_as_a_model_argument(odd, capsys):
    made = load_arguments({"model": odd, "recipe": "none", "ignore_key": "odd_key"})
    assert made["model"].notes == (NOTE,)
    assert NOTE in capsys.readouterr().err
    with pytest.raises(ConfigError, match="did you mean ignore_key"):
        check_arguments({"model": odd, "ignore_keys": "odd_key"})

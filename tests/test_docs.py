"""The guides' examples run, and the files that they name are there."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from compilers import QUICKLY
from marks import slow_but
from tiny_files import write_model

from ttq_jax.commands.main import main
from ttq_jax.commands.parsers import build_parser

ROOT = Path(__file__).parent.parent
GUIDES = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/README.md",
                 "experiments/RESULTS.md", "ttq_jax/quant/README.md", "ttq_jax/chat/README.md",
                 "ttq_jax/functions/README.md", "ttq_jax/chips/README.md",
                 "pallas_kernels/README.md")
}  # fmt: skip


@pytest.mark.parametrize("model", slow_but(["tiny", "smollm2"], ["tiny"]))
def test_a_quantizer_of_your_own(model, tmp_path):
    """On a tiny model it runs; on the real one it is better than no scale."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDES["CONTRIBUTING.md"], re.S)
    assert len(code.strip().splitlines()) < 40
    tiny = model == "tiny"
    if tiny:
        assert code.count('load("smollm2")') == 1
        code = code.replace('"smollm2"', repr(str(write_model(tmp_path / "model"))))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False,
        env=os.environ | (QUICKLY if tiny else {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {
        name: float(value)
        for name, value in (line.split(": ") for line in done.stdout.splitlines())
    }
    assert list(found) == ["NoScale", "PowerLaw", "PowersOfTwo"]
    assert len(set(found.values())) == 3
    assert tiny or max(found["PowerLaw"], found["PowersOfTwo"]) < found["NoScale"]


@pytest.mark.slow
def test_a_chat_of_your_own(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", GUIDES["ttq_jax/chat/README.md"], re.S)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False,
        env=os.environ | QUICKLY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "Paris" in first
    assert "Rome" in second


def test_a_model_of_your_own(tmp_path):
    code = "\n".join(
        re.findall(r"```python\n(.*?)```", GUIDES["ttq_jax/functions/README.md"], re.S)
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False,
        env=os.environ | QUICKLY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "params/attention_0/key/kernel" in done.stdout
    *_, error, first, second = done.stdout.splitlines()
    assert 0.001 < float(error) < 0.2
    assert len(first.split() + second.split()) >= 16


def test_a_sweep_of_your_own(tmp_path, monkeypatch, capsys):
    section = GUIDES["experiments/README.md"].partition("## How to read a report")[0]
    (text,) = re.findall(r"```toml\n(.*?)```", section, re.S)
    model = write_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(text)
    Path("my_text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(99)))
    for command in re.findall(r"^ttq (.*?)(?:\s+#.*)?$", section, re.M):
        words = command.split()
        if words[0] == "sweep":
            # The tiny model in the place of the real one, and of its windows. Most of the time
            # would compile packed products: two projections are enough.
            words += ["--axis", f"model={model}", "--axis", "window=64", "--axis",
                      "prompt_tokens=32", "--axis", "max_windows=1", "--axis",
                      "select=layers/(v|down)"]  # fmt: skip
        assert main([*words, "--no-compilation-cache"]) == 0, capsys.readouterr().err
    report = Path("results/report.md").read_text()
    assert "| fast, 4-bit |" in report
    assert Path("results/report.html").exists()


@pytest.mark.parametrize("name", GUIDES)
def test_files_that_are_named_exist(name):
    text = GUIDES[name]
    named = re.findall(r"`([\w./]+/(?!NAME)[\w.]*\.(?:py|toml|md|jsonl?|ipynb))`", text)
    named += re.findall(r"(?:python|sweep|--recipe) (experiments/[^\s`]+)", text)
    for line in re.findall(r"^pytest (.*)$", text, re.M):
        named += re.findall(r"tests/\S+", line)
    for path in named:
        assert (ROOT / path).exists(), path


def anchors(text):
    """The names by which a Markdown file's headings are linked to."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", GUIDES[name]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("name", GUIDES)
def test_commands_that_are_named_are_understood(name):
    parser = build_parser()
    commands = parser._subparsers._group_actions[0].choices
    fenced = re.findall(r"^ttq (.+?)(?:\s+#.*)?$", GUIDES[name], re.M)
    for line in [*fenced, *re.findall(r"`ttq ([^`]+)`", GUIDES[name])]:
        words = shlex.split(line.partition(" >")[0])
        assert words[0] in commands, line
        # Not a command's name alone, nor one cut short. lm_eval has a parser of its own.
        whole = "--" in line and "--help" not in line and "… " not in line
        if whole and words[0] != "lm-eval":
            parser.parse_args(words)


def test_the_citation_names_the_licence_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["license"] == project["license"]
    (paper,) = cited["references"]
    assert paper["url"] in GUIDES["README.md"]

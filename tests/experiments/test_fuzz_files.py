"""Damaged files have no other outcome than those that the experiment names; a short run of it."""

import subprocess
import sys
from pathlib import Path

import pytest

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(*words):
    command = [sys.executable, "experiments/fuzz_files.py", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_a_thousand_damaged_files():
    done = run("--cases", "1000", "--seed", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    (total,) = [line for line in done.stdout.splitlines() if line.startswith("| all |")]
    cases, refused, before, says, other = map(int, total.split("|")[2:7])
    assert cases == refused + before + says
    assert other == 0
    assert min(refused, before, says) > 10


@pytest.mark.parametrize(
    ("error", "what"),
    [
        ("KeyError('a')", "other exception: KeyError"),
        ("MemoryError()", "other exception: MemoryError"),
        ("Error('x' * 1000)", "refused at length"),
        ("Error('two\\nlines')", "refused at length"),
        ("Error('short')", "refused"),
    ],
)
def test_what_a_reader_raises_is_judged(error, what):
    script = f"""
import sys; sys.path.insert(0, "experiments")
import dataclasses
from pathlib import Path
from fuzz_files import judged
from fuzz_kinds import KINDS
from ttq_jax.errors import Error
def read(place):
    raise {error!s}
kind = dataclasses.replace(KINDS[0], read=read)
print(judged(kind, Path("."), "", b"", b"")[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == what, done.stderr

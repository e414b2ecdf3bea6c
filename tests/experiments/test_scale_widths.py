"""The simulation of narrower scales: at eight and four bits it is the built-in grid."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from compilers import QUICKLY
from tiny_files import write_model

from ttq_jax.linear import dense_weight
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.convert import quantize
from ttq_jax.quant.grid import Grid, decode
from ttq_jax.quant.presets import preset
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.scaling import NoScale

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import scale_widths  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("bits", "width", "scales"), [
    (2, 8, "coded"), (3, 8, "coded"), (4, 8, "coded"), (3, 4, "coded4"), (4, 4, "coded4"),
])  # fmt: skip
def test_at_eight_and_four_bits_it_is_the_built_in_grid(bits, width, scales):
    w = jnp.asarray(np.random.default_rng(0).standard_t(4, size=(256, 40)), jnp.float32)
    grid = Grid(bits=bits, group_size=32, scales=scales)
    rule = ClipSearch(steps=5, smallest=0.6)
    recipe = Recipe(moments="none", scale=NoScale(), rounding=rule, grid=grid)
    built_in = np.asarray(dense_weight(quantize(w, None, recipe)))

    def simulated(*, scale_bits, zero_bits):
        rule = scale_widths.FewLevels(scale_bits=scale_bits, zero_bits=zero_bits)
        gram = jnp.broadcast_to(jnp.eye(8), (256 // 8, 8, 8))
        codes, scales, zeros = rule.round(w, gram, grid)
        assert len(np.unique(scales[:, 0])) <= 2**scale_bits
        groups = codes.reshape(-1, 32, 40).astype(jnp.float32)
        return np.asarray(decode(groups, scales, zeros)).reshape(256, 40)

    error = lambda made: float(np.square(made - w).mean())  # noqa: E731
    same = simulated(scale_bits=width, zero_bits=width)
    # Its units are float32 numbers, the built-in ones bfloat16.
    assert error(same) == pytest.approx(error(built_in), rel=0.005)
    assert np.square(same - built_in).mean() < 0.2 * error(built_in)
    assert error(simulated(scale_bits=2, zero_bits=2)) > 1.05 * error(same)


def run(*arguments):
    """In a process of its own: a rounding from outside passes no check of types at run time."""
    command = [sys.executable, str(EXPERIMENTS / "scale_widths.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | QUICKLY)


def test_rows_and_the_table_of_them(tmp_path):
    model, text = write_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(900)))
    out = tmp_path / "rows.jsonl"
    done = run(
        "--model", str(model), "--corpus", f"numbers={text}", "--windows", "1", "--window", "64",
        "--prompt-tokens", "32", "--grid", "3-4-4-16", "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["recipe_name"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["none", "3-4-4-16"]
    # 3 bits, 8 of a group of 16, and 16 bits a column and a row, of 64 or 96.
    assert 3.5 + 16 / 64 < rows["3-4-4-16"]["effective_bits"] < 3.5 + 3 * 16 / 64
    assert rows["3-4-4-16"]["nll"] != rows["none"]["nll"]
    lines = [line.split() for line in run("--report", str(out)).stdout.splitlines()]
    assert lines[0][:3] == ["code", "scale", "zero"]
    assert [line[:4] for line in lines[1:]] == [["3", "4", "4", "16"]]


def test_what_is_built_in_is_asked_for_by_name():
    for n, scales in ((8, "coded"), (4, "coded4")):
        made = scale_widths.recipe_of(3, n, n, 32, built_in=True)
        assert made == preset("fast", bits=3, group_size=32, scales=scales)
    with pytest.raises(SystemExit, match="expected 8 or 4 bits of each, got 6 and 6"):
        scale_widths.recipe_of(3, 6, 6, 48, built_in=True)


def test_a_grid_that_is_none(tmp_path):
    """Said before a model is loaded."""
    done = run("--corpus", "a=b", "--grid", "3-4-32", "--out", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 1
    assert done.stderr == "--grid 3-4-32: expected CODE-SCALE-ZERO-GROUP, as in 3-4-4-32\n"
    assert not list(tmp_path.iterdir())

"""--processes: one command in several processes, which act alike or stop alike."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from compilers import QUICKLY
from tiny_files import write_model

from ttq_jax.commands import generate
from ttq_jax.commands.parsers import build_parser
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.progress import Progress
from ttq_jax.sweeps.rows import read_rows

CHEAP = ("--recipe", "ttq", "--group-size", 8, "--select", "layers/down")


def in_two(*words, first=(), second=(), program=("-m", "ttq_jax")):
    """Runs a command in two processes of two devices each: ((code, stdout, stderr), the other's).

    Args:
      *words: of both.
      first: further words of the first alone.
      second: further words of the second alone.
      program: what Python runs.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    both = [
        subprocess.Popen(
            [sys.executable, *program, *map(str, (*words, *further)), "--quiet",
             "--processes", f"localhost:{port},2,{index}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | QUICKLY | flags,
        )
        for index, further in enumerate((first, second))
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(both, said, strict=True)]


@pytest.mark.parametrize(
    "option", [("--stream",), ("--conversation", "d"), ("--speculate", "auto")]
)
def test_several_processes_answer_a_whole_text_at_once(tiny, option):
    words = ["generate", "--model", tiny, "--prompt", "Hi", "--mesh", "model=2", *option]
    args = build_parser().parse_args([*words, "--processes", "here:1,2,0"])
    why = f"--processes: {option[0]} (answers in one process only|auto measures times)"
    with pytest.raises(ConfigError, match=why):
        generate.run(args, Progress(enabled=False))


@pytest.mark.slow
def test_one_of_two_processes_prints_the_answer(cli_json, tiny):
    asked = ("generate", "--model", tiny, "--prompt", "Hello", "--max-new-tokens", 4, *CHEAP)
    (code, out, err), other = in_two(*asked, "--mesh", "model=4", "--json")
    assert code == 0, err
    assert json.loads(out)["text"] == cli_json(*asked)[0]["text"]
    assert other[:2] == (0, "")


def grid_of(path, tiny, text_file):
    """A sweep of six cells, of which one is illegal on a mesh of four."""
    path.write_text(
        f"model = {json.dumps(['tiny=' + str(tiny)])}\n"
        f"corpus = {json.dumps(['text=' + str(text_file)])}\n"
        "select = 'layers/down'\nwindow = 32\nmax_windows = 2\nprompt_tokens = 16\n"
        "[[part]]\nrecipe = 'none'\n"
        "[[part]]\nrecipe = 'ttq'\ngroup_size = [8, 32]\n"
        "[[part]]\nrecipe = 'ttq'\ngroup_size = 8\nacceptance = true\nbits = [3, 4]\n"
        f"[[part]]\nrecipe = 'awq'\ngroup_size = 8\ncalibration = {json.dumps([text_file])}\n"
        "calibration_tokens = 64\n"
    )
    return path


@pytest.mark.slow
def test_a_sweep_in_two_processes_has_the_rows_of_one(cli, tiny, text_file, tmp_path):
    grid, out, alone = (
        grid_of(tmp_path / "grid.toml", tiny, text_file),
        *map(tmp_path.joinpath, ("out", "alone")),
    )
    words = ("sweep", grid, "--mesh", "model=4")
    assert cli(*words, "--out", alone, "--quiet")[0] == 2
    want, keys = read_rows(alone), list(read_rows(alone))
    # A part of them is there already, and a line is incomplete, as a killed process leaves it.
    out.mkdir()
    lines = (alone / "rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    first, second = in_two(*words, "--out", out, second=("--json",))
    assert [first[0], second[0]] == [2, 2], first[2] + second[2]
    assert "5 of 6 cells in" in first[1]
    assert second[1] == ""
    for _, _, err in (first, second):
        assert "1 of 6 cells failed" in err
        assert "4 devices share the 96 input channels of down, 24 each" in err
    made = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["key"] for row in made] == keys, "each cell once"
    assert len({row["process"] for row in made[2:]}) == 1, "the first process writes them all"
    for row in made:
        assert row.get("error") == want[row["key"]].get("error")
        if "error" not in row:
            assert row["nll"] == pytest.approx(want[row["key"]]["nll"], rel=1e-5)
            assert row["model"] == want[row["key"]]["model"]
    assert sum("acceptance" in row for row in made) == 2
    # Nothing is left to do, but for what failed.
    first, _ = in_two(*words, "--out", out)
    assert "5 of 6 cells in" in first[1]
    assert len((out / "rows.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "measured"), [("perplexity", "perplexity"), ("acceptance", "divergence")]
)
def test_a_text_is_measured_in_two_processes_as_in_one(
    cli_json, tiny, text_file, command, measured
):
    asked = (command, "--model", tiny, "--corpus", text_file, "--window", 32,
             "--prompt-tokens", 16, "--max-windows", 1, *CHEAP)  # fmt: skip
    (alone,) = cli_json(*asked)
    first, second = in_two(*asked, "--mesh", "data=2,model=2", "--json")
    assert [first[0], second[0]] == [0, 0], first[2]
    assert json.loads(first[1])[measured] == pytest.approx(alone[measured], rel=1e-4)
    assert second[1] == ""


@pytest.mark.slow
def test_widths_are_chosen_in_two_processes_as_in_one(cli_json, tiny, text_file, tmp_path):
    asked = ("allocate", "--model", tiny, "--corpus", text_file, "--window", 48, "--recipe", "rtn",
             "--prompt-tokens", 16, "--max-windows", 1, "--budget", 7, "--group-size", 8,
             "--select", "layers/(o|down)", "--widths", 2, 4, "--out", tmp_path / "mine.toml"
             )  # fmt: skip
    (alone,) = cli_json(*asked)
    first, second = in_two(*asked, "--mesh", "model=4", "--json")
    assert [first[0], second[0]] == [0, 0], first[2]
    assert json.loads(first[1])["recipe"] == alone["recipe"]


@pytest.mark.slow
@pytest.mark.parametrize("differs", ["option", "recipe", "model", "corpus", "prompts", "cells"])
def test_what_differs_between_processes_is_named_in_both(tiny, text_file, tmp_path, differs):
    other = tmp_path / "other"
    words = ("generate", "--model", tiny, "--prompt", "Hello", "--max-new-tokens", 4, *CHEAP)
    scored = ("perplexity", "--model", tiny, "--corpus", text_file, "--window", 32,
              "--max-windows", 1, "--prompt-tokens", 16, *CHEAP)  # fmt: skip
    if differs == "option":
        first, second = in_two(*words, "--mesh", "model=4", second=("--max-new-tokens", 5))
        said = "got max_new_tokens 4 in the first and 5 in process 1"
    elif differs == "recipe":
        first, second = in_two(*words, "--mesh", "model=4", second=("--recipe", "rtn"))
        said = "the recipe: expected the same in every process"
    elif differs == "model":
        write_model(other, seed=1)
        first, second = in_two(*words, "--mesh", "model=4", second=("--model", other))
        said = "the model's files: expected the same in every process, got "
    elif differs == "corpus":
        other.write_text(Path(text_file).read_text() + "more")
        first, second = in_two(*scored, "--mesh", "model=4", second=("--corpus", other))
        said = "the text of a corpus: expected the same in every process, got "
    elif differs == "prompts":
        (tmp_path / "one").write_text("Hello\n")
        other.write_text("Hello\nHi\n")
        asked = ("generate", "--model", tiny, "--prompts-file", tmp_path / "one", *CHEAP)
        first, second = in_two(*asked, "--mesh", "model=4", second=("--prompts-file", other))
        said = "the prompts: expected the same in every process, got ['Hello'] in the first"
    elif differs == "cells":
        one = grid_of(tmp_path / "one.toml", tiny, text_file)
        other.write_text(one.read_text().replace("bits = [3, 4]", "bits = [3]"))
        first, second = in_two(
            "sweep", "--out", tmp_path / "o", "--mesh", "model=4", first=(one,), second=(other,)
        )
        said = "the cells of the sweep: expected the same in every process, got "
    for code, out, err in (first, second):
        assert (code, out) == (2, ""), err
        assert said in err
        assert err.rstrip().splitlines()[-1].startswith("ttq: error: ")


# The second of two processes fails in the second cell before it computes anything.
_FAILS_ALONE = """
import sys
from ttq_jax import processes
from ttq_jax.commands.main import main
from ttq_jax.sweeps.run import Runner
processes.PATIENCE_S = 10
real, cells = Runner.run, []
def run(self, cell, progress):
    cells.append(cell)
    if len(cells) == 2 and sys.argv[-1].endswith(",1"):
        raise MemoryError("no room")
    return real(self, cell, progress)
Runner.run = run
sys.exit(main())
"""


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_both_and_what_was_done_is_kept(tiny, text_file, tmp_path):
    asked = ("sweep", grid_of(tmp_path / "grid.toml", tiny, text_file), "--mesh", "model=4")
    out = tmp_path / "out"
    first, second = in_two(*asked, "--out", out, program=("-c", _FAILS_ALONE))
    assert first[0] != 0
    assert second[0] == 2
    assert "process 1 of 2 is at recipe ttq, group_size 8" in second[2]
    assert "one did not come within 10 seconds" in second[2]
    assert "here it failed (MemoryError: no room)" in second[2]
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["cell"]["recipe"] for row in rows] == ["none"]

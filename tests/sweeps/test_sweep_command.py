"""Sweeps as a user runs them: resumed, killed, shared, failing."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from compilers import QUICK
from tiny_files import write_model

from ttq_jax import acceptance, cut_windows, load, prepare
from ttq_jax.commands.main import main
from ttq_jax.evaluation.corpora import calibration_windows, read_corpus
from ttq_jax.evaluation.perplexity import Protocol, score_window
from ttq_jax.quant.head import joined
from ttq_jax.sweeps import run
from ttq_jax.sweeps.axes import read_sweep
from ttq_jax.sweeps.rows import Rows, read_rows

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow


@pytest.fixture
def sweep(capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def call(*words):
        code = main(["sweep", *map(str, words), "--no-compilation-cache"])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def finished(sweep_file, tmp_path_factory):
    """The directory of an uninterrupted run."""
    out = tmp_path_factory.mktemp("finished")
    assert main(["sweep", str(sweep_file), "--out", str(out), "--no-compilation-cache"]) == 2
    return out


def measured(directory):
    """What has to be the same, however a sweep came about."""
    names = ("cell", "recipe", "nll", "perplexity", "effective_bits", "corpus_sha256",
             "calibration_sha256", "windows", "error")  # fmt: skip
    return {
        key: {name: row.get(name) for name in names} for key, row in read_rows(directory).items()
    }


def test_rows_say_all_that_a_number_depends_on(finished, place, sweep_file):
    rows, cells = read_rows(finished), read_sweep(str(sweep_file))
    assert set(rows) == {cell.key for cell in cells}
    assert len(rows) == len(cells) == 14
    model = load(str(place / "model"))
    for cell in cells:
        row = rows[cell.key]
        assert row["cell"] == cell.values
        assert str(place) not in json.dumps(row)
        assert set(row["versions"]) >= {"ttq_jax", "jax", "python"}
        if row["cell"].get("bits") == 6:
            assert row["error"].startswith("ConfigError: bits")
            continue
        text = read_corpus(str(place / f"{row['cell']['corpus']}.txt"))
        windows = cut_windows(model.tokenizer, text, 48, max_windows=2)
        offline = None
        if cell.options.calibration and cell.recipe.source.reads_corpus:
            read = read_corpus(cell.options.calibration)
            offline = calibration_windows(model.tokenizer, read, tokens=96, window=96)
        params, made = joined(model.params, cell.recipe, prepare(model, cell.recipe, offline))
        nll = [
            float(score_window(
                params, jnp.asarray(w), made, config=model.config, recipe=cell.recipe,
                protocol=Protocol(window=48, prompt_tokens=24),
            ))
            for w in windows
        ]  # fmt: skip
        np.testing.assert_allclose(row["nll"], nll, rtol=1e-6)
        assert row["perplexity"] == pytest.approx(np.exp(np.sum(nll) / 48))
        assert row["seconds"]["score"] > 0
        assert row["peak_memory_bytes"] > 1e7
        bits = cell.values.get("bits", 32)
        assert bits <= row["effective_bits"] <= bits + 3


def test_what_is_done_is_not_done_again(finished, sweep_file, sweep, monkeypatch):
    before = (finished / "rows.jsonl").read_bytes()

    def never(*_):
        raise AssertionError("a finished cell was run")

    monkeypatch.setattr(run.Runner, "run", never)
    code, _, err = sweep(sweep_file, "--out", finished)
    assert code == 2
    assert "2 of 14 cells failed" in err
    assert "14 of 14 cells are done" in err
    assert (finished / "rows.jsonl").read_bytes() == before


def test_a_failing_cell_does_not_stop_the_rest_and_can_be_retried(
    finished, sweep_file, sweep, tmp_path, monkeypatch
):
    real, broken = run.Runner.run, [True]

    def sometimes(self, cell, progress):
        if broken[0] and cell.values.get("bits") == 4:
            raise MemoryError("no room")
        return real(self, cell, progress)

    monkeypatch.setattr(run.Runner, "run", sometimes)
    code, _, err = sweep(sweep_file, "--out", tmp_path)
    assert code == 2
    assert "4 of 14 cells failed" in err
    errors = [row["error"] for row in read_rows(tmp_path).values() if "error" in row]
    assert errors.count("MemoryError: no room") == 2
    broken[0] = False
    code, _, err = sweep(sweep_file, "--out", tmp_path)
    assert "4 of 14 cells failed" in err
    code, _, err = sweep(sweep_file, "--out", tmp_path, "--retry")
    assert "2 of 14 cells failed" in err
    assert measured(tmp_path) == measured(finished)


def test_dry_run_lists_and_runs_nothing(sweep_file, sweep, tmp_path, finished):
    code, out, _ = sweep(sweep_file, "--out", tmp_path, "--dry-run")
    assert code == 0
    assert out.count("to do") == 12
    assert out.count("illegal") == 2
    assert not list(tmp_path.iterdir())
    code, out, _ = sweep(sweep_file, "--out", finished, "--dry-run", "--json")
    states = [json.loads(line)["state"] for line in out.splitlines()]
    assert (states.count("done"), states.count("failed")) == (12, 2)


def test_shards_are_disjoint_and_complete(sweep_file, sweep, tmp_path, finished):
    for i in (2, 1):
        sweep(sweep_file, "--out", tmp_path, "--shard", f"{i}/2")
    assert measured(tmp_path) == measured(finished)
    assert len(list(tmp_path.glob("rows-*of2.jsonl"))) == 2
    for bad in ("0/2", "3/2", "x", "1/"):
        code, _, err = sweep(sweep_file, "--out", tmp_path, "--shard", bad)
        assert code == 2
        assert "--shard: expected I/N" in err


def test_another_text_of_the_same_name_is_refused(finished, sweep_file, sweep, place, tmp_path):
    other = tmp_path / "sums.txt"
    other.write_text((place / "words.txt").read_text())
    words = f"words={place}/words.txt"
    code, _, err = sweep(sweep_file, "--out", finished, "--axis", f"corpus=sums={other},{words}")
    assert code == 2
    assert "corpus sums: expected the text of the rows in --out" in err


def test_the_seed_draws_windows(place, sweep, tmp_path):
    path = tmp_path / "seeds.toml"
    path.write_text(
        f"""
        model = "{place}/model"
        corpus = "{place}/sums.txt"
        recipe = "none"
        window = 48
        prompt_tokens = 24
        max_windows = [2, 4]
        seed = [0, 1]
        """
    )
    assert sweep(path, "--out", tmp_path / "out")[0] == 0
    nll = {
        (row["cell"]["seed"], row["cell"]["max_windows"]): row["nll"]
        for row in read_rows(tmp_path / "out").values()
    }
    assert nll[0, 4][:2] == nll[0, 2]
    assert nll[0, 2] != nll[1, 2]


CLAIM = """
import sys
from pathlib import Path
from ttq_jax.sweeps.rows import Rows
rows = Rows(Path(sys.argv[1]))
with rows.claim(sys.argv[2]) as ours:
    print(ours, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def claimed(tmp_path, finished):
    """A finished sweep without one row, whose cell another process holds: (its path, process)."""
    lines = (finished / "rows.jsonl").read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"error"' not in line)
    (tmp_path / "rows.jsonl").write_bytes(b"".join([*lines[:at], *lines[at + 1 :]]))
    key = json.loads(lines[at])["key"]
    with subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(tmp_path), key],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout.readline() == "True\n"
        yield tmp_path, holder
        holder.kill()


def test_others_run_what_they_have_locked_and_nothing_else(claimed, sweep_file, sweep, finished):
    out, holder = claimed
    _, said, _ = sweep(sweep_file, "--out", out)
    assert "11 of 14 cells in " in said and "; other processes run 1;" in said
    holder.kill()
    holder.wait()
    _, said, _ = sweep(sweep_file, "--out", out)
    assert "12 of 14 cells in " in said and "other processes" not in said
    assert measured(out) == measured(finished)


def test_a_cell_whose_process_was_killed_meanwhile_is_run(
    claimed, sweep_file, sweep, finished, monkeypatch
):
    out, holder = claimed
    claim = Rows.claim

    def claim_once(self, key):
        made = claim(self, key)
        if holder.poll() is None:
            made = contextlib.nullcontext(made.__enter__())
            holder.kill()
            holder.wait()
        return made

    monkeypatch.setattr(Rows, "claim", claim_once)
    _, said, _ = sweep(sweep_file, "--out", out)
    assert "12 of 14 cells in " in said and "other processes" not in said
    assert measured(out) == measured(finished)


def test_rows_that_disappear_are_not_said_to_be_with_others(
    sweep_file, sweep, tmp_path, finished, monkeypatch
):
    (tmp_path / "rows.jsonl").write_bytes((finished / "rows.jsonl").read_bytes())
    read, reads = Rows.read, []

    def vanish(self):
        reads.append(read(self))
        return reads[0] if len(reads) == 1 else dict(list(reads[0].items())[:3])

    monkeypatch.setattr(Rows, "read", vanish)
    code, said, err = sweep(sweep_file, "--out", tmp_path)
    assert code == 2 and "other processes" not in said
    assert "expected the rows of 14 cells, found 3" in err


def started(sweep_file, out, cache):
    words = [sys.executable, "-m", "ttq_jax", "sweep", str(sweep_file), "--out", str(out),
             "--cache-dir", str(cache), "--quiet"]  # fmt: skip
    # Compiled as in this process, where the sweep ran that is compared to: the same bits.
    return subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK},
    )  # fmt: skip


@pytest.mark.slow
def test_killed_again_and_again_the_table_is_the_same(
    finished, sweep_file, tmp_path, tmp_path_factory
):
    """Killed at random moments, most of them while cells are being finished."""
    out, cache = tmp_path / "out", tmp_path_factory.mktemp("xla")
    rng, kills, lines = random.Random(0), 0, [0]
    while True:
        process = started(sweep_file, out, cache)
        path, target = out / "rows.jsonl", lines[-1] + rng.randint(1, 2)
        while process.poll() is None:
            done = path.read_bytes().count(b"\n") if path.exists() else 0
            if done >= target and done < 14:
                time.sleep(rng.random() * 0.2)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        code = process.wait()
        lines.append(path.read_bytes().count(b"\n"))
        assert lines[-1] >= lines[-2]
        if code != -signal.SIGKILL:
            break
        kills += 1
    assert kills >= 4
    assert measured(out) == measured(finished)
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)), "no cell twice"


@pytest.mark.slow
def test_two_processes_share_the_work(finished, sweep_file, tmp_path, tmp_path_factory):
    out, cache = tmp_path / "out", tmp_path_factory.mktemp("xla")
    pair = [started(sweep_file, out, cache) for _ in range(2)]
    assert {process.wait() for process in pair} == {2}
    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    keys = [line["key"] for line in lines]
    assert len(keys) == len(set(keys)) == 14
    assert len({line["process"] for line in lines}) == 2, "both did some"
    assert measured(out) == measured(finished)


def test_a_row_s_commit_says_whether_code_differs_from_it(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=n", "-c", "user.email=n@example.com")
        subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True)

    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    git("init")
    for name in ("run.py", "rows.jsonl"):
        (tmp_path / name).write_text("1\n")
    git("add", ".")
    git("commit", "-m", "one")
    clean = run.git_commit()
    assert len(clean) == 40
    (tmp_path / "rows.jsonl").write_text("2\n")
    assert run.git_commit() == clean
    (tmp_path / "run.py").write_text("2\n")
    assert run.git_commit() == clean + "+"


def test_another_model_under_the_same_label_is_refused(place, tmp_path, sweep):
    for name, seed in (("one", 0), ("two", 1)):
        write_model(tmp_path / name, seed=seed)
    file = tmp_path / "sweep.toml"
    file.write_text(
        f'model = "tiny={tmp_path}/one"\ncorpus = "{place}/sums.txt"\nwindow = 32\n'
        'prompt_tokens = 16\nmax_windows = 1\nrecipe = "none"\n'
    )
    out = tmp_path / "out"
    code, _, err = sweep(file, "--out", out)
    assert code == 0, err
    (row,) = read_rows(out).values()
    assert set(row["model"]) == {"file", "revision", "fingerprint", "format"}
    code, text, _ = sweep(file, "--out", out)
    assert code == 0
    assert "1 of 1 cells" in text
    # A row of a version that did not say it.
    old = tmp_path / "old"
    old.mkdir()
    (old / "rows.jsonl").write_text(
        json.dumps({k: v for k, v in row.items() if k != "model"}) + "\n"
    )
    code, text, _ = sweep(file, "--out", old)
    assert code == 0
    assert "1 of 1 cells" in text
    (tmp_path / "one").rename(tmp_path / "gone")
    (tmp_path / "two").rename(tmp_path / "one")
    code, _, err = sweep(file, "--out", out)
    assert code == 2
    assert "model tiny: expected the model of the rows in --out (one" in err


def test_agreement_with_the_unquantized_weights_beside_perplexity(place, tmp_path, sweep):
    """One recipe is packed ahead of any prompt, the other by it."""
    path, out = tmp_path / "agree.toml", tmp_path / "out"
    path.write_text(
        f'model = "{place / "model"}"\ncorpus = "sums={place / "sums.txt"}"\nwindow = 48\n'
        'prompt_tokens = 24\nmax_windows = 2\nrecipe = ["none", "rtn", "ttq"]\nhead = 8\n'
        "bits = 3\ngroup_size = 16\nacceptance = [true, false]\n"
    )
    code, _, err = sweep(path, "--out", out)
    assert code == 0, err
    rows = list(read_rows(out).values())
    assert len(rows) == 5, "unquantized weights agree with themselves: one cell"
    model = load(str(place / "model"))
    windows = cut_windows(model.tokenizer, read_corpus(str(place / "sums.txt")), 48, max_windows=2)
    for cell in read_sweep(str(path)):
        [row] = [row for row in rows if row["key"] == cell.key]
        assert ("acceptance" in row) == bool(cell.values.get("acceptance"))
        if "acceptance" in row:
            found = acceptance(model, windows, recipe=cell.recipe, prompt_tokens=24)
            assert row["acceptance"]["compared"] == found.compared == 23
            for name in ("greedy", "sampled", "divergence"):
                np.testing.assert_allclose(row["acceptance"][name], getattr(found, name), rtol=1e-5)
    assert main(["report", str(out), "--no-compilation-cache", "--quiet"]) == 0
    text = (out / "report.md").read_text()
    assert "| same token | acceptance | KL divergence, nats |" in text
    assert "accepted by the unquantized ones at temperature 1" in text

import errno
import json
import multiprocessing
import os
import subprocess
import sys

import pytest

from ttq_jax.config import ConfigError
from ttq_jax.sweeps.rows import Rows, read_rows

KEY = "0123456789abcdef"


def row(i):
    return {"key": f"{i:016x}", "value": i}


def test_rows_come_back_in_their_order_and_the_last_of_a_key_counts(tmp_path):
    rows = Rows(tmp_path / "new" / "deep")
    for i in (3, 1, 2, 1):
        rows.append(row(i) | {"again": i})
    rows.append(row(3) | {"again": "yes"})
    assert [(r["value"], r["again"]) for r in rows.read().values()] == [(3, "yes"), (1, 1), (2, 2)]
    with pytest.raises(ValueError, match="JSON"):
        rows.append({"key": "x", "value": float("nan")})
    assert len(rows.read()) == 3


def test_a_line_that_was_cut_short_is_dropped_and_said(tmp_path):
    notes = []
    rows = Rows(tmp_path, note=notes.append)
    rows.append(row(1))
    rows.append(row(2))
    whole = rows.path.read_bytes()
    # Killed in the middle of the second line, whichever byte was the last.
    first = whole.index(b"\n") + 1
    for cut in range(first + 1, len(whole)):
        rows.path.write_bytes(whole[:cut])
        assert list(read_rows(tmp_path)) == [row(1)["key"]]
        rows.repair()
        assert rows.path.read_bytes() == whole[:first]
    assert len(notes) == len(whole) - first - 1
    assert all("removed an incomplete last line" in note for note in notes)
    rows.path.write_bytes(whole[: first + 5])
    rows.append(row(3))
    assert list(rows.read()) == [row(1)["key"], row(3)["key"]]


def test_a_foreign_line_is_named(tmp_path):
    rows = Rows(tmp_path)
    rows.append(row(1))
    for bad in ("nonsense", "[1]", '{"no": "key"}'):
        rows.path.write_text(f"{json.dumps(row(1))}\n{bad}\n{json.dumps(row(2))}\n")
        with pytest.raises(ConfigError, match=r"rows.jsonl, line 2: expected a row"):
            rows.read()


def test_shards_are_read_together(tmp_path):
    for i in (1, 2):
        Rows(tmp_path, f"{i}of2").append(row(i))
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == [
        "rows-1of2.jsonl",
        "rows-2of2.jsonl",
    ]
    assert len(read_rows(tmp_path)) == 2


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: cannot be written: "):
        Rows(tmp_path / "file")


def test_a_short_write_goes_on(tmp_path, monkeypatch):
    rows, write = Rows(tmp_path), os.write
    monkeypatch.setattr(os, "write", lambda at, data: write(at, data[:3]))
    rows.append(row(1))
    assert list(rows.read().values()) == [row(1)]


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_line_that_cannot_be_written_is_taken_back(tmp_path, monkeypatch, fails):
    rows, notes, write = Rows(tmp_path, note=print), [], os.write
    rows.append(row(1))
    whole = rows.path.read_bytes()

    def full(at, data=b""):
        if len(data) > 3:
            return write(at, data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, full)
        with pytest.raises(OSError, match=r"No space left on device: '.*rows.jsonl'"):
            rows.append(row(2))
    assert rows.path.read_bytes() == whole
    rows.note = notes.append
    rows.append(row(3))
    assert list(rows.read().values()) == [row(1), row(3)]
    assert not notes, "there was nothing to repair"


HOLD = """
import sys, time
from pathlib import Path
from ttq_jax.sweeps.rows import Rows
rows = Rows(Path(sys.argv[1]))
with rows.claim(sys.argv[2]) as ours:
    print(ours, flush=True)
    time.sleep(600)
"""


def test_a_claim_ends_with_its_process_however_it_ends(tmp_path):
    rows = Rows(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), KEY], stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "True\n"
        with rows.claim(KEY) as ours:
            assert not ours
        with rows.claim(KEY[::-1]) as other:
            assert other
        # Writing is not held up by it.
        rows.append(row(1))
        holder.kill()
    with rows.claim(KEY) as ours:
        assert ours


def _append_many(directory, begin, count):
    rows = Rows(directory)
    for i in range(begin, begin + count):
        rows.append(row(i) | {"filler": "x" * (i % 97) * 50})
    os._exit(0)


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_append_many, args=(tmp_path, 1000 * n, 60)) for n in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = read_rows(tmp_path)
    assert sorted(r["value"] for r in found.values()) == [
        1000 * n + i for n in range(3) for i in range(60)
    ]

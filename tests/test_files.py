"""Files that are replaced in one step: however writers end, one of them is there, whole."""

import errno
import multiprocessing
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ttq_jax import files
from ttq_jax.files import check_destination, draft, write_file, write_files

HOLD = """
import sys
from pathlib import Path
from ttq_jax.files import draft
with draft(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as new:
    print(new, flush=True)
    sys.stdin.read()
"""


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_draft_of_a_process_that_lives_is_left_alone(tmp_path, kind):
    place = tmp_path / "a file"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place), kind],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        held = Path(other.stdout.readline().strip())
        write_file(place, "ours")
        assert held.exists()
        other.kill()
    assert len(names(tmp_path)) == 2
    # Of another place it is not taken.
    write_file(tmp_path / "a", "something else")
    assert held.exists()
    check_destination(place)
    assert names(tmp_path) == ["a", "a file"]
    assert place.read_text() == "ours"


def write_often(place, text):
    for _ in range(50):
        write_file(place, text)


def test_many_writers_of_one_place(tmp_path):
    place, texts = tmp_path / "file", [c * 10_000 for c in "abcd"]
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_often, args=(place, text)) for text in texts]
    for one in writers:
        one.start()
    while any(one.is_alive() for one in writers):
        assert not place.exists() or place.read_text() in texts
    assert [one.exitcode for one in writers] == [0] * 4
    assert names(tmp_path) == ["file"]


def test_all_files_or_none(tmp_path, monkeypatch):
    write_file(tmp_path / "a", "old")
    synced, real = [], files.sync

    def second_fails(path):
        synced.append(path)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    new = {tmp_path / "a": b"new", tmp_path / "deep" / "er" / "b": b"new"}
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", second_fails)
        with pytest.raises(OSError, match="No space left"):
            write_files(new, parents=True)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"
    write_files(new, parents=True)
    assert all(path.read_bytes() == data for path, data in new.items())
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "no" / "such", "x")


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", "/dev/null"):
        for call in (check_destination, lambda path: write_file(path, "x")):
            with pytest.raises(OSError, match="not a regular file"):
                call(place)
    assert names(tmp_path) == ["pipe"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_file(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == "x"


def test_the_mode_is_that_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_file(tmp_path / "ours", "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")}
    assert len(modes) == 1


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    """As on some network file systems."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    left = tmp_path / ".file.01234567.draft"
    left.write_text("perhaps somebody's")
    with monkeypatch.context() as patch:
        patch.setattr(files.fcntl, "flock", no_locks)
        write_file(tmp_path / "file", "x")
        assert names(tmp_path) == [left.name, "file"]
    write_file(tmp_path / "file", "x")
    assert names(tmp_path) == ["file"]


def test_a_process_that_is_about_to_end_takes_its_drafts_along(tmp_path):
    (tmp_path / "old").write_text("old")
    with draft(tmp_path / "old") as one, draft(tmp_path / "new", folder=True) as two:
        (two / "half").write_text("")
        files.abandon()
        assert not one.exists() and not two.exists()
    assert names(tmp_path) == ["old"]


def test_room_is_found_and_given_back(tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        files.reserve(tmp_path, 0)
        files.reserve(tmp_path, 20_000)
        with pytest.raises(OSError, match=r"File too large \(0.1 MB are needed\)"):
            files.reserve(tmp_path, 50_001)
        # A limit of one file is none of all of them.
        monkeypatch.setattr(files, "_PIECE", 20_000)
        files.reserve(tmp_path, 50_001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC, errno.EDQUOT])
def test_a_file_system_that_cannot_reserve_is_not_full(tmp_path, monkeypatch, code):
    def fails(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fails)
    if code in {errno.EINVAL, errno.EOPNOTSUPP}:
        files.reserve(tmp_path, 1)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            files.reserve(tmp_path, 1)

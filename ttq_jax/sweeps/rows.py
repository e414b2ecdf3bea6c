"""The file of finished cells: it survives crashes and is shared by processes.

A row is one line of JSON, appended and synced, so that a process killed at any moment leaves whole
lines and at most one incomplete line, which the next writer removes. A cell is claimed
by locking one byte of a lock file, at an offset that its key gives. The system releases the lock
when the process ends, however it ends, so nothing is ever left locked.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ttq_jax.config import ConfigError
from ttq_jax.files import sync
from ttq_jax.foreign import check, parse_json, read_bytes
from ttq_jax.processes import of_first

Row = dict[str, Any]

# The byte that is locked while rows are written; cells are at the offsets above it.
_WRITING = 0

# What resuming needs of a row; `checked` has what a report needs.
_ROW = {"key": str, "model?": {"fingerprint?": str}}
_RESUMED = ("error", "model", "corpus_sha256", "calibration_sha256")

# Of a file that is read; a row has a few thousand.
_BYTES = 2**30


class Rows:
    """The rows of one directory.

    Locks belong to the process (POSIX record locks): processes exclude each other, threads of one
    process do not.

    Attributes:
      path: the file that is written, `rows.jsonl`, or `rows-IofN.jsonl` of a shard.
      note: called with a line about what was repaired.
    """

    def __init__(self, directory: Path, shard: str = "", note: Callable[[str], Any] = print):
        """Opens the directory; makes it if there is none.

        Args:
          directory: see `ttq sweep --out`.
          shard: "" or "IofN".
          note: called with a line about what was repaired.

        Raises:
          ConfigError: it cannot be written.
        """
        self.path = directory / (f"rows-{shard}.jsonl" if shard else "rows.jsonl")
        self.note = note
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            sync(directory)
        except OSError as e:
            raise ConfigError(f"{directory}: cannot be written: {e.strerror}") from e

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Claims a cell for the time of the block.

        Args:
          key: the cell's, hexadecimal.

        Yields:
          Whether it is ours; False if another process has it.
        """
        at = 1 + int(key[:15], 16)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)
        except (BlockingIOError, PermissionError):  # POSIX allows a system either
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, at)

    def append(self, row: Row) -> None:
        """Adds a row; when this returns, it is on the disk.

        Args:
          row: JSON data without infinities and NaN.

        Raises:
          OSError: it cannot be written; what was written of it is taken back.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._locked():
            self._repair()
            end = os.fstat(self._file).st_size
            try:
                # A nearly full disk takes a part of a line, and refuses the next part.
                while line:
                    line = line[os.write(self._file, line) :]
                os.fsync(self._file)
            except OSError as e:
                os.ftruncate(self._file, end)
                raise OSError(e.errno, e.strerror, str(self.path)) from e

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other processes from writing for the time of the block."""
        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, _WRITING)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, _WRITING)

    def _repair(self) -> None:
        """Removes a last line that a killed process did not finish."""
        end = os.fstat(self._file).st_size
        if not end or os.pread(self._file, 1, end - 1) == b"\n":
            return
        whole = self.path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self._file, whole)
        self.note(f"{self.path.name}: removed an incomplete last line ({end - whole} bytes)")

    def repair(self) -> None:
        """Removes an incomplete last line, if there is one, and notes it."""
        with self._locked():
            self._repair()

    def read(self) -> dict[str, Row]:
        """The rows of this directory, its shards' too, by key; see `read_rows`."""
        return read_rows(self.path.parent)

    def close(self) -> None:
        """Closes the files and releases every claim."""
        os.close(self._file)
        os.close(self._lock)


class SharedRows:
    """`Rows` of a program of several processes: the first has the files, and tells the others.

    Every method is called by all of them at the same place. A process by itself is the first.

    Attributes:
      path: see `Rows`.
    """

    def __init__(self, directory: Path, shard: str = "", note: Callable[[str], Any] = print):
        """See `Rows`."""
        self.path = directory

        def open_files() -> None:
            self._own = Rows(directory, shard, note)
            self.path = self._own.path

        of_first("--out", open_files)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """See `Rows`."""
        with contextlib.ExitStack() as held:
            yield of_first(f"cell {key}", lambda: held.enter_context(self._own.claim(key)))

    def append(self, row: Row) -> None:
        """See `Rows`."""
        of_first("a row", lambda: self._own.append(row))

    def repair(self) -> None:
        """See `Rows`."""
        of_first("rows", lambda: self._own.repair())

    def read(self) -> dict[str, Row]:
        """What resuming needs of the rows: their models, texts and errors."""

        def kept(row: Row) -> Row:
            return {name: row[name] for name in _RESUMED if name in row}

        return of_first("rows", lambda: {key: kept(r) for key, r in self._own.read().items()})

    def state(self, key: str) -> str:
        """How far a cell is now; see `state`."""
        return of_first(f"cell {key}", lambda: state(self._own.read().get(key)))


def state(row: Row | None) -> str:
    """How far a cell is.

    Args:
      row: the cell's; None if it has none.

    Returns:
      "to do", "failed" or "done".
    """
    if row is None:
        return "to do"
    return "failed" if "error" in row else "done"


def read_rows(directory: Path) -> dict[str, Row]:
    """Every whole row of a directory.

    Args:
      directory: with `rows*.jsonl` in it.

    Returns:
      The last row of each key, by key, in the order in which they were first written. A last line
      without its end is still being written, or incomplete, and is left out.

    Raises:
      ConfigError: another line is not a row.
    """
    rows: dict[str, Row] = {}
    for path in sorted(directory.glob("rows*.jsonl")):
        *lines, _ = read_bytes(path, ConfigError, _BYTES).split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                row = parse_json(line, "JSON", ConfigError)
                check(row, _ROW, "JSON", ConfigError)
            except ConfigError as e:
                raise ConfigError(
                    f"{path}, line {number}: expected a row that ttq sweep wrote, got "
                    f"{line[:40]!r}; remove that line"
                ) from e
            rows[row["key"]] = row
    return rows

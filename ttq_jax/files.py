"""Files and directories that are replaced in one step: a reader finds the old one or the new one.

What is written goes into a draft beside its destination, and is renamed once it is whole and on the
disk. A draft is locked as long as its writer lives. So the next writer to that place knows which
drafts a killed one left, and removes them.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

_DRAFT, _ASIDE = ".draft", ".replaced"
# File systems limit the size of one file: room is reserved in pieces.
_PIECE = 2**30

# The drafts of this process, by the descriptor that locks them: `abandon` has to know them.
_OPEN: dict[int, Path] = {}


@contextlib.contextmanager
def draft(place: Path, *, folder: bool = False, parents: bool = False) -> Iterator[Path]:
    """A new file or directory beside a place, to be written and renamed to it.

    After the block the draft is gone, unless it was renamed.

    Args:
      place: the destination.
      folder: whether to make a directory.
      parents: whether to make the directories above it; those that hold nothing in the end are
        removed again.

    Yields:
      The draft.

    Raises:
      OSError: none can be made there.
    """
    made = [above for above in place.parents if parents and not above.exists()]
    try:
        if parents:
            place.parent.mkdir(parents=True, exist_ok=True)
        clear(place)
        path, lock = _locked(place, folder)
        _OPEN[lock] = place
        try:
            yield path
        finally:
            _remove(path)
            # `abandon` may have been quicker.
            if _OPEN.pop(lock, None):
                os.close(lock)
    finally:
        for above in made:
            with contextlib.suppress(OSError):
                above.rmdir()


def _locked(place: Path, folder: bool) -> tuple[Path, int]:
    """A new draft, and the descriptor that locks it."""
    while True:
        path = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}{_DRAFT}")
        path.mkdir() if folder else path.touch(exist_ok=False)
        # Another writer may take it for a dead one's before it is locked.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours = path.exists()
            except BlockingIOError:
                ours = False  # that writer looks at it, and removes it
            except OSError:
                ours = True  # no such locks, as on some network file systems: nobody clears up
            if ours:
                return path, lock
            os.close(lock)


@contextlib.contextmanager
def _dead(path: Path) -> Iterator[bool]:
    """Whether no process holds a draft, and none can meanwhile; False where there are no locks."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except OSError as e:
        yield isinstance(e, FileNotFoundError)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    """Removes a file, or a directory with all in it; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def clear(place: Path) -> None:
    """Removes what killed writers left beside a place, and puts back what one had set aside.

    Args:
      place: a destination; of other places nothing is touched.
    """
    head = f".{place.name}."
    with contextlib.suppress(OSError):
        left = {p.stem for p in place.parent.iterdir() if p.name.startswith(head)
                and p.suffix in {_DRAFT, _ASIDE}}  # fmt: skip
        for stem in left:
            path, aside = (place.with_name(stem + kind) for kind in (_DRAFT, _ASIDE))
            with _dead(path) as free:
                if not free:
                    continue
                if not os.path.lexists(place):
                    with contextlib.suppress(OSError):
                        aside.rename(place)
                _remove(path)
                _remove(aside)


def abandon() -> None:
    """Removes every draft of this process, which is about to end in the middle of writing."""
    while _OPEN:
        lock, place = _OPEN.popitem()
        os.close(lock)
        # A thread that still writes into a directory may add to it while it is removed.
        for _ in range(3):
            clear(place)


def replace_folder(new: Path, place: Path) -> None:
    """Renames a draft to its destination; a directory there is replaced.

    All in it is synced first. The old one is set aside for the moment of the renaming. It is put
    back on failure, and by `clear`.

    Args:
      new: from `draft`, of this place.
      place: where it goes.

    Raises:
      OSError: it cannot be renamed; the old one is there again.
    """
    for path in (new, *new.rglob("*")):
        sync(path)
    aside = new.with_suffix(_ASIDE)
    if place.exists():
        place.rename(aside)
    try:
        new.rename(place)
    except BaseException:
        if aside.exists() and not place.exists():
            aside.rename(place)
        raise
    _remove(aside)
    sync(place.parent)


def sync(path: Path) -> None:
    """Makes a file, or the names in a directory, survive a power cut.

    Args:
      path: of the file or directory.

    Raises:
      OSError: the disk fails.
    """
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)


def reserve(folder: Path, size: int) -> None:
    """Finds out whether a directory has room, and gives the room back.

    For what a library is to write that fails in its own way: it may do so in threads, with a trace
    from each.

    Args:
      folder: an existing one.
      size: bytes.

    Raises:
      OSError: the disk, a quota or the process's own limit leaves less.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with contextlib.ExitStack() as stack:
            for start in range(0, size, _PIECE):
                piece = stack.enter_context(tempfile.TemporaryFile(dir=folder))
                os.posix_fallocate(piece.fileno(), 0, min(_PIECE, size - start))
    except OSError as e:
        # Some file systems cannot reserve.
        if e.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise OSError(e.errno, f"{e.strerror} ({size / 1e6:.1f} MB are needed)") from e


def target_of(path: str | Path) -> Path:
    """The file that a name means: ~ is the home directory, links are followed.

    Args:
      path: of a file that is to be written.

    Returns:
      An absolute path.

    Raises:
      OSError: it is a directory, a device or a pipe, which cannot be replaced by a file.
    """
    place = Path(path).expanduser().resolve()
    if place.exists() and not place.is_file():
        code = errno.EISDIR if place.is_dir() else errno.EINVAL
        raise OSError(code, "it exists and is not a regular file", str(path))
    return place


def check_destination(path: str | Path, *, parents: bool = False) -> None:
    """Finds out whether a file can be written, and changes nothing.

    Args:
      path: of the file.
      parents: whether missing directories above it will be made.

    Raises:
      OSError: it cannot.
    """
    with draft(target_of(path), parents=parents):
        pass


def write_files(contents: Mapping[Path, bytes], *, parents: bool = False) -> None:
    """Writes some files; none of them is replaced before all are on the disk.

    Args:
      contents: by path.
      parents: whether to make missing directories above them.

    Raises:
      OSError: one cannot be written; then all are as they were.
    """
    with contextlib.ExitStack() as stack:
        drafts = {}
        for path, data in contents.items():
            place = target_of(path)
            drafts[place] = stack.enter_context(draft(place, parents=parents))
            drafts[place].write_bytes(data)
            sync(drafts[place])
        for place, new in drafts.items():
            new.replace(place)
        for folder in {place.parent for place in drafts}:
            sync(folder)


def write_file(path: str | Path, data: bytes | str, *, parents: bool = False) -> None:
    """Writes a file in one step.

    Args:
      path: of the file.
      data: its contents; text becomes UTF-8.
      parents: whether to make missing directories above it.

    Raises:
      OSError: it cannot be written; then what was there is there.
    """
    write_files({Path(path): data.encode() if isinstance(data, str) else data}, parents=parents)

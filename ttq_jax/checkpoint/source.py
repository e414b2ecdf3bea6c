"""A weight file as the loader sees it: named tensors, of which a few rows are read at a time."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from jaxtyping import Shaped

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.foreign import is_file


class Source(Protocol):
    """Tensors of one checkpoint."""

    @property
    def label(self) -> str:
        """The file or directory, for messages."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name to shape; weights are [d_out, d_in]."""

    def read(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, " rows *row"]:
        """Rows start…stop-1 of a tensor, all axes but the last taken as rows; thread-safe."""


class RandomAccess:
    """A file read at offsets, without a shared position, so that threads need no lock.

    Reads are copies and not a memory map: mapped pages would count as resident memory.
    """

    def __init__(self, path: Path):
        """Opens a file.

        Args:
          path: of the file.

        Raises:
          CheckpointError: it cannot be opened.
        """
        self.path = path
        if path.exists() and not is_file(path):
            raise CheckpointError(f"{path}: expected a file, found a directory, pipe or device")
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from error
        self.size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def at(self, offset: int, size: int) -> np.ndarray:
        """Bytes of the file.

        Args:
          offset: of the first byte.
          size: number of bytes.

        Returns:
          uint8[size].

        Raises:
          CheckpointError: the file is shorter, or became shorter while it was read.
        """
        check_size(self.path, offset + size, self.size)
        out = np.empty(size, np.uint8)
        view, done = out.data, 0
        while done < size:
            got = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if not got:
                raise CheckpointError(f"{self.path}: shrank while it was read. Load it again")
            done += got
        return out


def check_size(path: Path, needed: int, found: int) -> None:
    """Checks that a file does not end too early.

    Args:
      path: of the file.
      needed: bytes that its header promises.
      found: bytes that it has.

    Raises:
      CheckpointError: it does.
    """
    if needed > found:
        raise CheckpointError(
            f"{path}: truncated: expected at least {needed} bytes by its header, found {found}. "
            "Download or copy it again"
        )

"""Safetensors files, one or sharded, read by rows.

The format is a length, a JSON header and raw little-endian rows. It is read here and not through
the safetensors package because that cannot hand out bfloat16 rows to NumPy without a copy of the
whole tensor.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.source import RandomAccess, check_size

_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
_MAX_HEADER = 100_000_000


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
      path: of the file.

    Returns:
      The object.

    Raises:
      CheckpointError: no such file, no valid JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: expected this file, found none") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: expected valid JSON: {error}. Download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _header(file: RandomAccess) -> tuple[dict[str, Any], int]:
    """(header, offset of the first tensor's bytes).

    Raises:
      CheckpointError: the file is no safetensors file.
    """
    size = int(file.at(0, 8).view("<u8")[0])
    if size > _MAX_HEADER:
        raise CheckpointError(f"{file.path}: not a safetensors file (header of {size} bytes)")
    raw = file.at(8, size).tobytes()
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        for entry in header.values():
            _ = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file.path}: not a safetensors file, its header is not readable ({error}). "
            "Download it again"
        ) from error
    return header, 8 + size


class Safetensors:
    """The tensors of a directory's safetensors files.

    Attributes:
      label: the directory.
      shapes: tensor name to shape.
    """

    def __init__(self, directory: Path, files: list[RandomAccess]):
        """Reads the headers.

        Args:
          directory: for messages.
          files: opened; the caller closes them.

        Raises:
          CheckpointError: a truncated file, an unsupported dtype, a name that occurs twice.
        """
        self.label = str(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, tuple[RandomAccess, int, np.dtype]] = {}
        for file in files:
            header, base = _header(file)
            for name, entry in header.items():
                self._add(file, base, name, entry)

    def _add(self, file: RandomAccess, base: int, name: str, entry: dict[str, Any]) -> None:
        """Registers one tensor of a file.

        Raises:
          CheckpointError: a dtype, size or place that cannot be served.
        """
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} is stored as {entry['dtype']}; expected "
                f"{', '.join(_DTYPES)}. Convert the checkpoint to one of these"
            )
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has shape {shape} but {stop - start} bytes"
            )
        check_size(file.path, base + stop, file.size)
        if name in self.shapes:
            raise CheckpointError(f"{file.path}: tensor {name!r} is in two files; remove one")
        self.shapes[name] = shape
        self._where[name] = (file, base + start, dtype)

    def read(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, "rows *row"]:
        """Rows start…stop-1 of a tensor.

        Args:
          name: of the tensor.
          start: first row.
          stop: row after the last.

        Returns:
          The rows, in the dtype they are stored in.
        """
        file, base, dtype = self._where[name]
        row = self.shapes[name][1:]
        size = math.prod(row) * dtype.itemsize
        raw = file.at(base + start * size, (stop - start) * size)
        return raw.view(dtype).reshape(stop - start, *row)


def _shards(directory: Path) -> list[Path]:
    """The files that hold the weights.

    Raises:
      CheckpointError: there are none, or not all.
    """
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{index}: expected a 'weight_map' object, found none")
        paths = [directory / name for name in sorted(set(names.values()))]
        missing = [p.name for p in paths if not p.exists()]
        if missing:
            raise CheckpointError(
                f"{directory}: {index.name} lists {', '.join(missing)}, found no such file. "
                "Download the missing shards"
            )
        return paths
    if single.exists():
        return [single]
    pickled = sorted(p.name for p in directory.glob("*.bin"))
    found = f"only {', '.join(pickled)}, which is a pickle" if pickled else "none"
    raise CheckpointError(
        f"{directory}: expected model.safetensors (or its .index.json), found {found}. Pickled "
        "weights are not loaded, because reading them can run any code; convert them with "
        "transformers' save_pretrained(…) where you trust their author"
    )


@contextlib.contextmanager
def open_safetensors(directory: Path) -> Iterator[Safetensors]:
    """Opens the weights of a Hugging Face directory.

    Args:
      directory: with model.safetensors, or model.safetensors.index.json and its shards.

    Yields:
      The tensors.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(RandomAccess(p)) for p in _shards(directory)]
        yield Safetensors(directory, files)

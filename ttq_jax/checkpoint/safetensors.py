"""A directory's safetensors files, one or sharded, read by rows."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from ttq_jax.checkpoint.errors import CheckpointError

_DTYPES = ("F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
      path: of the file.

    Returns:
      The object.

    Raises:
      CheckpointError: no such file, not valid JSON, or not an object.
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


class Safetensors:
    """The tensors of a directory's safetensors files.

    Attributes:
      label: the directory.
      shapes: tensor name to shape.
    """

    def __init__(self, directory: Path, files: dict[Path, Any]):
        """Reads the headers.

        Args:
          directory: for messages.
          files: opened by `safe_open`; the caller closes them.

        Raises:
          CheckpointError: an unsupported dtype, a name that occurs twice.
        """
        self.label = str(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._slices: dict[str, Any] = {}
        for path, file in files.items():
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is stored as {part.get_dtype()}; expected "
                        f"{', '.join(_DTYPES)}. Convert the checkpoint to one of these"
                    )
                if name in self.shapes:
                    raise CheckpointError(f"{path}: tensor {name!r} is in two files; remove one")
                self.shapes[name] = tuple(part.get_shape())
                self._slices[name] = part

    def read(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, " rows *row"]:
        """Rows start…stop-1 of a tensor.

        Args:
          name: of the tensor.
          start: first row.
          stop: row after the last.

        Returns:
          The rows, in the dtype they are stored in.
        """
        return self._slices[name][start:stop]


def _open(path: Path) -> Any:
    """A file's tensors, behind its checked header.

    Raises:
      CheckpointError: the file is truncated, or not a safetensors file.
    """
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}). Download it again"
        ) from error


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
        files = {p: stack.enter_context(_open(p)) for p in _shards(directory)}
        yield Safetensors(directory, files)

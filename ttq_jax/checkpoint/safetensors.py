"""A directory's safetensors files, one or sharded, read by rows."""

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.fused_experts import Part, expert_parts
from ttq_jax.checkpoint.source import RandomAccess
from ttq_jax.checkpoint.unservable import check_plain
from ttq_jax.errors import shown
from ttq_jax.foreign import is_file, is_inside, named, parse_json, read_json, why

_DTYPES = ("F32", "F16", "BF16")
_INDEX = {"weight_map": {"*": str}, "metadata?": (None, dict)}


class Safetensors:
    """The tensors of a directory's safetensors files.

    Attributes:
      label: the directory.
      shapes: tensor name to shape.
      left_out: the names that were not looked at.
      notes: which of several files were read; a sentence each.
      experts: of a mixture whose tensors hold all experts of a layer, where each expert is, once
        `split_experts` was called; their names are among `shapes` in place of the tensors'.
    """

    def __init__(self, directory: Path, files: dict[Path, Any], ignored: tuple[str, ...] = ()):
        """Reads the headers.

        Args:
          directory: for messages.
          files: opened by `safe_open`; the caller closes them.
          ignored: patterns (fnmatch) of tensors that are not looked at.

        Raises:
          CheckpointError: an unsupported dtype, a name that occurs twice.
        """
        self.label = str(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.left_out: list[str] = []
        self.notes: list[str] = []
        self.experts: dict[str, Part] = {}
        self._slices: dict[str, Any] = {}
        check_plain(directory, (name for f in files.values() for name in f.keys()))  # noqa: SIM118
        for path, file in files.items():
            for name in file.keys():  # noqa: SIM118
                if any(fnmatchcase(name, pattern) for pattern in ignored):
                    self.left_out.append(name)
                    continue
                part = file.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise CheckpointError(
                        f"{path}: tensor {shown(name)} is stored as {part.get_dtype()}; expected "
                        f"{', '.join(_DTYPES)}. Convert the checkpoint to one of these"
                    )
                if name in self.shapes:
                    raise CheckpointError(
                        f"{path}: tensor {shown(name)} is in two files; remove one"
                    )
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
        part = self.experts.get(name)
        if part is None:
            return self._slices[name][start:stop]
        whole, rows = self._slices[part.tensor], slice(part.first + start, part.first + stop)
        at = slice(part.expert, part.expert + 1)
        return whole[at, :, rows][0].T if part.transposed else whole[at, rows][0]

    def split_experts(self, n_experts: int) -> None:
        """Gives each expert a name of its own where a tensor holds all experts of a layer.

        Args:
          n_experts: E, as the configuration says it.

        Raises:
          CheckpointError: such tensors do not go together.
        """
        self.experts = expert_parts(self.label, self.shapes, n_experts)
        for tensor in {part.tensor for part in self.experts.values()}:
            del self.shapes[tensor]
        self.shapes |= {name: part.shape for name, part in self.experts.items()}


def _open(path: Path) -> Any:
    """A file's tensors, behind its checked header.

    Raises:
      CheckpointError: the file is truncated, or not a safetensors file.
    """
    with RandomAccess(path) as raw:
        try:
            file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a complete safetensors file ({why(error)}). Download it again"
            ) from error
        # Of two tensors of one name the library takes the last.
        size = int.from_bytes(raw.at(0, 8).tobytes(), "little")
        parse_json(raw.at(8, size).tobytes(), f"{path}: its header", CheckpointError)
    return file


def _shards(directory: Path) -> tuple[list[Path], list[str]]:
    """The files that hold the weights, and notes.

    Raises:
      CheckpointError: there are none, or not all.
    """
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        names = sorted(set(read_json(index, CheckpointError, _INDEX)["weight_map"].values()))
        if not names:
            raise CheckpointError(f"{index}: expected a weight_map with tensors, found none")
        outside = [shown(name) for name in names if not is_inside(name)]
        if outside:
            raise CheckpointError(
                f"{index}: expected names of files beside it, got {named(outside)}. "
                "Download the index again"
            )
        if single.name not in names and is_file(single):
            note = (
                f"{single.name} is read, as transformers does; {index.name} and its shards are "
                "left aside"
            )
            return [single], [note]
        paths = [directory / name for name in names]
        missing = [path.name for path in paths if not is_file(path)]
        if missing:
            raise CheckpointError(
                f"{directory}: {index.name} lists {named(missing)}, found no such file. "
                "Download the missing shards"
            )
        return paths, []
    if single.exists():
        return [single], []
    pickled = sorted(p.name for p in directory.glob("*.bin"))
    found = f"only {named(pickled)}, which is a pickle" if pickled else "none"
    raise CheckpointError(
        f"{directory}: expected model.safetensors (or its .index.json), found {found}. Pickled "
        "weights are not loaded, because reading them can run any code; convert them with "
        "transformers' save_pretrained(…) where you trust their author"
    )


@contextlib.contextmanager
def open_safetensors(directory: Path, ignored: tuple[str, ...] = ()) -> Iterator[Safetensors]:
    """Opens the weights of a Hugging Face directory.

    Args:
      directory: with model.safetensors, or model.safetensors.index.json and its shards.
      ignored: patterns (fnmatch) of tensors that are not looked at, whatever their dtype.

    Yields:
      The tensors.
    """
    paths, notes = _shards(directory)
    with contextlib.ExitStack() as stack:
        files = {p: stack.enter_context(_open(p)) for p in paths}
        source = Safetensors(directory, files, ignored)
        source.notes += notes
        yield source

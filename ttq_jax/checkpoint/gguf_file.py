"""The GGUF container: header and tensors of llama.cpp's file format, read by rows.

The header is parsed here (the gguf package takes seconds for a vocabulary of 262144 tokens); the
quantized blocks are decoded by the gguf package. A model may be split over several files, each with
a header of its own; the first has the model's.
"""

import collections
import contextlib
import dataclasses
import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.gguf_split import check_part, named_parts
from ttq_jax.checkpoint.source import RandomAccess, check_size
from ttq_jax.errors import shown
from ttq_jax.foreign import is_file, named

_FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
            10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_DAMAGED = "The file is damaged; download it again"
# As many as ggml has.
_MOST_AXES = 4


class _Cursor:
    """Reads the header front to back; never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.offset = path, data, 0

    def raw(self, size: int) -> bytes:
        """The next bytes."""
        end = self.offset + size
        check_size(self.path, end, len(self.data))
        out = self.data[self.offset : end]
        self.offset = end
        return out

    def integer(self, size: int) -> int:
        """The next unsigned integer of that many bytes."""
        return int.from_bytes(self.raw(size), "little")

    def string(self) -> str:
        """The next length-prefixed string."""
        return self.raw(self.integer(8)).decode("utf-8")

    def value(self, kind: int) -> Any:
        """The next value of a type; arrays become NumPy arrays or lists of strings.

        Raises:
          CheckpointError: an unknown type.
        """
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.integer(4), self.integer(8))
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: unknown GGUF value type {kind}. {_DAMAGED}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.raw(dtype.itemsize), dtype)[0].item()

    def _array(self, kind: int, length: int) -> Any:
        """The next array.

        Raises:
          CheckpointError: an unknown element type.
        """
        if kind == _STRING:
            return self._strings(length)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: GGUF array of type {kind} is not supported")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.raw(dtype.itemsize * length), dtype)

    def _strings(self, length: int) -> list[str]:
        """The next strings. A loop of its own: vocabularies have hundreds of thousands.

        Raises:
          CheckpointError: the file ends before.
        """
        data, at, end = self.data, self.offset, len(self.data)
        unpack, out = struct.Struct("<Q").unpack_from, []
        for _ in range(length):
            check_size(self.path, at + 8, end)
            (size,) = unpack(data, at)
            at += 8 + size
            check_size(self.path, at, end)
            out.append(data[at - size : at].decode("utf-8"))
        self.offset = at
        return out


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor is in the file, and how it is stored."""

    file: RandomAccess
    kind: str
    offset: int
    row_bytes: int


def supported_types() -> tuple[str, ...]:
    """The storage types that are read: plain ones, and those that the gguf package decodes."""
    import gguf.quants

    blocks = (t.name for t in gguf.GGMLQuantizationType if hasattr(gguf.quants, t.name))
    return tuple(dict.fromkeys([*_FLOATS, *blocks]))


def _check_type(path: Path, name: str, code: int) -> str:
    """The name of a tensor's storage type.

    Raises:
      CheckpointError: a type that is not supported.
    """
    from gguf import GGMLQuantizationType  # only this format needs the package

    known = {t.value: t.name for t in GGMLQuantizationType}
    kind = known.get(code, f"type {code}")
    if kind not in supported_types():
        raise CheckpointError(
            f"{path}: tensor {shown(name)} is stored as {kind}, which the installed gguf package "
            f"cannot decode; expected one of {', '.join(supported_types())}. Choose a file of "
            "another quantization, or install a newer gguf"
        )
    return kind


class _Part:
    """One file: its header, and where its tensors are."""

    def __init__(self, file: RandomAccess):
        """Reads the header.

        Args:
          file: opened; the caller closes it.

        Raises:
          CheckpointError: not a GGUF file, a version or type not supported, a truncated file.
        """
        self.file = file
        check_size(file.path, 24, file.size)
        with (
            file.path.open("rb") as handle,
            mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            try:
                self._parse(_Cursor(file.path, data))
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{file.path}: bad header ({error}). {_DAMAGED}") from error

    def _parse(self, cursor: _Cursor) -> None:
        """Fills metadata, shapes and tensor places.

        Raises:
          CheckpointError: not a GGUF file, or a version not supported.
        """
        path = self.file.path
        if cursor.raw(4) != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file (no GGUF magic at its start)")
        version = cursor.integer(4)
        if version not in (2, 3):
            raise CheckpointError(
                f"{path}: expected GGUF version 2 or 3, little-endian, got {version}. Convert it "
                "again"
            )
        n_tensors, n_keys = cursor.integer(8), cursor.integer(8)
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = cursor.string()
            if key in self.metadata:
                raise CheckpointError(f"{path}: the key {shown(key)} occurs twice. {_DAMAGED}")
            self.metadata[key] = cursor.value(cursor.integer(4))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.tensors: dict[str, _Tensor] = {}
        for _ in range(n_tensors):
            self._tensor_info(cursor)
        self._place(cursor.offset)

    def _tensor_info(self, cursor: _Cursor) -> None:
        """Reads one tensor's entry; its offset stays relative until all are read.

        Raises:
          CheckpointError: an entry that cannot be right.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        path, name = self.file.path, cursor.string()
        axes = cursor.integer(4)
        if not 1 <= axes <= _MOST_AXES:
            raise CheckpointError(
                f"{path}: tensor {shown(name)}: expected 1 to {_MOST_AXES} axes, got {axes}. "
                f"{_DAMAGED}"
            )
        shape = tuple(cursor.integer(8) for _ in range(axes))[::-1]
        kind = _check_type(path, name, cursor.integer(4))
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if 0 in shape or shape[-1] % block:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} has shape {shape}; {kind} needs rows of a multiple "
                f"of {block}. {_DAMAGED}"
            )
        if name in self.shapes:
            raise CheckpointError(f"{path}: tensor {shown(name)} occurs twice. {_DAMAGED}")
        self.shapes[name] = shape
        self.tensors[name] = _Tensor(self.file, kind, cursor.integer(8), shape[-1] // block * size)

    def _place(self, header_end: int) -> None:
        """Makes the tensors' offsets absolute and checks that the file reaches that far.

        As in llama.cpp, each tensor follows the one before it at the next aligned place.

        Raises:
          CheckpointError: another alignment or offset, or the file ends before its last tensor.
        """
        path, align = self.file.path, self.metadata.get("general.alignment", 32)
        if type(align) is not int or align < 1 or align & (align - 1):
            raise CheckpointError(
                f"{path}: general.alignment: expected a power of two, got {shown(align)}. "
                f"{_DAMAGED}"
            )
        base, expected = -(-header_end // align) * align, 0
        for name, tensor in self.tensors.items():
            if tensor.offset != expected:
                raise CheckpointError(
                    f"{path}: tensor {shown(name)}: expected it {expected} bytes into the data, "
                    f"found {tensor.offset}. {_DAMAGED}"
                )
            size = math.prod(self.shapes[name][:-1]) * tensor.row_bytes
            check_size(path, base + expected + size, self.file.size)
            self.tensors[name] = dataclasses.replace(tensor, offset=base + expected)
            expected += -(-size // align) * align


class GgufFile:
    """A GGUF model: its metadata and its tensors.

    Attributes:
      label: the path.
      metadata: header keys to values.
      shapes: tensor name to shape, weights as [d_out, d_in].
    """

    def __init__(self, file: RandomAccess, *more: RandomAccess):
        """Reads the headers.

        Args:
          file: opened; the caller closes it.
          *more: the further parts of a split model, in their order.

        Raises:
          CheckpointError: a header that cannot be read, or parts that do not belong together.
        """
        parts = [_Part(one) for one in (file, *more)]
        self.label, self.metadata = str(file.path), parts[0].metadata
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._tensors: dict[str, _Tensor] = {}
        for i, part in enumerate(parts):
            check_part(part.file.path, part.metadata, i, len(parts))
            if twice := self.shapes.keys() & part.shapes.keys():
                raise CheckpointError(
                    f"{part.file.path}: tensor {shown(min(twice))} is in another part too. "
                    f"{_DAMAGED}"
                )
            self.shapes |= part.shapes
            self._tensors |= part.tensors
        promised = self.metadata.get("split.tensors.count", len(self.shapes))
        if len(parts) > 1 and not (type(promised) is int and promised == len(self.shapes)):
            raise CheckpointError(
                f"{self.label}: expected {shown(promised)} tensors in all {len(parts)} parts, "
                f"found {len(self.shapes)}. Download them again, all from one place"
            )

    @property
    def quantization(self) -> str:
        """How the weights were quantized, as in "Q4_K_M" or "Q4_1"; "" if they were not.

        A mixture has the name that the file gives itself, else that of most of its block weights.
        """
        from gguf import LlamaFileType

        sizes: collections.Counter[str] = collections.Counter()
        for name, tensor in self._tensors.items():
            if name.startswith("blk."):
                sizes[tensor.kind] += math.prod(self.shapes[name])
        kind = sizes.most_common(1)[0][0] if sizes else "F32"
        if kind in {"F32", "F16", "BF16"}:
            return ""
        names = {int(one): one.name.removeprefix("MOSTLY_") for one in LlamaFileType}
        told = self.metadata.get("general.file_type")
        name = names.get(told, kind) if isinstance(told, int) else kind
        return name if "Q" in name else kind

    def read(self, name: str, start: int, stop: int) -> Float[np.ndarray, " rows *row"]:
        """Rows start…stop-1 of a tensor; a vector is read whole.

        Args:
          name: of the tensor; of more than two axes all but the last count as rows.
          start: first row.
          stop: row after the last.

        Returns:
          float16, bfloat16 or float32 rows; quantized ones are decoded to float32.
        """
        tensor, shape = self._tensors[name], self.shapes[name]
        if len(shape) == 1:
            return self._decode(tensor, 0, 1).reshape(-1)[start:stop]
        return self._decode(tensor, start, stop)

    def _decode(self, tensor: _Tensor, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor, each a contiguous run of blocks."""
        raw = tensor.file.at(
            tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes
        ).reshape(stop - start, tensor.row_bytes)
        if tensor.kind in _FLOATS:
            return raw.view(_FLOATS[tensor.kind])
        import gguf.quants

        # By rows and not through gguf.dequantize: that one visits 16 rows at a time in Python,
        # which threads cannot overlap.
        decoder = getattr(gguf.quants, tensor.kind)
        decoder.init_grid()
        with np.errstate(all="ignore"):
            return decoder.dequantize_rows(raw)


@contextlib.contextmanager
def open_gguf(path: Path) -> Iterator[GgufFile]:
    """Opens a GGUF model.

    Args:
      path: of the file, or of any part of a split one; the others lie beside it.

    Yields:
      The model's file, or its files as one.

    Raises:
      CheckpointError: it cannot be opened or read, or a part is missing.
    """
    parts = named_parts(path)
    missing = [part.name for part in parts if not is_file(part)]
    with contextlib.ExitStack() as stack:
        here = (path,) if missing else parts
        files = [stack.enter_context(RandomAccess(p)) for p in here]
        # A joined file may have kept the name of its first part.
        count = _Part(files[0]).metadata.get("split.count", 0) if missing else 0
        if not (type(count) is int and count <= 1):
            raise CheckpointError(
                f"{path}: one of {len(parts)} parts; missing beside it: {named(missing)}. Download "
                "them to the same directory"
            )
        yield GgufFile(*files)

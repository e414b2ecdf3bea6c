"""Which files a name stands for, and what tells them from others of the same name."""

import hashlib
from pathlib import Path

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.gguf_split import named_parts
from ttq_jax.checkpoint.hub import is_hub_id, snapshot
from ttq_jax.checkpoint.packaged import ALIASES
from ttq_jax.errors import shown
from ttq_jax.foreign import is_file

# Bytes of a weight file that the fingerprint looks at: blocks spread evenly, the first and the last
# among them. Files of other weights differ in nearly every block.
_BLOCKS, _BLOCK = 64, 4096

_READ = ("*.json", "*.safetensors", "tokenizer.model")


def find(model: str | Path) -> Path:
    """The file or directory of a model.

    Args:
      model: see `load`.

    Returns:
      Its path; what a hub id names is downloaded if need be.

    Raises:
      CheckpointError: there is no such model.
    """
    name = str(model)
    if name in ALIASES:
        return ALIASES[name]()
    try:
        path = Path(model).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as e:  # too long a name; no such home directory
        reason = e.strerror if isinstance(e, OSError) else e
        raise CheckpointError(f"{shown(name)}: cannot be looked for ({reason})") from e
    if not is_hub_id(name) or path.suffix == ".gguf":
        raise CheckpointError(
            f"{name}: no such file or directory, and neither an alias ({', '.join(ALIASES)}) "
            'nor a hub id ("organization/name", or "organization/name@revision")'
        )
    return snapshot(name)


def origin(path: Path) -> dict[str, str]:
    """What identifies a model's files, found without loading them.

    Args:
      path: from `find`.

    Returns:
      "file", the name of the directory, or of the file or its first part; "revision", of what came
      from the hub, else ""; and "fingerprint", 64 hexadecimal digits: a digest of the small files,
      and of the weight files' sizes and a sample of their bytes. It depends neither on the dtype
      nor on the place.

    Raises:
      CheckpointError: a file cannot be read.
    """
    from_hub = path.is_dir() and path.parent.name == "snapshots"
    files = [part for part in named_parts(path) if is_file(part)] or [path]
    name = path.parent.parent.name.removeprefix("models--") if from_hub else files[0].resolve().name
    if path.is_dir():
        files = sorted({f for pattern in _READ for f in path.glob(pattern) if is_file(f)})
    elif files == [path] and path.exists() and not is_file(path):
        # A pipe would be waited for.
        raise CheckpointError(f"{path}: expected a file, found a pipe or device")
    digest = hashlib.sha256()
    try:
        for file in files:
            size = file.stat().st_size
            # A single file may have any name; in a directory the names say what is what.
            digest.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
            with file.open("rb") as opened:
                if size <= _BLOCKS * _BLOCK:
                    digest.update(opened.read())
                    continue
                for i in range(_BLOCKS):
                    opened.seek((size - _BLOCK) * i // (_BLOCKS - 1))
                    digest.update(opened.read(_BLOCK))
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from e
    return {
        "file": name.replace("--", "/") if from_hub else name,
        "revision": path.name if from_hub else "",
        "fingerprint": digest.hexdigest(),
    }

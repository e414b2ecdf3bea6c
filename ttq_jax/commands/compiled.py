"""The cache of compiled programs, so that a second start need not compile again."""

import os
from pathlib import Path

import jax

from ttq_jax.evaluation.progress import Progress


def cache_directory(chosen: str | None) -> Path:
    """Where compiled programs are kept.

    Args:
      chosen: by an option, or None.

    Returns:
      The directory, which need not exist yet.
    """
    if chosen:
        return Path(chosen).expanduser()
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ttq_jax" / "xla"


def keep_compiled_programs(directory: Path, progress: Progress) -> None:
    """Turns on jax's persistent compilation cache; notes it if the directory cannot be written.

    Args:
      directory: made if there is none.
      progress: gets the note.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        progress.note(f"compiled programs are not cached: {directory}: {e.strerror}")
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # A start runs many small programs, each compiled in less than jax's default of a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

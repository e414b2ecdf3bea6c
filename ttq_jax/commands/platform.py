"""Where jax looks for a chip: nowhere, if the machine has none. And how wide a CPU's vectors are.

jax tries every plugin that is installed. Those of NVIDIA GPUs and TPUs write pages of trace where
there is no such chip, before the CPU is taken.

XLA takes vectors of 256 bits on a CPU that has wider ones. Decoding packed weights is arithmetic
there, and wider ones make it faster (`experiments/bench_cpu.py`).
"""

import importlib.metadata
import importlib.util
import os
import pkgutil
from pathlib import Path

import jax

# Ignored by a CPU without them.
_WIDE = "--xla_cpu_prefer_vector_width=512"
# XLA aborts the process on a flag that it does not know, and cannot be asked. A jax newer than
# the newest that was tried goes without.
_KNOWN_TO_HAVE_IT = (0, 12, 0, 1)

# What a chip's driver makes in /dev: NVIDIA's on PCs, in WSL and on Jetson; AMD's; TPUs'.
_DRIVERS = ("nvidia*", "dxg", "nvhost*", "nvmap", "kfd", "accel*", "vfio/[0-9]*")
# Plugins of those chips. Another one may find its chip elsewhere.
_KNOWN = ("xla_cuda", "jax_cuda", "xla_rocm", "jax_rocm", "libtpu")


def _plugins() -> set[str]:
    """The plugins that jax would load, found as jax finds them."""
    named = {entry.value for entry in importlib.metadata.entry_points(group="jax_plugins")}
    spec = importlib.util.find_spec("jax_plugins")
    within = spec.submodule_search_locations if spec else None
    return named | {module.name for module in pkgutil.iter_modules(within or [])}


def has_chip(devices: Path = Path("/dev")) -> bool:
    """Whether a chip that jax could use may be here.

    Args:
      devices: where drivers show their chips.

    Returns:
      False only if there is none of a kind that an installed plugin is for.
    """
    names = (plugin.split(".")[-1] for plugin in _plugins())
    strange = not all(name.startswith(_KNOWN) for name in names)
    given = "PJRT_NAMES_AND_LIBRARY_PATHS" in os.environ
    return strange or given or any(any(devices.glob(driver)) for driver in _DRIVERS)


def choose_platform() -> None:
    """Keeps jax to the CPU on a machine without a chip; a choice of the user's stands."""
    chosen = jax.config.jax_platforms  # type: ignore[attr-defined]
    if not chosen and not has_chip():
        chosen = "cpu"
        jax.config.update("jax_platforms", chosen)
    if chosen == "cpu" and jax.__version_info__ <= _KNOWN_TO_HAVE_IT:
        _start_with(_WIDE)


def _start_with(flag: str) -> None:
    """Starts the CPU's compiler with a flag, unless it has started or the user sets that flag.

    It reads its flags once. Compilers of other chips, which know other ones, and processes that
    are started later never see it.
    """
    given = os.environ.get("XLA_FLAGS")
    if flag.split("=")[0] in (given or ""):
        return
    os.environ["XLA_FLAGS"] = f"{given or ''} {flag}".strip()
    try:
        jax.devices()
    finally:
        if given is None:
            del os.environ["XLA_FLAGS"]
        else:
            os.environ["XLA_FLAGS"] = given

"""Compiling for accelerators that are not there.

The real TPU compiler (package ``libtpu``) and the real CUDA one (``jax-cuda13-plugin``,
``jax-cuda13-pjrt``) run on any machine. They prove that a program compiles and give its memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
    use_abstract_mesh,
)

from ttq_jax.errors import Error


class ChipError(Error):
    """A chip that cannot be compiled for here; the message says what to install."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """An accelerator, as its compiler wants it described.

    Attributes:
      platform: "tpu" or "cuda".
      topology: TPU: the compiler's name of a slice with one chip in it.
      bytes_per_cycle: TPU: a device's HBM bandwidth over its clock; None where the compiler gives
        no cycle estimate.
      capability: GPU: CUDA compute capability.
      cores: GPU: streaming multiprocessors.
      name: GPU: the device kind that a running one reports.
      memory: device memory, bytes.
      bandwidth: device memory bandwidth, bytes per second.
      flops: peak of bfloat16 products with dense matrices (of float16 on a T4), per second.
      link: bandwidth from the host's memory, bytes per second; 0 where the vendor tells none.
      peers: bandwidth to the other devices of a slice or a server, one way, bytes per second.
    """

    platform: str
    memory: int
    bandwidth: float
    flops: float
    peers: float
    link: float = 0.0
    topology: str = ""
    bytes_per_cycle: float | None = None
    capability: tuple[int, int] = (0, 0)
    cores: int = 0
    name: str = ""


_GIB = 2**30
CHIPS: dict[str, Chip] = {
    "v4": Chip(
        platform="tpu", topology="v4:1x1x1", memory=32 * _GIB, bandwidth=1228e9, flops=275e12,
        peers=300e9,
    ),
    "v5e": Chip(
        platform="tpu", topology="v5e:1x1", memory=16 * _GIB, bandwidth=820e9, flops=197e12,
        bytes_per_cycle=820 / 1.5, peers=200e9,
    ),
    "v5p": Chip(
        platform="tpu", topology="v5p:1x1x1", memory=95 * _GIB, bandwidth=2765e9, flops=459e12,
        bytes_per_cycle=2765 / 1.75, peers=600e9,
    ),
    "v6e": Chip(
        platform="tpu", topology="v6e:1x1", memory=32 * _GIB, bandwidth=1640e9, flops=918e12,
        bytes_per_cycle=1640 / 1.75, peers=400e9,
    ),
    "tpu7x": Chip(
        platform="tpu", topology="tpu7x:1x1x1", memory=96 * _GIB, bandwidth=3690e9, flops=1153e12,
        bytes_per_cycle=3690 / 2.2, peers=600e9,
    ),
    "t4": Chip(
        platform="cuda", capability=(7, 5), cores=40, name="Tesla T4", memory=16 * _GIB,
        bandwidth=320e9, flops=65e12, link=15.75e9, peers=15.75e9,
    ),
    "a100": Chip(
        platform="cuda", capability=(8, 0), cores=108, name="NVIDIA A100-SXM4-80GB",
        memory=80 * _GIB, bandwidth=2039e9, flops=312e12, link=31.5e9, peers=300e9,
    ),
    "l4": Chip(
        platform="cuda", capability=(8, 9), cores=58, name="NVIDIA L4", memory=24 * _GIB,
        bandwidth=300e9, flops=121e12, link=31.5e9, peers=31.5e9,
    ),
    "h100": Chip(
        platform="cuda", capability=(9, 0), cores=132, name="NVIDIA H100 80GB HBM3",
        memory=80 * _GIB, bandwidth=3352e9, flops=989e12, link=63e9, peers=450e9,
    ),
}  # fmt: skip
"""Bandwidths and clocks are the vendors' figures, of what jax calls a device: a v5p is one of two
cores, a tpu7x chip is two of one core, and half of the chip is what its row says. Between devices
it is half of what the vendors give for both directions: of TPUs the chip's inter-chip interconnect
(Cloud TPU documentation, system architecture of each version; 4800 Gbps one way are its v5p's 1200
GB/s both ways), which the two devices of a tpu7x share; of GPUs NVLink (data sheets of A100 and
H100), or PCIe for T4 and L4, which have none."""

# XLA's description of a GPU that is not there; only capability, cores and memory differ enough to
# matter to code generation.
_GPU_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 41943040 clock_rate_ghz: 1.5
  device_memory_size: {memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""

# Shared memory per core and per block (opt-in), bytes, by compute capability.
_SHARED = {(7, 5): (65536, 65536), (8, 0): (167936, 166912), (8, 9): (102400, 101376),
           (9, 0): (233472, 232448)}  # fmt: skip

# Without these libtpu asks a metadata server for its surroundings, or refuses a second process.
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def chip(name: str) -> Chip:
    """The chip of a name.

    Raises:
      ChipError: there is no such chip, or its compiler is not installed.
    """
    if name not in CHIPS:
        raise ChipError(f"chip: expected one of {', '.join(CHIPS)}, got {name!r}")
    found = CHIPS[name]
    if found.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise ChipError(f"compiling for {name} needs the TPU compiler: pip install libtpu")
    if found.platform == "cuda":
        wanted, plugin = jax.__version__, "jax-cuda13-plugin"
        there = None
        with contextlib.suppress(metadata.PackageNotFoundError):
            there = metadata.version(plugin)
        if there != wanted:
            raise ChipError(
                f"compiling for {name} needs the CUDA compiler of jax {wanted}, found "
                f"{f'{plugin} {there}' if there else 'none'}: "
                f'pip install "jax[cuda13-local]=={wanted}" "nvidia-cuda-nvcc>=13,<14"'
            )
    return found


def libtpu_version() -> str:
    """Version of the TPU compiler that jax loads: the one at TPU_LIBRARY_PATH, or the installed.

    Returns:
      As its wheel has it, "0.0.52".

    Raises:
      ChipError: there is none, or the library at TPU_LIBRARY_PATH does not lie in its wheel.
    """
    path = os.environ.get("TPU_LIBRARY_PATH", "")
    # jax takes the installed one if there is no such file.
    where: dict[str, Any] = (
        {"path": [str(Path(path).parent.parent)]} if Path(path).is_file() else {}
    )
    found = next(iter(metadata.distributions(name="libtpu", **where)), None)
    if found is None:
        raise ChipError(
            f"libtpu: expected the library in its wheel, which names its version, got {path!r}: "
            "unpack it with pip install --no-deps --target DIRECTORY libtpu==VERSION"
            if where
            else "libtpu: expected an installed one, found none: pip install libtpu"
        )
    return found.version


@functools.cache
def device(name: str) -> Any:
    """The device of a topology with one such chip; it can be compiled for, not run on.

    Raises:
      ChipError: the chip is unknown or its compiler is not installed.
    """
    it = chip(name)
    if it.platform == "tpu":
        for key, value in QUIET.items():
            os.environ.setdefault(key, value)
        # Unless told otherwise, libtpu 0.0.42 takes a host to have four chips and refuses fewer.
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=it.topology, chips_per_host_bounds=(1, 1, 1)
        )
    else:
        shared, optin = _SHARED[it.capability]
        description = _GPU_DESCRIPTION.format(
            shared=shared, optin=optin, threads=1024 if it.capability == (7, 5) else 2048,
            cores=it.cores, bandwidth=int(it.bandwidth), memory=it.memory,
            major=it.capability[0], minor=it.capability[1], name=it.name,
        )  # fmt: skip
        found = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=description
        )
    return found.devices[0]


@contextlib.contextmanager
def tracing_for(name: str) -> Iterator[None]:
    """Inside this context, traced code sees this chip as its device."""
    it = device(name)
    platform = "gpu" if CHIPS[name].platform == "cuda" else "tpu"
    abstract = AbstractDevice(
        device_kind=it.device_kind, num_cores=getattr(it, "num_cores", None), platform=platform
    )
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        yield


@contextlib.contextmanager
def compiled_afresh() -> Iterator[None]:
    """Turns jax's persistent cache off: a program for an absent chip cannot be loaded from it."""
    option = "jax_enable_compilation_cache"
    before = getattr(jax.config, option)
    jax.config.update(option, False)
    # jax decides once whether it uses the cache; a reset makes it decide again.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(option, before)
        compilation_cache.reset_cache()


def _placing(
    name: str, on_host: Callable[[tuple[Any, ...]], bool] | None
) -> Callable[[tuple[Any, ...]], Sharding]:
    """Where the arguments lie, by path.

    Raises:
      ChipError: the host's memory is asked for of a compiler that does not know it.
    """
    it = device(name)
    if on_host is None:
        return lambda path: SingleDeviceSharding(it)
    if CHIPS[name].platform != "tpu":
        # jax drops the memory kind without a word: such devices report no memories.
        raise ChipError(
            f"compiling for {name} with weights in the host's memory needs a running one: the "
            "compiler of an absent GPU does not know memory kinds"
        )
    # Traced with a SingleDeviceSharding, an argument would be in the device's memory.
    mesh = Mesh(np.array([it]), ("one",), axis_types=(AxisType.Auto,))
    pinned = NamedSharding(mesh, PartitionSpec(), memory_kind="pinned_host")
    return lambda path: pinned if on_host(path) else NamedSharding(mesh, PartitionSpec())


def compile_for(
    name: str, fn: Callable[..., Any], *shapes: Any,
    on_host: Callable[[tuple[Any, ...]], bool] | None = None, **static: Any,
) -> Any:  # fmt: skip
    """Compiles a function for a chip that need not be there.

    Args:
      name: a key of `CHIPS`; with `on_host` a TPU's.
      fn: to be jitted, or jitted already.
      *shapes: its positional arguments as trees of `jax.ShapeDtypeStruct` (or arrays).
      on_host: says of a leaf's path whether it lies in pinned host memory; None for none.
      **static: its static keyword arguments, if it is jitted already.

    Returns:
      The compiled executable: `memory_analysis()`, `as_text()`.

    Raises:
      ChipError: the chip is unknown or its compiler is not installed, or does not know the host's
        memory.
    """
    place = _placing(name, on_host)
    shapes = jax.tree_util.tree_map_with_path(
        lambda path, s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place(path)), shapes
    )
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    with tracing_for(name), compiled_afresh():
        traced = jitted.trace(*shapes, **static)
        return traced.lower(lowering_platforms=(CHIPS[name].platform,)).compile()

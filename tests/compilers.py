"""How tests compile: fast for this CPU, and for TPUs and GPUs where their compilers exist."""

import platform
import sys

import pytest
from jaxlib.version import __version_info__ as JAXLIB

needs_compilers = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="the compilers of TPUs and GPUs are made for Linux on x86-64 only",
)

# A test's programs run once or twice: optimizing them would double the suite's processor time.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if JAXLIB < (0, 11, 1):
    # jaxlib 0.11.1 dropped this flag. On a flag that it does not know, XLA aborts the process
    # without an exception; which it knows cannot be asked: hence the version.
    QUICK += " --xla_cpu_use_fusion_emitters=false"
# So many devices for tests of meshes; all others run on the first, and as fast.
DEVICES = "--xla_force_host_platform_device_count=8"
# Environment of a process that compiles as fast; XLA_FLAGS would reach libtpu, which knows others.
QUICKLY = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

# Their shapes are compiled for each chip.
MODELS = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-8b", "llama-3-8b", "gemma-3-1b", "opt-6.7b")

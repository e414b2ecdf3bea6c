"""Where the real compilers of TPUs and GPUs exist; there, a test may not do without them."""

import platform
import sys

import pytest

needs_compilers = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="the compilers of TPUs and GPUs are made for Linux on x86-64 only",
)

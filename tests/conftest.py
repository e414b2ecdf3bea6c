"""One set-up for the whole suite: CPU, strict dtypes, shapes checked at run time."""

import gc
import os
import signal

# A shell's background job ignores Ctrl-C, and so would every process that a test sends one to.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# XLA's threads: the two cores of a simulated TPU wait for each other, on one processor for ever.
os.environ.setdefault("NPROC", str(max(2, os.cpu_count() or 1)))
# Nothing here may reach a hub; what a test needs is a package or made by the test.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jaxtyping
import pytest
from compilers import QUICK

# XLA reads its flags once: the CPU's compiler keeps these, while libtpu's, which knows others, and
# processes that a test starts never see them.
with pytest.MonkeyPatch.context() as flags:
    flags.setenv("XLA_FLAGS", f"{QUICK} {os.environ.get('XLA_FLAGS', '')}")
    jax.devices()

ARRAY_CODE = ["types", "linear", "models", "quant", "prompts", "prefill", "decode", "sampling",
              "offline", "generate", "evaluation.perplexity",
              "evaluation.continuations"]  # fmt: skip
jaxtyping.install_import_hook(
    ["pallas_kernels", *(f"ttq_jax.{name}" for name in ARRAY_CODE)], "beartype.beartype"
)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
    """Frees a file's compiled programs: each maps memory, and Linux gives a process 65530 maps."""
    yield
    jax.clear_caches()
    gc.collect()

"""One set-up for the whole suite: CPU, strict dtypes, shapes checked at run time."""

import gc
import importlib
import importlib.util
import math
import os
import shutil
import signal
import tempfile
import time
from zlib import crc32

# A shell's background job ignores Ctrl-C, and so would every process that a test sends one to.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# A compiled program need not know which line each of its steps came from.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
# XLA's threads: the two cores of a simulated TPU wait for each other, on one processor for ever.
os.environ.setdefault("NPROC", str(max(2, os.cpu_count() or 1)))
# Torch's threads wait for each other by spinning: over tiny models, beside another worker's, they
# do little else.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here may reach a hub; what a test needs is a package or made by the test.
os.environ["HF_HUB_OFFLINE"] = "1"
# The workers, and processes that tests start, share what was compiled; it ends with the run.
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="compiled-by-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import jaxtyping
import pytest
from compilers import DEVICES, QUICK

# XLA reads its flags once: the CPU's compiler keeps these, while libtpu's, which knows others, and
# processes that a test starts never see them.
with pytest.MonkeyPatch.context() as flags:
    flags.setenv("XLA_FLAGS", f"{QUICK} {DEVICES} {os.environ.get('XLA_FLAGS', '')}")
    jax.devices()

ARRAY_CODE = ["types", "linear", "experts", "models", "quant", "prompts", "sites", "prefill",
              "decode", "sampling", "offline", "draft_costs", "speculation", "auto_drafts",
              "stages", "generate", "stream", "evaluation.acceptance", "evaluation.perplexity",
              "evaluation.continuations"]  # fmt: skip
jaxtyping.install_import_hook(
    ["pallas_kernels", *(f"ttq_jax.{name}" for name in ARRAY_CODE)], "beartype.beartype"
)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# The product of a row has every term of a partial sum written out. Eight of them, for speed, make
# a 3-bit model three times as long to compile.
xla = importlib.import_module("pallas_kernels.xla")
TERMS, xla._UNROLLED = xla._UNROLLED, 1
# Tracing makes many objects, and few of them are garbage.
gc.set_threshold(50_000, 20, 100)


# They compare with an implementation in torch, or have it write the checkpoints that they read.
# The README's test command brings torch; CI's pass on the newest Python goes without.
_WITH_TORCH = (
    "test_ttq_torch.py", "models/test_families.py", "models/test_long_texts.py",
    "models/test_parity_real.py", "models/test_parity_torch.py", "models/test_rope_scaling.py",
    "checkpoint/test_config_fuzz.py", "checkpoint/test_config_parity.py",
    "checkpoint/test_experts_as_stored.py", "checkpoint/test_gguf.py",
    "checkpoint/test_huggingface.py", "checkpoint/test_where.py",
    "evaluation/harness", "experiments/test_compare_torch.py",
    "experiments/test_compare_torch_speed.py",
)  # fmt: skip
# A page is looked at where there is a browser.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
collect_ignore = [] if importlib.util.find_spec("torch") else list(_WITH_TORCH)
_BEGAN, _NO_TIME = time.monotonic(), "no time was left for them"
_WITHOUT_BROWSER = not any(map(shutil.which, BROWSERS))
if _WITHOUT_BROWSER:
    collect_ignore.append("sweeps/test_page_in_browser.py")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Leaves out a test for which there is no time."""
    if time.monotonic() - _BEGAN > item.config.getoption("seconds"):
        pytest.skip(_NO_TIME)


def pytest_terminal_summary(terminalreporter):
    """Says what was left out, where something was."""
    late = [r for r in terminalreporter.stats.get("skipped", []) if _NO_TIME in str(r.longrepr)]
    if late:
        terminalreporter.write_line(f"{len(late)} tests were left out, {_NO_TIME}")
    if not importlib.util.find_spec("torch"):
        left_out = ", ".join(_WITH_TORCH)
        terminalreporter.write_line(f"torch is not installed, so these were left out: {left_out}")
    if _WITHOUT_BROWSER:
        terminalreporter.write_line(
            "Chromium is not installed, so sweeps/test_page_in_browser.py was left out: no page "
            "was looked at. On Debian: apt-get install chromium"
        )


# A file is one worker's: one of these, begun last, would leave the other worker idle.
_LONG = {
    "test_tpu_compile.py", "test_notebooks.py", "test_gpu_compile.py", "test_parity_real.py",
    "test_programs.py", "test_plan.py", "test_jax_switches.py", "test_generate.py",
    "test_learned_recipe.py", "test_sweep_command.py", "test_xla.py", "test_docs.py",
    "test_mesh.py", "test_slices.py", "test_host_memory.py", "test_speculation.py",
    "test_mixed_prompts.py", "test_refresh.py", "test_stream.py", "test_ttq_torch.py",
    "test_two_streams.py",
}  # fmt: skip


# Of a check that these repeat over many shapes and grids, a fifth of the cases is quick, and at
# least one. Chance takes it, by their names: every fifth one would leave out what has a period.
_THINNED = {
    "test_tpu_compile.py", "test_tpu_packed_matmul.py", "test_tpu_prefill_quantize.py",
    "test_tpu_quantize_pack.py", "test_tpu_batching.py", "test_gpu_compile.py",
    "test_gpu_matmul.py", "test_gpu_mosaic.py", "test_gpu_quantize.py", "test_coded_scales.py",
    "test_xla.py", "test_head.py", "test_parity_torch.py", "test_zoo_of_flax.py",
}  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector):
    """Marks the others as slow: of all cases, whichever of them are then asked for by name."""
    made = yield
    if collector.path.name in _THINNED and isinstance(made, list):
        cases = [item for item in made if not item.get_closest_marker("slow")]
        cases.sort(key=lambda item: crc32(item.name.encode()))
        for item in cases[math.ceil(len(cases) / 5) :]:
            item.add_marker(pytest.mark.slow)
    return made


def pytest_addoption(parser):
    """`--one-case`, for a second jax: every check once, and not for every bit width."""
    parser.addoption(
        "--one-case", action="store_true", help="of a parametrized test only the first case"
    )
    parser.addoption(
        "--seconds", type=float, default=math.inf, help="begin no test later; the output says so"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """The long files come first; after the marks have chosen, one case may be enough."""
    if config.getoption("one_case"):
        first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        kept = [item for item in items if first[item.nodeid.partition("[")[0]] is item]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    items.sort(key=lambda item: item.path.name not in _LONG)


def pytest_collection_finish():
    """The modules of every test stay to the end: the garbage collector need not look at them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def terms_as_released():
    """The product of a row is the one that users run: for tests of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_UNROLLED", TERMS)
        jax.clear_caches()
        yield


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
    """Frees a file's compiled programs: each maps memory, and Linux gives a process 65530 maps."""
    yield
    jax.clear_caches()
    gc.collect()

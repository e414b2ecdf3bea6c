"""Compiling for chips that are not here; and that an estimate leaves nothing behind."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from compilers import needs_compilers
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels.choice import Target, chip_of, current_target
from ttq_jax.chips import CHIPS, ChipError, chip, compile_for, device, tracing_for
from ttq_jax.parsers import COMPILED, ESTIMATED

ROOT = Path(__file__).parent.parent


def test_the_command_line_knows_the_same_chips():
    assert set(COMPILED) == set(CHIPS)
    assert set(ESTIMATED) == {name for name, it in CHIPS.items() if it.bytes_per_cycle}


@needs_compilers
@pytest.mark.parametrize("name", sorted(CHIPS))
def test_each_compiler_knows_its_chip_by_the_name_that_we_choose_by(name):
    it = device(name)
    assert chip_of(it.device_kind) == name
    if CHIPS[name].platform == "cuda":
        assert it.device_kind == CHIPS[name].name
    with tracing_for(name):
        platform = {"cuda": "gpu"}.get(CHIPS[name].platform, "tpu")
        assert current_target() == Target(platform=platform, chip=name)
    assert current_target() == Target(platform="cpu")


@needs_compilers
@pytest.mark.parametrize("name", sorted(CHIPS))
def test_programs_compile_for_each_chip(name):
    shape = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    seen = []

    def program(tree, b):
        seen.append(current_target())
        return tree["a"].T @ b

    compiled = compile_for(name, program, {"a": shape}, shape)
    assert seen == [Target(platform=seen[0].platform, chip=name)]
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 256 * 128 * 4
    assert "f32[128,128]" in compiled.as_text()


@needs_compilers
def test_jitted_functions_keep_their_static_arguments():
    fn = jax.jit(lambda a, *, scale: a * scale, static_argnames="scale")
    text = compile_for("v5e", fn, jax.ShapeDtypeStruct((8, 128), jnp.float32), scale=3.0).as_text()
    assert "constant(3)" in text


@needs_compilers
@pytest.mark.parametrize("name", ["v5e", "h100"])
def test_the_persistent_cache_is_left_out(name, tmp_path):
    """It can be written for an absent chip, but not read (jax 0.10.2), which warns every time."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {n: getattr(jax.config, n) for n in names}
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    try:
        for n, value in zip(names, (str(tmp_path), 0.0), strict=True):
            jax.config.update(n, value)
        compilation_cache.reset_cache()
        for _ in range(2):
            compile_for(name, lambda a: a * 2, shape)
            jax.clear_caches()
        assert not list(tmp_path.iterdir())
        jax.jit(lambda a: a * 3)(jnp.ones(8))
        assert list(tmp_path.iterdir()), "the cache works again afterwards"
    finally:
        for n, value in before.items():
            jax.config.update(n, value)
        compilation_cache.reset_cache()


def test_chips_that_there_are_not():
    with pytest.raises(ChipError, match=r"expected one of v4, v5e.*got 'v9'"):
        chip("v9")


def test_a_missing_tpu_compiler_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name)
    )
    with pytest.raises(ChipError, match="v5e needs the TPU compiler: pip install libtpu"):
        chip("v5e")


@pytest.mark.parametrize("there", [None, "0.1.2"])
def test_a_cuda_compiler_of_another_jax_is_refused(there, monkeypatch):
    real = metadata.version

    def version(name):
        if name != "jax-cuda13-plugin":
            return real(name)
        if there is None:
            raise metadata.PackageNotFoundError(name)
        return there

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ChipError) as caught:
        chip("h100")
    for part in (there or "none", f"jax[cuda13-local]=={jax.__version__}", "nvidia-cuda-nvcc"):
        assert part in str(caught.value)


ESTIMATE = """
import json, sys
import jax, jax.numpy as jnp
from ttq_jax.chips import CompileError, estimate

shape = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)

def product(a, b):
    return jnp.dot(a, b)

def far_too_large(a, b):
    from jax.experimental import pallas as pl
    def copy(a, o):
        o[...] = a[...]
    return pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct((65536, 4096), a.dtype))(
        jnp.tile(a, (16, 1)))

fn = {"product": product, "far_too_large": far_too_large}[sys.argv[1]]
try:
    found = estimate("v5e", fn, shape, shape, note=lambda: "asked", limit=float(sys.argv[2]))
    print(json.dumps([found.cycles, found.note, found.aborted]))
except CompileError as e:
    print(json.dumps(str(e)))
"""


def start(tmp_path, *command):
    """A process in a group of its own whose temporary files go to `tmp_path`."""
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def gone(group):
    """Whether no process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


@needs_compilers
@pytest.mark.parametrize(
    ("program", "limit"), [("product", 600), ("far_too_large", 600), ("product", 0.01)]
)
def test_an_estimate_answers_and_leaves_nothing_behind(program, limit, tmp_path):
    process = start(tmp_path, "-c", ESTIMATE, program, str(limit))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    found = json.loads(out)
    if limit < 1:
        assert found == "the compiler took longer than 0.01 s"
    elif program == "product":
        cycles, note, aborted = found
        assert (note, aborted) == ("asked", False)
        # 2 · 4096³ operations at 197 TFLOP/s and 1.5 GHz are 1.05 million cycles.
        assert 0.9e6 < sum(cycles.values()) < 2e6
    else:
        assert "vmem" in found
    assert list(tmp_path.iterdir()) == []
    wait_until(lambda: gone(process.pid))


@needs_compilers
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_takes_the_compiler_and_its_files_with_it(end, tmp_path):
    process = start(tmp_path, "-c", ESTIMATE, "product", "600")
    wait_until(lambda: any(tmp_path.iterdir()))
    process.send_signal(end)
    process.communicate(timeout=60)
    wait_until(lambda: gone(process.pid))
    assert list(tmp_path.iterdir()) == []


# Python drops an exception that a fork's hook raises; a Ctrl-C that comes just then is such a one.
CTRL_C_IN_A_FORK = """
import os, signal
os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGINT))
"""


@needs_compilers
def test_ctrl_c_during_the_fork_is_not_lost(tmp_path):
    process = start(tmp_path, "-c", CTRL_C_IN_A_FORK + ESTIMATE, "product", "600")
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert out == ""
    assert err.splitlines()[-1].startswith("KeyboardInterrupt")
    wait_until(lambda: gone(process.pid))
    assert list(tmp_path.iterdir()) == []


@needs_compilers
def test_ctrl_c_ends_a_sweep_with_all_that_it_started(tmp_path):
    process = start(tmp_path, "-m", "ttq_jax", "bench", "kernels", "--chip", "v5e")
    wait_until(lambda: any(tmp_path.iterdir()))
    # A terminal's Ctrl-C reaches the whole group.
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "interrupted" in err
    assert "Traceback" not in err
    wait_until(lambda: gone(process.pid))
    assert list(tmp_path.iterdir()) == []

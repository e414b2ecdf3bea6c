"""A TPU's cycle estimates answer, and leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compilers import needs_compilers

ROOT = Path(__file__).parents[2]

ESTIMATE = """
import json, sys
import jax, jax.numpy as jnp
from ttq_jax.chips.cycles import CompileError, estimate

shape = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16)

def product(a, b):
    return jnp.dot(a, b)

def far_too_large(a, b):
    from jax.experimental import pallas as pl
    def copy(a, o):
        o[...] = a[...]
    return pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct((32768, 2048), a.dtype))(
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
        # 2 · 2048³ operations at 197 TFLOP/s and 1.5 GHz are 131 thousand cycles.
        assert 0.1125e6 < sum(cycles.values()) < 0.25e6
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

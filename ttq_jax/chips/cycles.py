"""Cycle estimates by the TPU compiler, on any machine.

It simulates the final instruction bundles of a kernel: static cycles, with a latency model of the
memory but none of its contention. No estimate here was checked on hardware.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import select
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ttq_jax.chips.absent import ChipError, chip, compile_for, device, tracing_for


class CompileError(RuntimeError):
    """A program that a compiler refuses; the message is the compiler's."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The compiler's estimate of a program.

    Attributes:
      cycles: by operation, Pallas kernels by their name.
      note: what `note` returned.
      aborted: whether the profiler aborted, so that operations may be missing.
    """

    cycles: dict[str, int]
    note: str
    aborted: bool = False


def estimate(
    name: str,
    fn: Callable[..., Any],
    *shapes: Any,
    note: Callable[[], str] = str,
    limit: float = 600.0,
) -> Estimate:
    """Static cycles of a TPU program's operations.

    Runs in a child process: the compiler reads the option once, when it is loaded, and on some
    programs its profiler aborts. The parent must not have loaded the TPU compiler yet. A second
    child between the two outlives this process for a moment, however this ends: it stops the
    compiler and removes its files.

    Args:
      name: a TPU of `CHIPS` with a `bytes_per_cycle`.
      fn: to be compiled.
      *shapes: its arguments, as for `compile_for`.
      note: called while tracing for the chip.
      limit: seconds after which the compiler is stopped.

    Returns:
      The estimate.

    Raises:
      ChipError: the chip is unknown, has no estimate, or its compiler is not installed.
      CompileError: the program does not compile, or not within `limit`.
      RuntimeError: this process has loaded a compiler already.
    """
    if chip(name).bytes_per_cycle is None:
        raise ChipError(f"{name}: its compiler gives no cycle estimates")
    if device.cache_info().currsize:
        raise RuntimeError(
            "estimate: this process has loaded a compiler already; call estimate first, or in a "
            "new process"
        )
    alive, hold = os.pipe()
    read, write = os.pipe()
    pid = None
    try:
        with _interrupts_held():
            pid = _fork()
            if pid == 0:
                os.close(hold)
                os.close(read)
                compiling = functools.partial(_compile_and_leave, name, fn, shapes, note)
                _watch(compiling, alive, write, limit)
            os.close(alive)
            os.close(write)
        with os.fdopen(read, "rb") as pipe:
            found = json.loads(pipe.read() or b'{"error": "the compiler\'s process was killed"}')
    finally:
        os.close(hold)
        if pid:
            os.waitpid(pid, 0)
    if "error" in found:
        raise CompileError(found["error"])
    return Estimate(**found)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Holds a Ctrl-C back to the end: Python drops an exception raised in a fork's hooks."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda *at: came.append(at))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        before(*came[0])


def _fork() -> int:
    with warnings.catch_warnings():
        # What is forked compiles and leaves; it never waits for a thread of the parent.
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        return os.fork()


def _watch(
    compile_in: Callable[[str, int], None], alive: int, write: int, limit: float
) -> NoReturn:
    """Runs the compiler in a process of its own and reports; the end of `alive` stops both."""
    # Ctrl-C reaches the whole group, but only the parent's end decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    directory = tempfile.mkdtemp(prefix="ttq-")
    try:
        said, say = os.pipe()
        pid = _fork()
        if pid == 0:
            compile_in(directory, say)
        os.close(say)
        found, deadline = b"", time.monotonic() + limit
        while True:
            left = max(0.0, deadline - time.monotonic())
            ready = select.select([said, alive], [], [], left)[0]
            part = os.read(said, 65536) if said in ready else b""
            found += part
            if not part:
                break
        result: dict[str, Any] = {"note": ""}
        for line in found.splitlines():
            result |= json.loads(line)
        if said not in ready:
            os.kill(pid, signal.SIGKILL)
            result["error"] = f"the compiler took longer than {limit:g} s"
        result["aborted"] = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        result["cycles"] = _profile(directory)
        if alive not in ready:
            os.write(write, json.dumps(result).encode())
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os._exit(0)


def _profile(directory: str) -> dict[str, int]:
    """Cycles by operation, from the files that the compiler wrote."""
    found: dict[str, int] = {}
    for path in Path(directory).glob("*profile.textproto"):
        text = path.read_text()
        for m in re.finditer(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)', text):
            found[m.group(1)] = int(m.group(2))
    return found


def _compile_and_leave(
    name: str, fn: Callable[..., Any], shapes: Any, note: Callable[[], str], directory: str,
    write: int,
) -> NoReturn:  # fmt: skip
    """The innermost child's part of `estimate`: writes a JSON object per line."""

    def say(**what: str) -> None:
        os.write(write, json.dumps(what).encode() + b"\n")

    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.environ["TPU_LOG_DIR"] = directory
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_static_llo_profile_to={directory} "
            + os.environ.get("LIBTPU_INIT_ARGS", "")
        )
        with tracing_for(name):
            say(note=note())
        compile_for(name, fn, *shapes)
    except BaseException as e:
        say(error=str(e)[:4000] or type(e).__name__)
    os._exit(0)

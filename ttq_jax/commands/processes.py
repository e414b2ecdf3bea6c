"""One command in several processes, such as one on each host of a slice."""

import argparse
import contextlib
import os
import re
import sys
from pathlib import Path

import jax

from ttq_jax.config import ConfigError
from ttq_jax.errors import shown
from ttq_jax.processes import everyone, meet

_FAREWELL_S = 10


def join(processes: str | None, mesh: str | None) -> None:
    """Joins the processes that run this command together, before jax looks for devices.

    Args:
      processes: "auto", or "HOST:PORT,COUNT,INDEX"; None for a process by itself.
      mesh: what they share the model on.

    Raises:
      ConfigError: another form, no mesh, or the others are not found.
    """
    if processes is None:
        return
    if mesh is None:
        raise ConfigError("--processes: expected --mesh beside it, over the devices of them all")
    form = re.fullmatch(r"(.+:\d+),(\d+),(\d+)", processes)
    if processes != "auto" and (form is None or int(form[3]) >= int(form[2])):
        raise ConfigError(
            "--processes: expected auto, or HOST:PORT,COUNT,INDEX with INDEX below COUNT, such as "
            f"10.0.0.1:1234,4,0, got {shown(processes)}"
        )
    given = () if form is None else (form[1], int(form[2]), int(form[3]))
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as e:
        first = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ConfigError(
            f"--processes {processes}: the processes did not find each other ({first}); on a "
            "cluster that JAX does not know give HOST:PORT,COUNT,INDEX, HOST being the first's"
        ) from e
    # What carries messages between CPUs greets on stdout, which is for results.
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(own, "w", encoding="utf-8")


# May differ: what only says how a process runs, and names of files; what is read of them is
# compared.
_OWN = {"processes", "quiet", "debug", "json", "cache_dir", "no_compilation_cache"}
_FILES = {
    "model", "method", "file", "prompts_file", "corpus", "calibration", "out", "save_recipe",
}  # fmt: skip


def begin_together(args: argparse.Namespace) -> None:
    """Begins a command that runs in several processes: the first alone prints results.

    Args:
      args: the command's options.

    Raises:
      ConfigError: another process has other options.
    """
    given = {k: repr(v) for k, v in sorted(vars(args).items()) if k not in _OWN | _FILES}
    first, *others = everyone("the options", given)
    for index, other in enumerate(others, 1):
        for name in first.keys() | other.keys():
            one, two = first.get(name), other.get(name)
            if one != two:
                raise ConfigError(
                    f"--processes: expected the same options in every process, got {name} {one} "
                    f"in the first and {two} in process {index}; start all of them alike"
                )
    if jax.process_index():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def end_failed(code: int) -> None:
    """Ends a command that failed at once, unless the other processes fail with it.

    JAX would have this process wait for the others to end, and they wait for it.

    Args:
      code: the exit code.
    """
    if jax.distributed.is_initialized() and not meet("the end", _FAREWELL_S):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

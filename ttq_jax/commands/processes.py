"""One command in several processes, such as one on each host of a slice."""

import os
import re
import sys
from pathlib import Path

import jax

from ttq_jax.config import ConfigError
from ttq_jax.errors import shown


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


def first_speaks() -> None:
    """Lets the first process alone print results."""
    if jax.process_index():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115

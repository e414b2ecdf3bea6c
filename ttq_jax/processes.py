"""What the processes of one program tell each other, so that they act alike or stop alike.

A program over the devices of several processes waits for all of them. A process that fails by
itself, or reads another file, would leave the others waiting, or change their results unseen. So
they meet first, by JAX's coordination service and not by their devices, which wait within time; and
only then exchange what they have to say. A process by itself meets nobody, and all of this is free.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from ttq_jax.config import ConfigError
from ttq_jax.errors import shown

PATIENCE_S = 300
"""Seconds for which a process waits for the others."""

_T = TypeVar("_T")
_MEETINGS = itertools.count()


class ApartError(ConfigError):
    """The processes are no longer at the same place of the program; it cannot go on."""


def meet(place: str, seconds: float) -> bool:
    """Waits until every process is here.

    Args:
      place: in the same words in every process.
      seconds: to wait for the others.

    Returns:
      Whether they came.
    """
    # Takes seconds to import.
    from orbax.checkpoint.multihost import get_barrier_sync_fn  # type: ignore[import-untyped]

    try:
        get_barrier_sync_fn()(key=f"ttq_jax {place}", timeout_ms=int(1000 * seconds))
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _exchanged(own: bytes) -> list[bytes]:
    """What every process sends, in the order of the processes.

    Raises:
      ApartError: not all of them came.
    """
    if not meet(f"meeting {next(_MEETINGS)}", PATIENCE_S):
        raise ApartError(f"one did not come within {PATIENCE_S} seconds")
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(own))))
    # Powers of two: each size is a program of its own.
    room = np.zeros(1 << int(lengths.max() - 1).bit_length(), np.uint8)
    room[: len(own)] = np.frombuffer(own, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(room))
    return [bytes(row[:n]) for row, n in zip(rows, lengths, strict=True)]


def several() -> bool:
    """Whether this process is one of several of a program."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def everyone(what: str, value: Any) -> list[Any]:
    """What every process has, in every process.

    Args:
      what: it is, in the same words in every process.
      value: JSON data.

    Returns:
      The values, in the order of the processes.

    Raises:
      ApartError: another process did not come, or is at another place of the program.
    """
    if not several():
        return [value]
    at = f"process {jax.process_index()} of {jax.process_count()} is at {what}"
    mend = "look at what the others say, and start all of them again"
    try:
        places, values = zip(
            *map(json.loads, _exchanged(json.dumps([what, value]).encode())), strict=True
        )
    except ApartError as e:
        raise ApartError(f"{at}, and {e}; {mend}") from e
    if set(places) != {what}:
        others = ", ".join(sorted(set(places) - {what}))
        raise ApartError(f"{at}, and another at {others}; {mend}")
    return list(values)


def alike(what: str, run: Callable[[], _T]) -> _T:
    """Runs the same in every process; what fails in one of them fails in all.

    Args:
      what: is run, for messages.
      run: it.

    Returns:
      What it returns, in each process its own.

    Raises:
      Exception: what it raised here.
      ConfigError: it failed in another process.
      ApartError: another process is not at its end.
    """
    failure = None
    try:
        made = run()
    except Exception as e:
        failure = e
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    try:
        said = everyone(what, text)
    except ApartError as e:
        raise e if failure is None else ApartError(f"{e}; here it failed ({text})") from failure
    if failure is not None:
        raise failure
    for index, theirs in enumerate(said):
        if theirs is not None:
            raise ConfigError(f"{what}: failed in process {index} of {len(said)} ({theirs})")
    return made


def of_first(what: str, make: Callable[[], _T]) -> _T:
    """What the first process makes, in every process.

    Args:
      what: it makes, for messages.
      make: of JSON data.

    Returns:
      It.

    Raises:
      Exception: see `alike`.
    """
    own = alike(what, lambda: make() if jax.process_index() == 0 else None)
    return cast(_T, everyone(what, own)[0])


def expect_same(what: str, value: Any) -> None:
    """Refuses a difference between processes that would change results.

    Args:
      what: is to be the same, for the message.
      value: of this process, JSON data.

    Raises:
      ConfigError: another process has another value.
      ApartError: another process is at another place.
    """
    first, *others = everyone(what, value)
    for index, other in enumerate(others, 1):
        if other != first:
            raise ConfigError(
                f"{what}: expected the same in every process, got {shown(first)} in the first and "
                f"{shown(other)} in process {index}; start all of them alike, on the same files"
            )

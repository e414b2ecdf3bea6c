"""A GGUF model that is split over several files, as llama.cpp's tools write it and hubs have it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.errors import shown

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def part_name(name: str, number: int, count: int) -> str:
    """The file name of a part, counted from 1, as llama.cpp's tools and the hubs have it."""
    return f"{name}-{number:05}-of-{count:05}.gguf"


def named_parts(path: Path) -> tuple[Path, ...]:
    """The files that belong together by their names.

    Args:
      path: of any of them.

    Returns:
      All, whether they exist or not, in their order; (path,) if its name is not that of a part.
    """
    for one in (path, path.resolve()):
        found = _PART.fullmatch(one.name)
        if found and 1 <= int(found[2]) <= int(found[3]):
            count = int(found[3])
            return tuple(one.with_name(part_name(found[1], i + 1, count)) for i in range(count))
    return (path,)


def check_part(path: Path, header: Mapping[str, Any], i: int, count: int) -> None:
    """Checks that a file is the i-th of `count` parts; a whole file is the only one.

    Args:
      path: of the file.
      header: its metadata.
      i: counted from 0.
      count: of all parts.

    Raises:
      CheckpointError: its header says otherwise.
    """
    number, parts = header.get("split.no", 0), header.get("split.count", 1)
    # The tool that joins parts writes a count of 0.
    whole = type(parts) is int and type(number) is int and max(parts, 1) == count
    if whole and (count == 1 or number == i):
        return
    raise CheckpointError(
        f"{path}: expected {f'part {i + 1} of {count}' if count > 1 else 'a whole model'}, but by "
        f"its header it is part {shown(number)}, counted from 0, of {shown(parts)}. Put all parts "
        f"into one directory, under names such as {part_name('NAME', 1, 3)}"
    )

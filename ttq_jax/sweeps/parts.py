"""The parts of which a report is made."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from ttq_jax.sweeps.looks import Drawing


@dataclasses.dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells under a header.

    Attributes:
      header: names of the columns.
      rows: cells, as many as the header.
      best: (row, column) of the cells that are marked as best.
      left: columns of text, the others are numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    left: int = 1


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawing.

    Attributes:
      name: of its files, without ending.
      drawing: the files.
      caption: what it shows; also its alternative text.
    """

    name: str
    drawing: Drawing
    caption: str


Part = Heading | Text | Table | Picture


def slug(text: str) -> str:
    """A text as a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()


def tables(parts: Sequence[Part]) -> Iterator[tuple[str, Table]]:
    """Every table with the title that stands above it."""
    title = ""
    for part in parts:
        if isinstance(part, Heading):
            title = part.text
        if isinstance(part, Table):
            yield title, part

"""The parts of a report, and its two files: Markdown and self-contained HTML.

Both hold the same text, tables and pictures, in the same order.
"""

import base64
import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path

from ttq_jax.files import write_files


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
      best: (row, column) of the cells that are the best of their column.
      left: columns of text, the others are numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    left: int = 1


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
      name: of its file, beside the Markdown.
      png: its bytes.
      caption: what it shows; also its alternative text.
    """

    name: str
    png: bytes
    caption: str


Part = Heading | Text | Table | Picture

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #111; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ccc; text-align: right; }
th { border-bottom: 2px solid #555; vertical-align: bottom; }
.left { text-align: left; }
.best { font-weight: 700; background: #e8f1f8; }
img { max-width: 100%; }
figcaption { font-size: 13px; color: #444; }
.wide { overflow-x: auto; }
@media print {
  body { font-size: 10pt; } h2 { break-after: avoid; } figure { break-inside: avoid; }
}
"""


def _html(part: Part) -> str:
    if isinstance(part, Heading):
        return f"<h{part.level}>{html.escape(part.text)}</h{part.level}>"
    if isinstance(part, Text):
        return f"<p>{html.escape(part.text)}</p>"
    if isinstance(part, Picture):
        data, caption = base64.b64encode(part.png).decode(), html.escape(part.caption)
        return (
            f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )

    def cell(tag: str, i: int, j: int, text: str) -> str:
        kinds = ["left"] * (j < part.left) + ["best"] * ((i, j) in part.best)
        mark = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{tag}{mark}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", -1, j, name) for j, name in enumerate(part.header))
    body = "\n".join(
        "<tr>" + "".join(cell("td", i, j, text) for j, text in enumerate(row)) + "</tr>"
        for i, row in enumerate(part.rows)
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table></div>"
    )


def to_html(title: str, parts: Sequence[Part]) -> str:
    """One file that needs no other.

    Args:
      title: of the page.
      parts: in their order.

    Returns:
      HTML.
    """
    body = "\n".join(map(_html, parts))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _markdown(part: Part, pictures: str) -> str:
    if isinstance(part, Heading):
        return f"{'#' * part.level} {part.text}"
    if isinstance(part, Text):
        return part.text
    if isinstance(part, Picture):
        return f"![{part.caption}]({pictures}/{part.name})\n\n*{part.caption}*"

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |"

    rows = [
        [f"**{c}**" if (i, j) in part.best else c for j, c in enumerate(row)]
        for i, row in enumerate(part.rows)
    ]
    rule = ["---" if j < part.left else "---:" for j in range(len(part.header))]
    return "\n".join([line(part.header), line(rule), *map(line, rows)])


def to_markdown(title: str, parts: Sequence[Part], pictures: str) -> str:
    """The same as Markdown.

    Args:
      title: of the page.
      parts: in their order.
      pictures: directory of the pictures, seen from the file.

    Returns:
      Markdown.
    """
    return "\n\n".join([f"# {title}", *(_markdown(part, pictures) for part in parts)]) + "\n"


def write(directory: Path, title: str, parts: Sequence[Part]) -> list[Path]:
    """Writes `report.html`, `report.md` and the latter's pictures; all of them or none.

    Args:
      directory: an existing one; pictures of an earlier report in it are removed.
      title: of the page.
      parts: in their order.

    Returns:
      The two files.
    """
    pictures = directory / "report"
    made = {part.name: part.png for part in parts if isinstance(part, Picture)}
    contents: dict[Path, bytes] = {pictures / name: png for name, png in made.items()}
    contents[directory / "report.md"] = to_markdown(title, parts, pictures.name).encode()
    contents[directory / "report.html"] = to_html(title, parts).encode()
    write_files(contents, parents=True)
    for old in pictures.glob("*.png"):
        if old.name not in made:
            old.unlink()
    return [directory / "report.html", directory / "report.md"]

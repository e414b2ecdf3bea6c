"""A report's files: a self-contained page, Markdown, LaTeX, CSV and pictures.

All hold the same tables in the same order. The same rows make the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path

from ttq_jax.files import write_files
from ttq_jax.sweeps.html_page import to_html
from ttq_jax.sweeps.parts import Part, Picture
from ttq_jax.sweeps.text_page import to_csv, to_markdown, to_tex


def files_of(title: str, parts: Sequence[Part]) -> dict[str, bytes]:
    """A report's files.

    Args:
      title: of the report.
      parts: in their order.

    Returns:
      Path inside the directory -> contents; the page and the Markdown are the last two.
    """
    files = {}
    for part in parts:
        if isinstance(part, Picture):
            files[f"report/{part.name}.svg"] = part.drawing.svg
            files[f"report/{part.name}.pdf"] = part.drawing.pdf
    files["report.tex"] = to_tex(title, parts).encode()
    files["report.csv"] = to_csv(parts).encode()
    files["report.html"] = to_html(title, parts).encode()
    files["report.md"] = to_markdown(title, parts, "report").encode()
    return files


def write(directory: Path, title: str, parts: Sequence[Part]) -> list[Path]:
    """Writes a report: all of its files, or none.

    Args:
      directory: an existing one; pictures of an earlier report in it are removed.
      title: of the report.
      parts: in their order.

    Returns:
      The page, and the Markdown.
    """
    files = files_of(title, parts)
    write_files({directory / name: data for name, data in files.items()}, parents=True)
    for old in (directory / "report").glob("*"):
        if old.suffix in {".png", ".svg", ".pdf"} and f"report/{old.name}" not in files:
            old.unlink()
    return [directory / "report.html", directory / "report.md"]

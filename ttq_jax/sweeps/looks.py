"""How every picture of this project looks, and its files.

A method has one colour and one marker everywhere. The colours are Okabe and Ito's, which
colour-blind readers can tell apart, and two more; the markers can be told apart in grey.
"""

import dataclasses
import io
from pathlib import Path
from typing import Any

from ttq_jax.files import write_files

_COLOURS = {
    "fast": ("#0072B2", "o"), "best": ("#009E73", "^"), "ttq": ("#E69F00", "D"),
    "paper": ("#D55E00", "s"), "awq": ("#CC79A7", "v"), "gptq": ("#1A1A1A", "P"),
    "rtn": ("#8C8C8C", "X"), "hqq": ("#8C564B", "<"),
}  # fmt: skip
_OWN = ("#56B4E9", "*")
_DASHES = ("-", "--", "-.", ":")
_FILLS = ("full", "none", "left", "right")

# Text and lines; the paper. In a dark page a style sheet exchanges both, see `_SHEET`.
INK, PAPER, FAINT = "#1A1A1A", "#FDFDFD", "#8A8A8A"
_DARK = {INK: "#E6E6E6", PAPER: "#161616"}

# Inches; a picture is shown at this size or larger, and printed at it.
WIDTH = 4.4

_RC: dict[Any, Any] = {
    "font.size": 8.5, "axes.titlesize": 8.5, "axes.labelsize": 8.5, "legend.fontsize": 8,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "figure.facecolor": PAPER,
    "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "legend.frameon": False,
    "legend.facecolor": PAPER, "legend.handlelength": 3.0, "grid.color": FAINT, "grid.alpha": 0.35,
    "grid.linewidth": 0.6, "axes.titlelocation": "left", "lines.linewidth": 1.3,
    "lines.markersize": 5, "figure.constrained_layout.use": True,
    # The same picture has the same bytes.
    "svg.hashsalt": "ttq", "svg.fonttype": "path", "pdf.fonttype": 42, "path.simplify": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One picture in two formats.

    Attributes:
      svg: for pages; it follows their light or dark scheme.
      pdf: for papers.
    """

    svg: bytes
    pdf: bytes


def pyplot() -> Any:
    """The interface of matplotlib, set to this project's look."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcdefaults()
    plt.rcParams.update(_RC)
    return plt


def look(method: str, before: int = 0) -> dict[str, Any]:
    """A line's colour and marker by its method; dashes and filling tell its lines apart.

    Args:
      method: a recipe's name, or a file's.
      before: lines of that method that are in the picture already.

    Returns:
      Keywords for `plot` and `errorbar`.
    """
    colour, marker = _COLOURS.get(method, _OWN)
    return {
        "color": colour, "marker": marker, "linestyle": _DASHES[before % len(_DASHES)],
        "fillstyle": _FILLS[before % len(_FILLS)],
    }  # fmt: skip


def _sheet() -> str:
    """The style sheet by which a picture follows a dark scheme."""
    rules = [
        f'*[style*="{key}: {light.lower()}"]{{{key}:{dark} !important}}'
        for light, dark in _DARK.items()
        for key in ("fill", "stroke")
    ]
    return f"<style>@media screen and (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"


def finish(figure: Any) -> Drawing:
    """Draws a figure and closes it.

    Args:
      figure: matplotlib's.

    Returns:
      Its files; the same for the same figure, matplotlib and fonts.
    """
    svg, pdf = io.BytesIO(), io.BytesIO()
    size = {"bbox_inches": "tight", "pad_inches": 0.05}
    figure.savefig(svg, format="svg", metadata={"Date": None}, **size)
    figure.savefig(pdf, format="pdf", metadata={"CreationDate": None}, **size)
    pyplot().close(figure)
    text = svg.getvalue().decode()
    at = text.index(">", text.index("<svg ")) + 1
    return Drawing((text[:at] + _sheet() + text[at:]).encode(), pdf.getvalue())


def save(figure: Any, path: Path) -> None:
    """Writes a picture as SVG, and as PDF beside it.

    Args:
      figure: matplotlib's; it is closed.
      path: of the SVG.
    """
    drawing = finish(figure)
    write_files({path.with_suffix(".svg"): drawing.svg, path.with_suffix(".pdf"): drawing.pdf})

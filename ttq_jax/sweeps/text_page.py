"""A report as text: Markdown, LaTeX tables and CSV."""

import csv
import io
from collections.abc import Sequence

from ttq_jax.sweeps.parts import Heading, Part, Picture, Text, slug, tables


def _markdown(part: Part, pictures: str) -> str:
    if isinstance(part, Heading):
        return f"{'#' * part.level} {part.text}"
    if isinstance(part, Text):
        return part.text
    if isinstance(part, Picture):
        return f"![{part.caption}]({pictures}/{part.name}.svg)\n\n*{part.caption}*"

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |"

    rows = [
        [f"**{c}**" if (i, j) in part.best else c for j, c in enumerate(row)]
        for i, row in enumerate(part.rows)
    ]
    rule = ["---" if j < part.left else "---:" for j in range(len(part.header))]
    return "\n".join([line(part.header), line(rule), *map(line, rows)])


def to_markdown(title: str, parts: Sequence[Part], pictures: str) -> str:
    """The report as Markdown.

    Args:
      title: of the page.
      parts: in their order.
      pictures: directory of the pictures, seen from the file.

    Returns:
      Markdown.
    """
    return "\n\n".join([f"# {title}", *(_markdown(part, pictures) for part in parts)]) + "\n"


_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "α": r"$\alpha$",
    "λ": r"$\lambda$", "–": "--", "—": "---", "×": r"$\times$", "†": r"\dag{}",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


def to_tex(title: str, parts: Sequence[Part]) -> str:
    """The tables for a paper, in booktabs' style.

    Args:
      title: of the report.
      parts: in their order; only tables are taken.

    Returns:
      LaTeX, for an input command.
    """
    made = [f"% {title}. In the preamble: \\usepackage{{booktabs}}"]
    for i, (name, table) in enumerate(tables(parts), 1):
        body = [
            " & ".join(
                rf"\textbf{{{_tex(c)}}}" if (n, j) in table.best else _tex(c)
                for j, c in enumerate(row)
            )
            for n, row in enumerate(table.rows)
        ]
        columns = "l" * table.left + "r" * (len(table.header) - table.left)
        made.append("\n".join([
            r"\begin{table}", r"\centering\small", rf"\caption{{{_tex(name)}}}",
            rf"\label{{tab:{i}-{slug(name)}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
            " & ".join(map(_tex, table.header)) + r" \\", r"\midrule",
            *(f"{line} \\\\" for line in body), r"\bottomrule", r"\end{tabular}", r"\end{table}",
        ]))  # fmt: skip
    return "\n\n".join(made) + "\n"


def to_csv(parts: Sequence[Part]) -> str:
    """Every cell of every table in a line of its own, which programs read as one table.

    Args:
      parts: in their order; only tables are taken.

    Returns:
      CSV with the columns table, row (from 1), label (the row's first cell), column and value.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "row", "label", "column", "value"])
    for name, table in tables(parts):
        for i, row in enumerate(table.rows, 1):
            for column, cell in zip(table.header[1:], row[1:], strict=True):
                writer.writerow([name, i, row[0], column, cell])
    return out.getvalue()

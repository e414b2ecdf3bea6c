"""A report as one HTML file that needs no other: for screens of 390 pixels and up, and for paper.

It follows the reader's light or dark scheme. Without its script, which sorts tables, nothing but
the sorting is missing.
"""

import base64
import html
from collections.abc import Sequence

from ttq_jax.sweeps.parts import Heading, Part, Picture, Table, Text, slug

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #555; --paper: #fdfdfd; --rule: #ccc;
        --mark: #dcebf7; --link: #0060a0; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #aaa; --paper: #161616; --rule: #444; --mark: #1d3b52;
          --link: #7cc0f0; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto;
       padding: 1rem 1rem 4rem; color: var(--ink); background: var(--paper);
       overflow-wrap: anywhere; }
p, nav, figcaption { max-width: 44rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
h1, h2, h3 { line-height: 1.25; }
a { color: var(--link); }
nav ul { list-style: none; padding: 0; margin: .5rem 0; } nav li { margin: .2rem 0; }
nav .sub { padding-left: 1.2rem; font-size: .9rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
.wide:focus-visible, button:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--rule); text-align: right;
         overflow-wrap: normal; }
td { white-space: nowrap; }
th { border-bottom: 2px solid var(--soft); vertical-align: bottom; }
.left { text-align: left; white-space: normal; max-width: 26rem;
        overflow-wrap: break-word; }
td.left:first-child { min-width: 8rem; } td.left:nth-child(4) { min-width: 15rem; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--paper); }
.best { font-weight: 700; background: var(--mark); }
th button { all: unset; cursor: pointer; }
th button::after { content: "\\a0\\2195"; color: var(--soft); font-weight: 400; }
th[aria-sort=ascending] button::after { content: "\\a0\\2191"; color: inherit; }
th[aria-sort=descending] button::after { content: "\\a0\\2193"; color: inherit; }
figure { margin: 1.2rem 0; }
img { display: block; width: 100%; max-width: 36rem; height: auto; }
figcaption { font-size: .84rem; color: var(--soft); margin-top: .4rem; }
@media (max-width: 40rem) { .left { max-width: 11rem; } td:first-child.left { max-width: 9rem; } }
@media print {
  body { font-size: 9.5pt; max-width: none; padding: 0; } nav { display: none; }
  h2, h3 { break-after: avoid; } figure, tr { break-inside: avoid; }
  .wide { overflow: visible; } th button::after { content: none !important; }
  td { white-space: normal; } img { max-width: 4.4in; }
  td:first-child, th:first-child { position: static; }
}
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, at) => {
    if (!head.textContent) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const text = row => row.cells[at].textContent;
      const order = (a, b) => {
        const [x, y] = [text(a), text(b)], [p, q] = [parseFloat(x), parseFloat(y)];
        if (!x || !y) return !x - !y;
        const found = isNaN(p) || isNaN(q) ? x.localeCompare(y) : p - q;
        return up ? found : -found;
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
"""


def _table(table: Table, title: str) -> str:
    def cell(tag: str, i: int, j: int, text: str) -> str:
        kinds = ["left"] * (j < table.left) + ["best"] * ((i, j) in table.best)
        mark = f' class="{" ".join(kinds)}"' if kinds else ""
        scope = ' scope="col"' if tag == "th" else ""
        shown = html.escape(text)
        # A narrow column would break its name at the hyphen.
        shown = shown.replace("-", "\u2011") if tag == "th" else shown
        return f"<{tag}{scope}{mark}>{shown}</{tag}>"

    head = "".join(cell("th", -1, j, name) for j, name in enumerate(table.header))
    body = "\n".join(
        "<tr>" + "".join(cell("td", i, j, text) for j, text in enumerate(row)) + "</tr>"
        for i, row in enumerate(table.rows)
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{html.escape(title)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _picture(part: Picture) -> str:
    data, caption = base64.b64encode(part.drawing.svg).decode(), html.escape(part.caption)
    return (
        f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def to_html(title: str, parts: Sequence[Part]) -> str:
    """One file that needs no other.

    Args:
      title: of the page.
      parts: in their order.

    Returns:
      HTML.
    """
    above, body = title, list[str]()
    contents = list[str]()
    for part in parts:
        if isinstance(part, Heading):
            above, name = part.text, f"{len(contents) + 1}-{slug(part.text)}"
            text, kind = html.escape(above), ' class="sub"' * (part.level > 2)
            contents.append(f'<li{kind}><a href="#{name}">{text}</a></li>')
            body.append(f'<h{part.level} id="{name}">{text}</h{part.level}>')
        elif isinstance(part, Text):
            body.append(f"<p>{html.escape(part.text)}</p>")
        elif isinstance(part, Picture):
            body.append(_picture(part))
        else:
            body.append(_table(part, above))
    said = html.escape(title)
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{said}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{said}</h1>",
        f'<nav aria-label="Contents"><ul>\n{"".join(contents)}\n</ul></nav>',
        *body, f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
    ])  # fmt: skip

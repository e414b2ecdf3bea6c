"""A report's files: they can be opened anywhere, and hold the same tables."""

import base64
import csv
import html.parser
import json
import re
import sys

import pytest
from report_rows import report_of, sweep_rows, write_rows
from report_tables import table_under

from ttq_jax.commands.main import main
from ttq_jax.sweeps.parts import Heading, Table, Text
from ttq_jax.sweeps.text_page import to_csv, to_tex


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    report_of(directory, sweep_rows())
    return directory


class Checked(html.parser.HTMLParser):
    """Every tag is closed in its order; what is referred to, and what is said, is kept."""

    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.images = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "href"}:
                self.links.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_no_network_and_shows_the_kept_pictures(made):
    text = (made / "report.html").read_text("utf-8")
    page = Checked()
    page.feed(text)
    page.close()
    assert not page.open
    inside = [link for link in page.links if link.startswith("#")]
    assert {f'id="{link[1:]}"' in text for link in inside} == {True}
    images = [link for link in page.links if link not in inside]
    assert len(images) == 2
    assert not re.search(r"https?://|url\(|<script [^>]*src", text)
    kept = {path.read_bytes() for path in (made / "report").glob("*.svg")}
    for link in images:
        assert base64.b64decode(link.removeprefix("data:image/svg+xml;base64,")) in kept
    markdown = (made / "report.md").read_text("utf-8")
    for name in re.findall(r"\((report/.*?)\)", markdown):
        assert (made / name).exists()
        assert (made / name).with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_latex_and_csv_have_every_table(made):
    text = (made / "report.md").read_text("utf-8")
    tables = len(re.findall(r"^\| ---", text, re.M))
    tex = (made / "report.tex").read_text("utf-8")
    for part in (r"\begin{tabular}", r"\toprule", r"\bottomrule", r"\end{table}"):
        assert tex.count(part) == tables
    assert len(set(re.findall(r"\\label{(.*?)}", tex))) == tables
    rows = list(csv.DictReader((made / "report.csv").read_text("utf-8").splitlines()))
    header, *body = table_under(text, "Results: m")
    shown = [[r["value"] for r in rows if r["table"].startswith("Results: m") and
              r["column"] == column] for column in header[1:]]  # fmt: skip
    want = [[cell.strip("*") for cell in column] for column in zip(*body, strict=True)][1:]
    assert shown == want


def test_latex_escapes_what_it_would_read_as_a_command():
    table = Table(["a_b", "5 %"], [["{x} & \\y", "α <1>"]], frozenset({(0, 1)}))
    tex = to_tex("t", [Heading("H #1"), Text("not in it"), table])
    assert r"\caption{H \#1}" in tex
    assert r"a\_b & 5 \% \\" in tex
    assert r"\{x\} \& \textbackslash{}y & \textbf{$\alpha$ \textless{}1\textgreater{}} \\" in tex
    assert "not in it" not in tex
    assert to_csv([Heading("H"), table]).splitlines()[1] == "H,1,{x} & \\y,5 %,α <1>"


def test_failed_cells_are_listed_and_markup_is_escaped(made):
    header, *body = table_under((made / "report.md").read_text(), "Failed cells")
    assert header == ["cell", "error"]
    assert [cells[1] for cells in body] == [r"Oops: a b \| c"]
    assert "of which 1 failed (listed below)" in (made / "report.md").read_text()


def test_directories_are_reported_together_and_old_pictures_go(tmp_path, capsys):
    rows = sweep_rows()
    for name, part in (("a", rows[::2]), ("b", rows[1::2])):
        write_rows(tmp_path / name, part)
    (tmp_path / "a" / "report").mkdir()
    (tmp_path / "a" / "report" / "old.svg").write_bytes(b"")
    words = ["report", str(tmp_path / "a"), str(tmp_path / "b"), "--json", "--quiet"]
    assert main([*words, "--no-compilation-cache"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == len(rows)
    assert not (tmp_path / "b" / "report.html").exists()
    assert len(table_under((tmp_path / "a" / "report.md").read_text(), "Results")) == 17
    assert not (tmp_path / "a" / "report" / "old.svg").exists()


def test_bad_input(tmp_path, capsys, monkeypatch):
    def said(*words):
        assert main([*words, "--no-compilation-cache", "--quiet"]) == 2
        return capsys.readouterr().err

    assert "expected the rows of a sweep (rows.jsonl), found none" in said("report", str(tmp_path))
    write_rows(tmp_path / "s", sweep_rows())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "ttq-jax[plots]"' in said("report", str(tmp_path / "s"))

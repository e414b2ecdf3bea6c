"""Every number of `experiments/RESULTS.md` is the one that the committed result files make."""

import re
from pathlib import Path

import evidence_codes  # noqa: F401  registers its claims
import evidence_paper  # noqa: F401  registers its claims
import evidence_speed  # noqa: F401  and these
import pytest
from evidence import EVIDENCE
from kept import read

ROOT = Path(__file__).parents[2]


def sections(path):
    """{heading: text} of a Markdown file's second level."""
    parts = re.split(r"^## ", (ROOT / path).read_text(), flags=re.M)[1:]
    return {heading: re.split(r"^# ", text, flags=re.M)[0]
            for heading, text in (part.split("\n", 1) for part in parts)}  # fmt: skip


SECTIONS = sections("experiments/RESULTS.md")
KERNELS = sections("pallas_kernels/README.md")
ALL = SECTIONS | {name: KERNELS[name] for name in ("What they reach", "Coded scales")}


def test_every_claim_has_its_evidence():
    assert set(EVIDENCE) == set(ALL)


@pytest.mark.parametrize("heading", EVIDENCE)
def test_its_tables_are_what_the_result_files_make(heading):
    text = ALL[heading]
    tables, figures = EVIDENCE[heading]()
    found = [[[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
              for line in lines.splitlines() if not re.fullmatch(r"[|: -]+", line)]
             for lines in re.findall(r"((?:^\|.*\n)+)", text, re.M)]  # fmt: skip
    assert found == tables
    # Sentences may name the tables' numbers and the figures, whole; nothing else with a point.
    prose = " ".join(line for line in text.splitlines() if not line.startswith(("|", "- ", "  ")))
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)|\d+\.\d+\.\d+", "", prose)
    for figure in figures:
        assert figure in prose
    told = " ".join([*figures, *(cell for table in tables for row in table for cell in row)])
    assert set(re.findall(r"\d+\.\d+", prose)) <= set(re.findall(r"\d+\.\d+", told))


@pytest.mark.parametrize("heading", SECTIONS)
def test_it_says_how_it_was_made(heading):
    """The command, and of the files it links the versions, the device and the windows."""
    text = SECTIONS[heading]
    assert re.search(r"^- Command: `(python experiments/|ttq )", text, re.M)
    assert re.search(r"^- Measured on: ", text, re.M)
    (made,) = re.findall(r"^- With: (.*(?:\n  .*)*)", text, re.M)
    files = re.findall(r"\]\(results/([\w./-]+\.jsonl?)\)", text)
    files += [f"{s}/rows.jsonl" for s in re.findall(r"\]\(results/(\w+)/report\.md\)", text)]
    assert files
    rows = [row for name in files for row in [read(name)] for row in
            (row if isinstance(row, list) else [row])]  # fmt: skip
    versions = {name: {row["versions"].get(name) for row in rows} - {None}
                for row in rows for name in row["versions"]}  # fmt: skip
    device, _, told = made.rstrip(".").partition(";")
    assert {name: {version} for name, version in map(str.split, told.split(","))} == versions
    cores = {n for row in rows for n in re.findall(r"(\d) cores", str(row.get("device")))}
    assert set(re.findall(r"\d", device)) == cores
    counts = {str(len(row["nll"])) for row in rows if "nll" in row and "cell" in row}
    assert counts <= set(re.findall(r"\d+", re.sub(r"(windows of|prompt of) \d+", "", text)))

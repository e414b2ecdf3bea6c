"""The kept result files, read: rows, gaps over windows, and the tables of kept reports."""

import functools
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
sys.path.insert(0, str(ROOT / "experiments"))
import quality  # noqa: E402
import ranking  # noqa: E402, F401  for who reads its rows
import scale_widths  # noqa: E402, F401  likewise

SMOLLM2, GEMMA3 = "quality_smollm2.jsonl", "quality_gemma3.jsonl"
CORPORA = {"wikitext2": "WikiText-2", "ptb": "PTB", "c4": "C4", "gsm8k": "GSM8K",
           "python": "Python"}  # fmt: skip


def read(name):
    """A result file: a dictionary, or the rows of one with many."""
    text = (RESULTS / name).read_text()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


@functools.cache
def gaps(file, windows):
    return quality.gaps(quality.Results(RESULTS / file).read(), windows)


def gap(file, windows, name, form=quality.interval):
    found = gaps(file, windows).get(name)
    return form(found) if found else "—"


def bits(file, windows, name):
    found = gaps(file, windows).get(name)
    return f"{found['bits']:.2f}" if found else "—"


def report(sweep, heading):
    """The first table of a kept report below a heading: {label: {column: cell}}."""
    text = (RESULTS / sweep / "report.md").read_text()
    (lines,) = re.findall(rf"^#+ {re.escape(heading)}\n\n((?:\|.*\n)+)", text, re.M)
    header, _, *rows = [[c.strip(" *") for c in line.split("|")[1:-1]]
                        for line in lines.splitlines()]  # fmt: skip
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def results_of(sweep, protocol):
    """The results by one protocol; a gap with its interval, if it has one."""
    text = (RESULTS / sweep / "report.md").read_text()
    (heading,) = re.findall(rf"^## (Results: .*, {protocol} protocol,.*)$", text, re.M)
    rows = report(sweep, heading)
    for row in rows.values():
        row["gap"] = f"{row['gap']} {row.pop('95 % interval', '')}".strip()
    return rows


def along(sweep, axis, protocol):
    """The mean gaps along an axis, by one protocol."""
    text = (RESULTS / sweep / "report.md").read_text()
    (heading,) = re.findall(rf"^### (Mean gap by {axis}: .*, {protocol} protocol,.*)$", text, re.M)
    return report(sweep, heading)

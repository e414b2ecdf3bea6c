"""Reading a report."""

import itertools
import re


def table_under(text, heading):
    """The cells of the first table below a heading of the Markdown."""
    lines = itertools.dropwhile(lambda line: heading not in line, text.splitlines())
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), lines)
    rows = [re.split(r"(?<!\\)\|", line)[1:-1]
            for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]  # fmt: skip
    return [[cell.strip() for cell in one] for one in rows if not set(one[0]) <= set(" -")]

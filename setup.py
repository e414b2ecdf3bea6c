"""The README for PyPI, which has none of the repository's files: its relative links get addresses.

Everything else about the package stands in pyproject.toml.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def _absolute(link: re.Match) -> str:
    kind = "raw" if link[1].endswith((".png", ".svg")) else "blob"
    return f"]({PROJECT['urls']['Repository']}/{kind}/main/{link[1]})"


readme = (ROOT / "README.md").read_text("utf-8")
setup(
    long_description=re.sub(r"\]\((?!https:|#)([^)]+)\)", _absolute, readme),
    long_description_content_type="text/markdown",
)

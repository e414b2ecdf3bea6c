"""Which cases a plain `pytest` runs."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """The cases of a parametrized test, of which all but the quick ones are marked as slow."""
    return [one if one in quick else pytest.param(one, marks=pytest.mark.slow) for one in cases]

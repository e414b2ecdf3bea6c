"""Which cases a plain `pytest` runs."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """The cases of a parametrized test, of which all but the quick ones are marked as slow."""

    def param(one: Any) -> Any:
        values = one if isinstance(one, tuple) else (one,)
        return pytest.param(*values, marks=[] if one in quick else [pytest.mark.slow])

    return [param(one) for one in cases]

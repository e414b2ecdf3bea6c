"""Kernels are tested as they are released."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def as_released(terms_as_released):
    """No shortened sums."""

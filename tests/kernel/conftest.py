"""The operators are there once somebody has asked whether they are."""

from __future__ import annotations

import pytest

from dse.kernel import has_kernel


@pytest.fixture(autouse=True)
def operators() -> None:
    has_kernel()

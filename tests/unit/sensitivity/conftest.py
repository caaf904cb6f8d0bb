from __future__ import annotations

import pytest
from sensitivity_support import llama

from dse.models import LoadedModel


@pytest.fixture
def tiny() -> LoadedModel:
    return llama()

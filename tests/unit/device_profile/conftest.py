"""A tiny model, and its device profile with scripted timings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scripted_timings import ScriptedTimings

from dse.measurement.device_profile import ModelProfile, profile_model
from dse.models import LoadedModel, load_model


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder / "model"))


@pytest.fixture
def profile(loaded: LoadedModel, tmp_path: Path) -> ModelProfile:
    return profile_model(loaded, ScriptedTimings(torch.device("cpu"), torch.float32, 2**20, tmp_path))

"""What dtype and mode mean where a study leaves them to the device. The CUDA side that needs a GPU is in tests/gpu."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model, tiny_model
from tiny_study import tiny_study

from dse.config import parse_study
from dse.measurement import LatencySpec
from dse.models import load_model
from dse.models.load import default_dtype
from dse.workers.device_defaults import settled_mode, with_device_defaults, with_stored_defaults

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
SPEC = LatencySpec(prompt_tokens=8, new_tokens=2)


@pytest.fixture
def half_folder(tmp_path: Path) -> Path:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    save_tiny_model(tmp_path / "whole")
    return tmp_path


def test_the_dtype_of_a_gpu_is_the_checkpoints_and_that_of_a_cpu_float32(half_folder: Path) -> None:
    assert default_dtype(str(half_folder / "half"), CUDA) == "bfloat16"
    assert default_dtype(str(half_folder / "half"), CPU) == "float32"
    assert default_dtype(str(half_folder / "whole"), CUDA) == "float32"
    loaded = load_model(str(half_folder / "whole"), dtype="auto")
    assert loaded.dtype == loaded.model.dtype == torch.float32


def test_a_study_names_the_dtype_and_mode_that_it_used(half_folder: Path, tiny_folder: Path) -> None:
    config = parse_study(tiny_study(tiny_folder, model=str(tiny_folder / "model")))
    assert (config.model.dtype, config.measurement.mode) == ("auto", "auto")
    messages: list[str] = []
    loaded = load_model(str(tiny_folder / "model"), dtype="auto")
    settled = with_device_defaults(config, loaded, SPEC, messages.append)
    assert (settled.model.dtype, settled.measurement.mode) == ("float32", "eager")
    assert messages == []  # nothing to say on a CPU
    on_gpu: Any = SimpleNamespace(device=CUDA, dtype=torch.bfloat16, model=loaded.model, waiting=object())
    settled = with_device_defaults(config, on_gpu, SPEC, messages.append)
    assert settled.model.dtype == "bfloat16"
    assert messages[0] == "dtype bfloat16: the checkpoint's, in which a GPU serves it (`model.dtype`)"
    assert len(messages) == 2
    # The next run keeps what the folder says, on whichever device it runs.
    assert with_stored_defaults(config, settled) == settled
    explicit = parse_study({**tiny_study(tiny_folder), "measurement": {"mode": "compile"}})
    assert with_stored_defaults(explicit, settled).measurement.mode == "compile"


def test_a_mode_that_is_not_available_falls_back_to_eager_with_the_reason(tiny_folder: Path) -> None:
    """The weights are on a CPU here, so that CUDA graphs are refused as on a GPU that cannot capture the model."""
    loaded = load_model(str(tiny_folder / "model"))
    assert settled_mode(loaded, SPEC) == ("eager", "")
    claimed: Any = dataclasses.replace(loaded, device=CUDA)
    mode, reason = settled_mode(claimed, SPEC)
    assert mode == "eager"
    assert "CUDA graphs need an NVIDIA GPU" in reason
    claimed.waiting = object()
    assert "one place" in settled_mode(claimed, SPEC)[1]

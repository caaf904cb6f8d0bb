"""Seconds in layers, peaks of memory, and models of fewer layers."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_model
from torch import nn

from dse.models import load_model
from dse.models.miniature import first_layers
from dse.standalone.plan_meters import Peaks, PhaseMeter, available_bytes, resident_bytes


class _Sleeping(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return x


def test_time_in_layers_scales_with_their_number() -> None:
    assert Peaks(seconds=5.0, layer_seconds=2.0).for_layers(10) == pytest.approx(23.0)
    layer = _Sleeping()
    with PhaseMeter([layer], torch.device("cpu")).measuring() as found:
        layer(torch.zeros(1))
        layer(torch.zeros(1))
        time.sleep(0.05)
    assert found.layer_seconds >= 0.1
    assert found.seconds - found.layer_seconds >= 0.05


@pytest.mark.skipif(not resident_bytes(), reason="resident memory is read from /proc")
def test_a_short_peak_of_memory_is_seen() -> None:
    before = resident_bytes()
    with PhaseMeter([], torch.device("cpu")).measuring() as found:
        block = np.ones(2**25)  # 256 MiB
        time.sleep(0.05)
        del block
    assert found.host_bytes - before > 200 * 2**20
    available = available_bytes()
    assert available is not None
    assert available > before


def test_the_first_layers_of_a_model(tmp_path: Path) -> None:
    """Shapes and settings of the checkpoint, other weights, and no file with weights needed."""
    folder = save_tiny_model(tmp_path / "model", "gemma3_text", head_dim=8, sliding_window=16, num_hidden_layers=4)
    whole = load_model(str(folder))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    small = first_layers(str(folder), 2)
    assert small.topology.layer_count == 2
    assert small.model.config.layer_types == whole.model.config.layer_types[:2]
    shapes = {name: p.shape for name, p in whole.model.named_parameters()}
    assert all(shapes[name] == p.shape for name, p in small.model.named_parameters())
    assert small.topology.tensors == whole.topology.tensors[: len(small.topology.tensors)]

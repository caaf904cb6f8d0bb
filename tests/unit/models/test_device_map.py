"""Layers spread over several GPUs; only the assignment is computed, so no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from dse.errors import ModelError
from dse.models.device_map import device_map


def llama(layers: int) -> PreTrainedModel:
    return tiny_model("llama", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers)


@pytest.mark.parametrize(("layers", "devices"), [(8, 2), (9, 3), (12, 4)])
def test_layers_stay_whole_and_devices_are_balanced(layers: int, devices: int) -> None:
    model = llama(layers)
    gpus = [torch.device("cuda", index) for index in range(devices)]
    placed = device_map(model, gpus)
    order = [gpus.index(device) for device in placed.values()]
    assert order == sorted(order)
    assert set(order) == set(range(devices))
    assert {f"model.layers.{index}" for index in range(layers)} <= set(placed)  # no layer is split
    sizes = [0] * devices
    for name, device in placed.items():
        parameters = model.get_submodule(name).parameters()
        sizes[gpus.index(device)] += sum(parameter.numel() for parameter in parameters)
    assert sum(sizes) == sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert max(sizes) <= sum(sizes) / devices + layer  # at most one layer above an even share


def test_more_devices_than_layers_are_refused() -> None:
    with pytest.raises(ModelError, match="name fewer devices"):
        device_map(llama(1), [torch.device("cuda", index) for index in range(8)])

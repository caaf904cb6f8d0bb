"""Where layers go when a model is spread over several GPUs: arithmetic alone, so that no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dse.errors import ModelError
from dse.models.several_devices import device_map


def llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(("layers", "devices"), [(8, 2), (9, 3), (12, 4)])
def test_whole_layers_in_order_no_device_far_above_its_share(layers: int, devices: int) -> None:
    model = llama(layers)
    gpus = [torch.device("cuda", index) for index in range(devices)]
    placed = device_map(model, gpus)
    order = [gpus.index(device) for device in placed.values()]
    assert order == sorted(order)
    assert set(order) == set(range(devices))
    assert {f"model.layers.{index}" for index in range(layers)} <= set(placed)  # none is split
    sizes = [0] * devices
    for name, device in placed.items():
        parameters = model.get_submodule(name).parameters()
        sizes[gpus.index(device)] += sum(parameter.numel() for parameter in parameters)
    assert sum(sizes) == sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert max(sizes) <= sum(sizes) / devices + layer  # a layer above an even share at most


def test_more_devices_than_layers_are_refused() -> None:
    with pytest.raises(ModelError, match="name fewer devices"):
        device_map(llama(1), [torch.device("cuda", index) for index in range(8)])

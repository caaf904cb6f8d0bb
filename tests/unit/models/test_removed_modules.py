"""The list of layers of an export without some attention blocks."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dse.models.removed_modules import LayerList


class Add(nn.Module):
    """Adds a number and, like some layers of transformers, may return a tuple."""

    def __init__(self, value: int, in_tuple: bool = False) -> None:
        super().__init__()
        self.value, self.in_tuple = value, in_tuple

    def forward(self, x: Tensor, factor: int = 1) -> Tensor | tuple[Tensor, None]:
        y = 2 * x + factor * self.value
        return (y, None) if self.in_tuple else y


def run(layers: object, x: Tensor) -> Tensor:
    for layer in layers:  # type: ignore[attr-defined]
        x = layer(x, factor=3)
    return x


def test_a_slice_counts_groups_and_runs_every_layer() -> None:
    plain = nn.ModuleList([Add(value) for value in range(5)])
    layers = LayerList(list(plain), ((2, 1), (1, 0), (2, 0)))
    x = torch.tensor([1.0])
    assert torch.equal(run(layers[:3], x), run(plain, x))
    assert torch.equal(run(layers[:1], x), run(plain[:2], x))
    assert torch.equal(run(layers[1:], x), run(plain[2:], x))
    assert len(layers[:3]) == 3
    assert layers[:3][1] is plain[2]


def test_otherwise_it_is_the_list_of_all_layers() -> None:
    layers = LayerList([Add(value, in_tuple=True) for value in range(3)], ((1, 0), (2, 1)))
    assert len(layers) == len(list(layers)) == 3
    assert layers[-1].value == 2
    layers[1] = Add(7, in_tuple=True)
    (group,) = layers[1:]
    output, nothing = group(torch.tensor([1.0]))
    assert group.value == 2  # attributes are those of the layer with attention
    assert (float(output), nothing) == (2 * (2 * 1 + 7) + 2, None)
    copied = copy.deepcopy(layers)
    assert copied[1] is not layers[1]
    assert copied[1:][0](torch.tensor([1.0]))[0] == output

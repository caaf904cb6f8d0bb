"""Weights in the layout of choice, those of one shared product in one place in memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dse.errors import InvalidMeasurementError
from dse.runtime.products import Layout, Product

__all__ = ["LaidOutWeights", "PackedProducts", "WeightRequest"]

_ALIGNMENT = 64
"""Weights begin at multiples of so many entries: at cache lines in every dtype, so that no vector straddles two."""


@dataclass(frozen=True, eq=False)
class WeightRequest:
    """A product that is wanted.

    Attributes:
        sources: Its weight: the rows of all of these, one below the other.
        biases: For each source the biases of its modules in order; None for a source to which none is added yet.
        layout: How the weight is to lie.
    """

    sources: Sequence[Tensor]
    biases: Sequence[Sequence[Tensor | None] | None]
    layout: Layout

    def weight(self) -> Tensor:
        """The weight in its layout, not copied where it is one that lies so already."""
        stacked = self.sources[0] if len(self.sources) == 1 else torch.cat(list(self.sources))
        return (stacked.T if self.layout == "column_major" else stacked).contiguous()

    def bias(self) -> Tensor | None:
        """The biases one below the other, zero where a source has none; None where no source has any.

        Raises:
            InvalidMeasurementError: Some modules of one source have a bias and others have none.
        """
        if all(bias is None for entry in self.biases for bias in entry or ()):
            return None
        parts = []
        for entry, source in zip(self.biases, self.sources, strict=True):
            given = [bias.detach() for bias in entry or () if bias is not None]
            if given and len(given) < len(entry or ()):
                raise InvalidMeasurementError("modules of one stack must all have a bias or none; use mode compile")
            parts += given or [source.new_zeros(source.shape[0])]
        return torch.cat(parts)

    def key(self) -> Hashable:
        """The same for requests of the very same memory."""
        biases = tuple(tuple(map(_place, entry or ())) for entry in self.biases)
        return (self.layout, tuple(map(_place, self.sources)), biases)


def _place(tensor: Tensor | None) -> tuple[int, ...]:
    return () if tensor is None else (tensor.data_ptr(), *tensor.shape)


@dataclass(frozen=True, eq=False)
class PackedProducts:
    """Products whose weights and biases lie in one flat tensor.

    Attributes:
        flat: That tensor.
        products: In the order of the requests.
    """

    flat: Tensor
    products: tuple[Product, ...]

    def place(self, tensor: Tensor) -> int:
        """Index in `flat` of the first number of a weight or bias."""
        return int(tensor.storage_offset() - self.flat.storage_offset())


class LaidOutWeights:
    """Products by request, one copy of their weights for each: forms of a point share those of the dense model.

    Args:
        known: Where to look first; it is not changed.
    """

    def __init__(self, known: LaidOutWeights | None = None) -> None:
        self._known = known
        # The requests are held beside what was made of them, so that no address in a key is used twice.
        self._copies: dict[Hashable, tuple[Sequence[WeightRequest], PackedProducts]] = {}

    @torch.no_grad()
    def get(self, requests: Sequence[WeightRequest]) -> PackedProducts:
        """Products that are read together, in the order in which they are read; a lone weight need not be copied.

        Raises:
            InvalidMeasurementError: Biases that cannot be joined.
        """
        key = tuple(request.key() for request in requests)
        if self._known is not None and key in self._known._copies:
            return self._known._copies[key][1]
        if key not in self._copies:
            self._copies[key] = (requests, _packed(requests))
        return self._copies[key][1]


def _packed(requests: Sequence[WeightRequest]) -> PackedProducts:
    if len(requests) == 1 and requests[0].bias() is None:
        lone = _constant(requests[0].weight())
        return PackedProducts(lone.detach().view(-1), (Product(lone, requests[0].layout),))
    wanted = [(request.layout, request.weight(), request.bias()) for request in requests]
    size = sum(_room(part) for _, *parts in wanted for part in parts)
    flat = requests[0].sources[0].new_zeros(size)
    end = 0

    def placed(part: Tensor) -> nn.Parameter:
        nonlocal end
        begin, end = end, end + _room(part)
        return _constant(flat[begin:][: part.numel()].view(part.shape).copy_(part))

    products = [
        Product(placed(weight), layout, None if bias is None else placed(bias)) for layout, weight, bias in wanted
    ]
    return PackedProducts(flat, tuple(products))


def _room(part: Tensor | None) -> int:
    return 0 if part is None else -(-part.numel() // _ALIGNMENT) * _ALIGNMENT


def _constant(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)

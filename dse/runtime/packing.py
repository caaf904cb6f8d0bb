"""Weights in the layout of choice, those of one shared product in one place in memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dse.errors import InvalidMeasurementError
from dse.runtime.huge_pages import HUGE_PAGE_BYTES, HugePages, prefer_huge_pages
from dse.runtime.products import Layout, Product

__all__ = ["LaidOutWeights", "PackedProducts", "WeightRequest", "joined_bias"]

_ALIGNMENT = 64
"""Weights begin at multiples of so many entries: at cache lines in every dtype, so that no vector straddles two."""

_LARGE_BYTES = 16 * HUGE_PAGE_BYTES
"""A weight of this size is mostly whole huge pages wherever it lies, and not worth a copy."""


@dataclass(frozen=True, eq=False)
class WeightRequest:
    """A product that is wanted.

    Attributes:
        sources: Its weight: the rows of all of these, one below the other.
        bias: Shape (rows of all sources,), or None.
        layout: How it is to lie.
    """

    sources: Sequence[Tensor]
    bias: Tensor | None
    layout: Layout

    @property
    def entries(self) -> int:
        """Numbers in the weight."""
        return sum(source.numel() for source in self.sources)

    def placed(self) -> Tensor:
        """The weight in its layout, not copied where it is one that lies so already."""
        stacked = self.sources[0] if len(self.sources) == 1 else torch.cat(list(self.sources))
        return (stacked if self.layout == "row_major" else stacked.T).contiguous()

    def key(self) -> Hashable:
        """The same for requests of the very same memory."""
        tensors = [*self.sources, *([] if self.bias is None else [self.bias])]
        return (self.layout, *((tensor.data_ptr(), *tensor.shape) for tensor in tensors))


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
        self._pages = HugePages()
        # The requests are held beside what was made of them, so that no address in a key is used twice.
        self._copies: dict[Hashable, tuple[Sequence[WeightRequest], PackedProducts]] = {}

    @torch.no_grad()
    def get(self, requests: Sequence[WeightRequest]) -> PackedProducts:
        """Products that are read together, in the order in which they are read."""
        key = tuple(request.key() for request in requests)
        if self._known is not None and key in self._known._copies:
            return self._known._copies[key][1]
        if key not in self._copies:
            self._copies[key] = (requests, _packed(requests, self._pages))
        return self._copies[key][1]


def _packed(requests: Sequence[WeightRequest], pages: HugePages) -> PackedProducts:
    first = requests[0]
    is_large = first.entries * first.sources[0].element_size() >= _LARGE_BYTES
    if len(requests) == len(first.sources) == 1 and first.bias is None and is_large:
        weight = _constant(first.placed())
        prefer_huge_pages(weight)
        return PackedProducts(weight.detach().view(-1), (Product(weight, first.layout),))
    sizes = [size for each in requests for size in (each.entries, 0 if each.bias is None else len(each.bias))]
    begins = [0]
    for size in sizes:
        begins.append(begins[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    flat = _empty(begins[-1], first.sources[0], pages)
    products = []
    for index, request in enumerate(requests):
        placed = request.placed()
        part = flat[begins[2 * index] :][: request.entries].view(placed.shape).copy_(placed)
        bias = None
        if request.bias is not None:
            bias = _constant(flat[begins[2 * index + 1] :][: len(request.bias)].copy_(request.bias))
        products.append(Product(_constant(part), request.layout, bias))
    return PackedProducts(flat, tuple(products))


def _empty(entries: int, like: Tensor, pages: HugePages) -> Tensor:
    return pages.empty(entries, like.dtype) if like.device.type == "cpu" else like.new_empty(entries)


def _constant(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def joined_bias(biases: Sequence[Sequence[Tensor | None] | None], sources: Sequence[Tensor]) -> Tensor | None:
    """The biases of products one below the other, zero where one has none; None where none has any.

    Args:
        biases: For each source the biases of its modules in order; None for a source to which none is added yet.
        sources: The weights, for the sizes of what is zero.

    Raises:
        InvalidMeasurementError: Some modules of one source have a bias and others have none.
    """
    if all(bias is None for entry in biases for bias in entry or ()):
        return None
    parts = []
    for entry, source in zip(biases, sources, strict=True):
        given = [bias for bias in entry or () if bias is not None]
        if given and len(given) < len(entry or ()):
            raise InvalidMeasurementError("modules of one stack must all have a bias or none; use mode compile")
        parts.append(torch.cat([bias.detach() for bias in given]) if given else source.new_zeros(source.shape[0]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)

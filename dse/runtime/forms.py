"""The forms in which a device runs a model's matrices fastest: another layout in memory, fewer and larger products.

The function stays the same up to rounding: modules given the very same tensor (query, key and value; gate and up; the
right factors of any of them) are multiplied by their concatenated weights at once, and weights lie in the layout that
the device profile found faster. Which modules share an input is watched, not guessed, and each model is compared with
its plain form before the forms are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dse.errors import InvalidMeasurementError
from dse.runtime.matrices import MatrixModule, modules_by_input
from dse.runtime.products import ChainLinear, Layout, Product, SharedProduct

__all__ = ["Forms", "LaidOutWeights", "LayoutChoice", "build_forms"]

LayoutChoice = Callable[[int, int], Layout]
"""(out_features, in_features) to the layout that multiplies fastest."""

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest deviation of a logit, as a part of the largest logit: rounding over the depth of a model, no more."""

_PROBE_TOKENS = 8


@dataclass(frozen=True, eq=False)
class _Swap:
    parent: nn.Module
    attribute: str
    plain: nn.Module
    form: nn.Module


@dataclass(eq=False)
class Forms:
    """The forms of one model as it was when they were built; `put` and `remove` swap modules and touch no weight."""

    swaps: list[_Swap] = field(default_factory=list)

    def put(self) -> None:
        """Put the forms into the model."""
        for swap in self.swaps:
            setattr(swap.parent, swap.attribute, swap.form)

    def remove(self) -> None:
        """Put the very same plain modules back."""
        for swap in self.swaps:
            setattr(swap.parent, swap.attribute, swap.plain)


class LaidOutWeights:
    """Weights in a layout, one copy for each combination of sources: forms of a point share those of the dense model.

    Args:
        known: Where to look first; it is not changed.
    """

    def __init__(self, known: LaidOutWeights | None = None) -> None:
        self._known = known
        # The sources are held beside the copy, so that no address in a key is used twice.
        self._copies: dict[tuple[tuple[int, int, int], ...], tuple[Sequence[Tensor], nn.Parameter]] = {}

    def get(self, sources: Sequence[Tensor], layout: Layout) -> nn.Parameter:
        """Rows of all `sources`, one below the other, in `layout`; a lone weight that lies so already is not copied."""
        key = (*((source.data_ptr(), source.shape[0], source.shape[1]) for source in sources), (hash(layout), 0, 0))
        if self._known is not None and key in self._known._copies:
            return self._known._copies[key][1]
        if key not in self._copies:
            with torch.no_grad():
                stacked = sources[0] if len(sources) == 1 else torch.cat(list(sources))
                placed = stacked if layout == "row_major" else stacked.T
                self._copies[key] = (sources, nn.Parameter(placed.contiguous(), requires_grad=False))
        return self._copies[key][1]


def build_forms(
    model: nn.Module, choose: LayoutChoice, dense: LaidOutWeights | None = None
) -> tuple[Forms, LaidOutWeights]:
    """The forms of `model` as it is now, compared with the plain model; the model is left as it was.

    Args:
        model: In eval mode; dense, or with a point applied.
        choose: Layout of each product.
        dense: The weights of the dense model's forms, of which copies are shared.

    Returns:
        The forms, and the weights they hold.

    Raises:
        InvalidMeasurementError: The model's outputs in these forms differ by more than rounding.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    tokens = torch.arange(1, _PROBE_TOKENS + 1, device=embedding.weight.device)[None] % embedding.weight.shape[0]
    weights = LaidOutWeights(dense)
    forms = Forms()
    for group in modules_by_input(model, tokens):
        for matrix, form in zip(group, _forms_of_group(group, choose, weights), strict=True):
            parent, _, attribute = matrix.path.rpartition(".")
            plain = model.get_submodule(matrix.path)
            forms.swaps.append(_Swap(model.get_submodule(parent), attribute, plain, form.train(plain.training)))
    _refuse_other_outputs(model, tokens, forms)
    return forms, weights


def _forms_of_group(group: Sequence[MatrixModule], choose: LayoutChoice, weights: LaidOutWeights) -> list[ChainLinear]:
    heads = [matrix.chain[0] for matrix in group]
    rows, columns = sum(head.shape[0] for head in heads), heads[0].shape[1]
    layout = choose(rows, columns)
    product = Product(weights.get(heads, layout), layout, _bias_of_heads(group))
    shared = SharedProduct(product, [head.shape[0] for head in heads])
    forms = []
    for index, matrix in enumerate(group):
        rest = []
        for place, weight in enumerate(matrix.chain[1:], start=2):
            layout = choose(weight.shape[0], weight.shape[1])
            bias = matrix.bias if place == len(matrix.chain) else None
            rest.append(Product(weights.get([weight], layout), layout, bias))
        forms.append(ChainLinear(shared, index, rest))
    return forms


def _bias_of_heads(group: Sequence[MatrixModule]) -> Tensor | None:
    """The biases of modules that are one matrix; those of longer chains are added by their last one."""
    if all(matrix.bias is None or len(matrix.chain) > 1 for matrix in group):
        return None
    parts = [
        matrix.bias.detach()
        if matrix.bias is not None and len(matrix.chain) == 1
        else matrix.chain[0].new_zeros(matrix.chain[0].shape[0])
        for matrix in group
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.inference_mode()
def _refuse_other_outputs(model: nn.Module, tokens: Tensor, forms: Forms) -> None:
    expected = _first_output(model, tokens)
    forms.put()
    try:
        got = _first_output(model, tokens)
    finally:
        forms.remove()
    largest = max(1.0, float(expected.abs().max()))
    deviation = float((got - expected).abs().max()) / largest
    allowed = _TOLERANCE.get(expected.dtype, 1e-1)
    if not deviation <= allowed:  # not-a-number is no agreement
        raise InvalidMeasurementError(
            f"the outputs of {type(model).__name__} in its fast form must agree with its own within {allowed:g} of the "
            f"largest, but differ by {deviation:.2g}; use mode compile"
        )


def _first_output(model: nn.Module, tokens: Tensor) -> Tensor:
    output = model(input_ids=tokens)
    found: Tensor = output[0]
    return found

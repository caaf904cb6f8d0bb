"""The forms in which a device runs a model's matrices fastest: another layout in memory, fewer and larger products.

The function stays the same up to rounding: modules given the very same tensor (query, key and value; gate and up; the
right factors of any of them) are multiplied by their concatenated weights at once, and weights lie in the layout that
the device profile found faster. Which modules share an input is watched, not guessed, and each model is compared with
its plain form before the forms are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dse.errors import InvalidMeasurementError
from dse.kernel import ChainMatrix, KernelChains, KernelForward
from dse.progress import ProgressCallback, ignore_progress
from dse.runtime.decoder_layers import kernel_forwards, pass_outputs
from dse.runtime.matrices import MatrixModule, modules_by_input
from dse.runtime.packing import LaidOutWeights, PackedProducts, WeightRequest
from dse.runtime.products import MANY_ROWS, Chain, Layout, Product, SharedLinear, SharedProduct

__all__ = ["FormChoice", "Forms", "build_forms"]


@dataclass(frozen=True)
class FormChoice:
    """Which form is fastest, by (out_features, in_features) of a product.

    Attributes:
        layouts: The layouts in which products that share an input, and those that follow from it, are fastest together.
        seconds: Seconds of a product in the layout that suits it best, by which factors that take longer than their
            product are merged; None merges nothing.
        head: For the output head and what shares its input, which multiply fewer rows; None where it is no different.
    """

    layouts: Callable[[Sequence[tuple[int, int]]], Sequence[Layout]]
    seconds: Callable[[int, int], float] | None = None
    head: FormChoice | None = None


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
    """The forms of one model as it was when they were built; `put` and `remove` swap modules and touch no weight.

    Attributes:
        swaps: What takes the place of what.
        forwards: What takes the place of the `forward` of whole layers.
        merged: Paths of decomposed modules that run as one matrix, since their factors would take longer: they save
            neither time nor the bytes that their factors would.
    """

    swaps: list[_Swap] = field(default_factory=list)
    forwards: list[KernelForward] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)

    def put(self) -> None:
        """Put the forms into the model."""
        for swap in self.swaps:
            setattr(swap.parent, swap.attribute, swap.form)
        for forward in self.forwards:
            forward.layer.forward = forward

    def remove(self) -> None:
        """Put the very same plain modules back."""
        for forward in self.forwards:
            vars(forward.layer).pop("forward", None)
        for swap in self.swaps:
            setattr(swap.parent, swap.attribute, swap.plain)


def build_forms(
    model: nn.Module,
    choice: FormChoice,
    dense: LaidOutWeights | None = None,
    *,
    at_once: bool = True,
    progress: ProgressCallback = ignore_progress,
) -> tuple[Forms, LaidOutWeights]:
    """The forms of `model` as it is now, compared with the plain model; the model is left as it was.

    Args:
        model: In eval mode; dense, or with a point applied.
        choice: Layout of each product, and which factors are merged.
        dense: The weights of the dense model's forms, of which copies are shared.
        at_once: Whether decode steps may run all layers as one call, so that nobody sees what lies between them.
        progress: Told how many groups of matrices that share an input are done: a new shape takes a second or more to
            be timed.

    Returns:
        The forms, and the weights they hold.

    Raises:
        InvalidMeasurementError: The model's outputs in these forms differ by more than rounding.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    tokens = torch.arange(1, _PROBE_TOKENS + 1, device=embedding.weight.device)[None] % embedding.weight.shape[0]
    weights = LaidOutWeights(dense)
    forms = Forms()
    head = model.get_output_embeddings()  # type: ignore[operator]
    groups = modules_by_input(model, tokens)
    for done, group in enumerate(groups):
        progress("preparing mode fast", done, len(groups))
        is_head = any(model.get_submodule(matrix.path) is head for matrix in group)
        own = choice.head if is_head and choice.head is not None else choice
        for matrix, form, is_merged in _forms_of_group(group, own, weights):
            if is_merged:
                forms.merged.append(matrix.path)
            parent, _, attribute = matrix.path.rpartition(".")
            plain = model.get_submodule(matrix.path)
            forms.swaps.append(_Swap(model.get_submodule(parent), attribute, plain, form.train(plain.training)))
    progress("preparing mode fast", len(groups), len(groups))
    _refuse_other_outputs(model, tokens, forms)
    _let_kernel_run(model, tokens, forms, at_once=at_once)
    return forms, weights


def _forms_of_group(
    group: Sequence[MatrixModule], choice: FormChoice, weights: LaidOutWeights
) -> Iterator[tuple[MatrixModule, SharedLinear, bool]]:
    parts = _parts(group, choice)
    heads = [part.chain[0] for part in parts]
    biases = [part.biases if len(part.chain) == 1 else None for part in parts]
    wanted = [(heads, biases), *(later for part in parts for later in part.later())]
    layouts = choice.layouts([(sum(source.shape[0] for source in w), w[0].shape[1]) for w, _ in wanted])
    packed = weights.get([WeightRequest(*each, layout) for each, layout in zip(wanted, layouts, strict=True)])
    first, *rest = packed.products
    chains = [
        Chain(
            part.chain[0].shape[0],
            [rest.pop(0) for _ in part.chain[1:]],
            [matrix.out_features for matrix in part.members],
        )
        for part in parts
    ]
    shared = SharedProduct(first, chains, _kernel(packed, first, chains))
    members = [(member, part.is_merged) for part in parts for member in part.members]
    for index, (member, is_merged) in enumerate(members):
        yield member, SharedLinear(shared, index), is_merged


def _kernel(packed: PackedProducts, first: Product, chains: Sequence[Chain]) -> KernelChains | None:
    """All these products as one call of the kernel for few rows; None where it cannot be had."""
    if not KernelChains.is_for(packed.flat) or any(product.layout == "column_major" for product in packed.products):
        return None
    found = []
    row = 0
    for chain in chains:
        begin = ChainMatrix(
            chain.given,
            first.in_features,
            packed.place(first.weight_data) + row * first.in_features,
            None if first.bias is None else packed.place(first.bias) + row,
        )
        row += chain.given
        found.append([begin, *(_matrix(packed, product) for product in chain.products)])
    return KernelChains(packed.flat, found, many=MANY_ROWS[first.layout])


def _matrix(packed: PackedProducts, product: Product) -> ChainMatrix:
    bias_at = None if product.bias is None else packed.place(product.bias)
    return ChainMatrix(product.out_features, product.in_features, packed.place(product.weight_data), bias_at)


@dataclass(frozen=True, eq=False)
class _Part:
    """Members of one stack, or a module on its own.

    Attributes:
        members: Its modules.
        chain: Their matrices; the last one is the members' lefts, one below the other.
        is_merged: Whether the chain is one matrix that was a product of several.
    """

    members: tuple[MatrixModule, ...]
    chain: tuple[Tensor, ...]
    is_merged: bool = False

    @property
    def biases(self) -> list[Tensor | None]:
        return [matrix.bias for matrix in self.members]

    @property
    def out_features(self) -> int:
        return self.chain[-1].shape[0]

    def shapes(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of what follows the first product."""
        return [(matrix.shape[0], matrix.shape[1]) for matrix in self.chain[1:]]

    def later(self) -> list[tuple[list[Tensor], Sequence[Sequence[Tensor | None] | None]]]:
        """What follows the first product: sources and biases of each weight, as `WeightRequest` has them."""
        if len(self.chain) == 1:
            return []
        last = [matrix.chain[-1] for matrix in self.members]
        return [*(([core], [None]) for core in self.chain[1:-1]), (last, [[bias] for bias in self.biases])]

    def merged(self) -> _Part:
        """As one matrix, multiplied in double precision."""
        product = self.chain[0].double()
        for matrix in self.chain[1:]:
            product = matrix.double() @ product
        return _Part(self.members, (product.to(self.chain[0].dtype),), is_merged=True)


def _parts(group: Sequence[MatrixModule], choice: FormChoice) -> list[_Part]:
    """The group by stacks; factors that take longer than their product are merged, the most costly ones first."""
    stacks: dict[object, list[MatrixModule]] = {}
    for matrix in group:
        key = matrix.path if len(matrix.chain) == 1 else matrix.chain[0].data_ptr()
        stacks.setdefault(key, []).append(matrix)
    parts = []
    for members in stacks.values():
        lefts = [matrix.chain[-1] for matrix in members]
        parts.append(_Part(tuple(members), (*members[0].chain[:-1], lefts[0] if len(lefts) == 1 else torch.cat(lefts))))
    return [
        part.merged() if is_merged else part
        for part, is_merged in zip(parts, _merged_if_faster(parts, choice), strict=True)
    ]


def _merged_if_faster(parts: Sequence[_Part], choice: FormChoice) -> list[bool]:
    """Which chains take less time as one matrix; decided one by one, the one that saves most first."""
    is_merged = [False] * len(parts)
    seconds = choice.seconds
    if seconds is None:
        return is_merged

    def total_s(states: Sequence[bool]) -> float:
        rows = [
            part.out_features if state else part.chain[0].shape[0] for part, state in zip(parts, states, strict=True)
        ]
        later = [shape for part, state in zip(parts, states, strict=True) if not state for shape in part.shapes()]
        return seconds(sum(rows), parts[0].chain[0].shape[1]) + sum(seconds(*shape) for shape in later)

    while True:
        further = [
            [*is_merged[:index], True, *is_merged[index + 1 :]]
            for index, part in enumerate(parts)
            if len(part.chain) > 1 and not is_merged[index]
        ]
        best = min(further, key=total_s, default=is_merged)
        if total_s(best) >= total_s(is_merged):
            return is_merged
        is_merged = best


@torch.inference_mode()
def _refuse_other_outputs(model: nn.Module, tokens: Tensor, forms: Forms) -> None:
    expected = _first_output(model, tokens)
    forms.put()
    try:
        got = _first_output(model, tokens)
    finally:
        forms.remove()
    deviation = _deviation(got, expected)
    allowed = _TOLERANCE.get(expected.dtype, 1e-1)
    if not deviation <= allowed:  # not-a-number is no agreement
        raise InvalidMeasurementError(
            f"the outputs of {type(model).__name__} in its fast form must agree with its own within {allowed:g} of the "
            f"largest, but differ by {deviation:.2g}; use mode compile"
        )


def _let_kernel_run(model: nn.Module, tokens: Tensor, forms: Forms, *, at_once: bool) -> None:
    """Let the kernel have whole layers where it gives what the layers give; otherwise leave them, and say so."""
    forms.put()
    try:
        found = kernel_forwards(model, at_once=at_once)
        if not found:
            return
        expected = pass_outputs(model, tokens)
        forms.forwards = found
        forms.put()
        deviation, allowed = _deviation(pass_outputs(model, tokens), expected), _TOLERANCE[torch.float32]
    finally:
        forms.remove()
    if not deviation <= allowed:  # not-a-number is no agreement
        forms.forwards = []
        warnings.warn(
            f"the layers of {type(model).__name__} run as its own, slower than they could: in the kernel their outputs "
            f"must agree within {allowed:g} of the largest, but differ by {deviation:.2g}; set DSE_KERNEL=off to "
            f"compare it so with other points",
            stacklevel=2,
        )


def _deviation(got: Tensor, expected: Tensor) -> float:
    """Largest difference as a part of the largest number; not-a-number where there is one."""
    return float((got - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def _first_output(model: nn.Module, tokens: Tensor) -> Tensor:
    output = model(input_ids=tokens)
    found: Tensor = output[0]
    return found

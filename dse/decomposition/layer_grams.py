"""Gram matrices of activations and gradients, one layer after the other, in one sequential pass over the model.

Peak memory is that of one layer with its weights, its Gram matrices and a batch of activations, whatever the depth:
hidden states of all windows wait between the layers, on disk if they do not fit. Without gradients one forward pass
visits the layers in order. With gradients the states before every layer are kept, and a backward sweep visits the
layers in reverse order: each is run again, with hooks on its inputs and on the gradients of its outputs.

Sources: GPTQ (Frantar et al., arXiv 2210.17323) and llm-compressor's sequential pipeline walk the layers in this way;
Chen et al. (arXiv 1604.06174) for the backward pass from checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dse.decomposition.activation_grams import (
    ACTIVATION_BATCH_TOKENS,
    DEFAULT_GRAM_BUDGET_BYTES,
    check_all_seen,
    iterate_grams,
)
from dse.decomposition.calibration_text import CalibrationWindows
from dse.decomposition.gradient_grams import (
    GRADIENT_BATCH_TOKENS,
    GRADIENT_TOKENS,
    LABEL_SEED,
    GradientGrams,
    backpropagate,
)
from dse.decomposition.gram_sums import GradientSums, InputSums
from dse.decomposition.hidden_states import StateBudget
from dse.decomposition.layer_calls import NotSequentialError
from dse.decomposition.layer_walk import LayerWalk
from dse.errors import NonFiniteError
from dse.models import LoadedModel
from dse.progress import ProgressCallback, ignore_progress

__all__ = ["GramSettings", "LayerGrams", "iterate_layer_grams"]

logger = logging.getLogger("dse")


@dataclass(frozen=True)
class GramSettings:
    """How Gram matrices are computed.

    Attributes:
        devices: Devices that share the windows; None for the model's own.
        states: Memory for hidden states; None for a share of the device.
        folder: Where hidden states go that do not fit; None for the user's cache.
        gram_budget_bytes: Memory for the matrices of a group of layers, for models whose layers cannot be called one
            by one.
        is_sequential: Whether to try the sequential pass.
    """

    devices: tuple[torch.device, ...] | None = None
    states: StateBudget | None = None
    folder: Path | None = None
    gram_budget_bytes: int = DEFAULT_GRAM_BUDGET_BYTES
    is_sequential: bool = True


@dataclass(frozen=True, eq=False)
class LayerGrams:
    """Gram matrices of some matrices of one layer. The weights of the layer are in memory while this is handled.

    Attributes:
        sharing: Names of matrices that read the same input, to the mean of x x^T over tokens, shape (in_features,
            in_features), float32.
        gradients: Name to the mean of g g^T, shape (out_features, out_features), float32; empty if not requested.
    """

    sharing: Mapping[tuple[str, ...], Tensor]
    gradients: Mapping[str, Tensor]


def iterate_layer_grams(
    loaded: LoadedModel,
    names: Sequence[str],
    windows: CalibrationWindows,
    *,
    with_gradients: bool = False,
    settings: GramSettings | None = None,
    progress: ProgressCallback = ignore_progress,
) -> Iterator[LayerGrams]:
    """Yield the Gram matrices of every layer that holds some of `names`, in the order in which they are computed.

    If the layers cannot be called one by one, the whole model is run once for each group of layers instead.

    Args:
        loaded: The dense model, resident or with its weights on disk.
        names: Tensors and stacks.
        windows: Calibration windows.
        with_gradients: Whether gradients are needed.
        settings: Devices and memory.
        progress: Called as ("calibrate", done, total) and, with gradients, ("gradients", done, total), in tokens.

    Raises:
        CalibrationError: A tensor takes no part in a forward pass.
        NonFiniteError: An activation is NaN or infinite.
    """
    settings = settings or GramSettings()
    by_layer: dict[int, list[str]] = {}
    outside = [name for name in names if loaded.topology.matrix(name).layer is None]
    for name in names:
        if (layer := loaded.topology.matrix(name).layer) is not None:
            by_layer.setdefault(layer, []).append(name)
    if by_layer and settings.is_sequential:
        try:
            sequential = _Pass(loaded, by_layer, windows, with_gradients, settings, progress)
        except NotSequentialError as reason:
            logger.info(
                "the layers of %s are not called one by one, because %s; each group of layers costs one pass",
                type(loaded.model).__name__,
                reason,
            )
        else:
            yield from sequential.backward() if with_gradients else sequential.forward()
            by_layer = {}
    rest = (*(name for of_layer in by_layer.values() for name in of_layer), *outside)
    if rest:
        yield from _by_groups(loaded, rest, windows, with_gradients, settings, progress)


def _by_groups(
    loaded: LoadedModel,
    names: tuple[str, ...],
    windows: CalibrationWindows,
    with_gradients: bool,
    settings: GramSettings,
    progress: ProgressCallback,
) -> Iterator[LayerGrams]:
    """Gram matrices from passes of the whole model, whose weights must all fit into memory."""
    checkpoint, model, topology = loaded.checkpoint, loaded.model, loaded.topology
    with nullcontext() if checkpoint is None else checkpoint.present(model, [""], loaded.device):
        budget = settings.gram_budget_bytes
        gradients = None
        if with_gradients:
            gradients = GradientGrams(model, topology, names, windows, budget_bytes=budget, progress=progress)
        for sharing, gram in iterate_grams(model, topology, names, windows, budget_bytes=budget, progress=progress):
            yield LayerGrams({sharing: gram}, {n: gradients.take(n) for n in sharing} if gradients is not None else {})


class _Pass:
    """One sequential pass over the layers that hold requested matrices."""

    def __init__(
        self,
        loaded: LoadedModel,
        by_layer: Mapping[int, Sequence[str]],
        windows: CalibrationWindows,
        with_gradients: bool,
        settings: GramSettings,
        progress: ProgressCallback,
    ) -> None:
        self._loaded = loaded
        self._by_layer = by_layer
        self._tokens = windows.tokens
        self._progress = progress
        own, rest = torch.zeros(0, 0), windows.token_ids
        if with_gradients:
            chosen = windows.spread_rows(GRADIENT_TOKENS)
            is_other = torch.ones(len(windows.token_ids), dtype=torch.bool)
            is_other[chosen] = False
            own, rest = windows.token_ids[chosen], windows.token_ids[is_other]
        self._gradient_tokens = own.numel()
        with_gradient = _batches(own, GRADIENT_BATCH_TOKENS)
        self._with_gradient = range(len(with_gradient))
        batches = [*with_gradient, *_batches(rest, ACTIVATION_BATCH_TOKENS)]
        self._all = range(len(batches))
        self._walk = LayerWalk(
            loaded, batches, devices=settings.devices, budget=settings.states, folder=settings.folder
        )
        self._total = self._tokens * (max(by_layer) + 1)
        self._done = 0

    def forward(self) -> Iterator[LayerGrams]:
        """One forward pass; each layer's activations are released with it."""
        last = max(self._by_layer)
        for layer in range(last + 1):
            with self._walk.layer(layer) as replicas:
                sums = self._run(layer, replicas, self._by_layer.get(layer, ()), keeps_inputs=False)
                if sums is not None:
                    yield LayerGrams(self._means(sums), {})
                    del sums

    def backward(self) -> Iterator[LayerGrams]:
        """A forward pass that keeps the states before every layer, then a backward sweep."""
        layers = len(self._walk.layers)
        self._total = self._tokens * layers
        for layer in range(layers):
            with self._walk.layer(layer) as replicas:
                self._run(layer, replicas, (), keeps_inputs=True)
        self._gradients_after_the_last_layer()
        self._done, first = 0, min(self._by_layer)
        self._total = self._tokens * (layers - first)
        for layer in reversed(range(first, layers)):
            with self._walk.layer(layer) as replicas:
                found = self._sweep(layer, replicas, self._by_layer.get(layer, ()), is_first=layer == first)
                if found is not None:
                    yield found
                    del found

    def _run(
        self, layer: int, replicas: Sequence[nn.Module], names: Sequence[str], *, keeps_inputs: bool
    ) -> InputSums | None:
        """Run a layer on all batches and keep its outputs."""
        sums = {id(replica): InputSums(replica, self._first_paths(layer, names)) for replica in replicas}
        is_last = layer + 1 == len(self._walk.layers)

        def work(replica: nn.Module, batch: int) -> None:
            hidden = self._walk.hidden(replica, layer, batch)
            with torch.no_grad(), sums[id(replica)].collecting():
                output = self._walk.call(replica, layer, batch, hidden)
            if not keeps_inputs:
                self._walk.states.drop((layer, batch))
            if not is_last or (keeps_inputs and batch in self._with_gradient):
                self._walk.states.put((layer + 1, batch), output)
            self._report("calibrate", batch)

        self._walk.map(replicas, work, self._all)
        return _merged(list(sums.values())) if names else None

    def _gradients_after_the_last_layer(self) -> None:
        """Replace the states after the last layer by the gradients of the sampled labels' loss."""
        layers = len(self._walk.layers)
        generator = torch.Generator().manual_seed(LABEL_SEED)
        with self._walk.tail() as run:
            for batch in self._with_gradient:
                self._progress("gradients", 0, self._tokens)
                hidden = self._walk.states.get((layers, batch), self._loaded.device).requires_grad_()
                with torch.enable_grad():
                    backpropagate(run(batch, hidden), generator)
                self._walk.states.drop((layers, batch))
                self._walk.states.put(("gradient", batch), _gradient_of(hidden))

    def _sweep(
        self, layer: int, replicas: Sequence[nn.Module], names: Sequence[str], *, is_first: bool
    ) -> LayerGrams | None:
        """Run a layer again from its kept inputs, and pass the gradients on to the layer before."""
        walk = self._walk
        topology, prefix = self._loaded.topology, len(walk.paths[layer]) + 1
        paths = {name: [path[prefix:] for path in topology.matrix(name).modules] for name in names}
        widths = {name: topology.matrix(name).out_features for name in names}
        devices = [next(replica.parameters()).device for replica in replicas]
        inputs = {id(replica): InputSums(replica, self._first_paths(layer, names)) for replica in replicas}
        outputs = {id(r): GradientSums(r, paths, widths, device) for r, device in zip(replicas, devices, strict=True)}

        def work(replica: nn.Module, batch: int) -> None:
            hidden = walk.hidden(replica, layer, batch)
            if batch not in self._with_gradient:
                if names:
                    with torch.no_grad(), inputs[id(replica)].collecting():
                        walk.call(replica, layer, batch, hidden)
            else:
                hidden.requires_grad_()
                with torch.enable_grad(), inputs[id(replica)].collecting(), outputs[id(replica)].collecting():
                    output = walk.call(replica, layer, batch, hidden.clone())
                    output.backward(walk.states.get(("gradient", batch), output.device))  # type: ignore[no-untyped-call]
                walk.states.drop(("gradient", batch))
                if not is_first:
                    walk.states.put(("gradient", batch), _gradient_of(hidden))
            walk.states.drop((layer, batch))
            self._report("gradients", batch)

        walk.map(replicas, work, self._all)
        if not names:
            return None
        gradients = list(outputs.values())
        for other in gradients[1:]:
            gradients[0].merge(other)
        check_all_seen(names, gradients[0].seen)
        means = {name: own.mean(self._gradient_tokens) for name, own in gradients[0].sums.items()}
        return LayerGrams(self._means(_merged(list(inputs.values()))), means)

    def _first_paths(self, layer: int, names: Sequence[str]) -> dict[str, str]:
        prefix = len(self._walk.paths[layer]) + 1
        return {name: self._loaded.topology.matrix(name).modules[0][prefix:] for name in names}

    def _means(self, sums: InputSums) -> dict[tuple[str, ...], Tensor]:
        """The mean over tokens for each group of matrices with one input."""
        names = {name for sharing in sums.sharing for name in sharing}
        check_all_seen(sums.names, names)
        found = {}
        for sharing in sums.sharing:
            gram = sums.sums.pop(sharing[0]).mean(self._tokens)
            if not bool(torch.isfinite(gram).all()):
                raise NonFiniteError(f"calibration activations must be finite, but the input of '{sharing[0]}' is not")
            found[sharing] = gram
        return found

    def _report(self, phase: str, batch: int) -> None:
        self._done += self._walk.batches[batch].numel()
        self._progress(phase, self._done, self._total)


def _batches(token_ids: Tensor, tokens: int) -> list[Tensor]:
    """Batches of whole windows with about this many tokens."""
    return list(torch.split(token_ids, max(1, tokens // token_ids.shape[1]))) if token_ids.numel() else []


def _gradient_of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _merged(sums: list[InputSums]) -> Any:
    """The sums of all devices that saw a batch, on the first device."""
    used = [part for part in sums if part.sums]
    for other in used[1:]:
        used[0].merge(other)
    return used[0] if used else sums[0]

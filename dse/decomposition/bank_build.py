"""Decompose the tensors that a factor bank lacks, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dse.cost import check_point, largest_rank
from dse.decomposition.calibration_text import CalibrationWindows
from dse.decomposition.factor_store import FactorStore
from dse.decomposition.factors import as_matrix
from dse.decomposition.layer_grams import GramSettings, iterate_layer_grams
from dse.decomposition.methods import METHODS, factorise
from dse.decomposition.mlp_width import channel_factors
from dse.design_point import PIVOTED, WIDTH, DesignPoint, TensorChoice
from dse.errors import PointError
from dse.models import LoadedModel
from dse.models.layer_paths import layer_paths
from dse.progress import ProgressCallback

__all__ = ["Lacking", "dense_weight", "fill_stores"]


@dataclass(frozen=True, eq=False)
class Lacking:
    """What one store of a factor bank lacks.

    Attributes:
        store: Where the factors go.
        method: A key of `METHODS`; for `width` the channels of MLPs are ordered instead.
        ranks: Tensor or stack to rank; for `width` the MLPs.
    """

    store: FactorStore
    method: str
    ranks: Mapping[str, int]

    def matrices(self, loaded: LoadedModel) -> dict[str, str]:
        """Name of each matrix whose inputs are needed to the part that is stored for it."""
        if self.method == WIDTH:
            return {loaded.topology.mlp(name).output.name: name for name in self.ranks}
        for name, rank in self.ranks.items():
            choice = TensorChoice(self.method, rank)
            is_single = name in loaded.topology.by_name and self.method != "tucker"
            if is_single and rank > largest_rank(loaded.topology.matrix(name), choice):
                choice = dataclasses.replace(choice, form=PIVOTED)  # the only form with such ranks
            check_point(loaded.topology, DesignPoint.of({name: choice}))
        return {name: name for name in self.ranks}

    def put(self, part: str, weight: Tensor, gram: Tensor | None, gradient_gram: Tensor | None) -> None:
        """Decompose one weight and write the result."""
        if self.method != WIDTH:
            self.store.put(part, factorise(weight, self.method, self.ranks[part], gram, gradient_gram))
            return
        assert gram is not None  # noqa: S101 - the method is calibrated
        self.store.put_channels(part, channel_factors(weight, gram, gradient_gram))


def fill_stores(
    lacking: Sequence[Lacking],
    loaded: LoadedModel,
    calibration: CalibrationWindows | None,
    settings: GramSettings,
    progress: ProgressCallback,
) -> None:
    """Decompose what stores lack and write it, one by one, so that a killed build continues where it stopped.

    Methods that need the same Gram matrices share one pass over the layers.

    Args:
        lacking: What is missing, by method.
        loaded: The dense model, resident or with its weights on disk.
        calibration: Calibration text; required by calibrated methods.
        settings: Devices and memory.
        progress: Called as ("decompose", done, total) in tensors and MLPs, and with the phases of
            `iterate_layer_grams`.
    """
    groups: dict[tuple[bool, bool], list[Lacking]] = {}
    for entry in lacking:
        needs = METHODS[entry.method]
        groups.setdefault((needs.is_calibrated, needs.needs_gradients), []).append(entry)
    for group in groups.values():
        _fill(group, loaded, calibration, settings, progress)


def _fill(
    group: Sequence[Lacking],
    loaded: LoadedModel,
    calibration: CalibrationWindows | None,
    settings: GramSettings,
    progress: ProgressCallback,
) -> None:
    """Fill stores whose methods need the same Gram matrices."""
    wanted: dict[str, list[tuple[Lacking, str]]] = {}
    for entry in group:
        for matrix, part in entry.matrices(loaded).items():
            wanted.setdefault(matrix, []).append((entry, part))
    names = tuple(matrix.name for matrix in loaded.topology.matrices if matrix.name in wanted)
    for name in names:
        _check_dense(loaded, name)
    done, total = 0, sum(map(len, wanted.values()))
    progress("decompose", done, total)
    for name, gram, gradient_gram in _inputs(loaded, group[0].method, names, calibration, settings, progress):
        for entry, part in wanted[name]:
            progress("decompose", done, total)
            entry.put(part, dense_weight(loaded, name), gram, gradient_gram)
            done += 1
            progress("decompose", done, total)


def _inputs(
    loaded: LoadedModel,
    method: str,
    names: tuple[str, ...],
    calibration: CalibrationWindows | None,
    settings: GramSettings,
    progress: ProgressCallback,
) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Yield each name with its Gram matrices, while its weight is in memory."""
    entry = METHODS[method]
    if not entry.is_calibrated or calibration is None:
        yield from _weights_only(loaded, names)
        return
    grams = iterate_layer_grams(
        loaded, names, calibration, with_gradients=entry.needs_gradients, settings=settings, progress=progress
    )
    for of_layer in grams:
        for sharing, gram in of_layer.sharing.items():
            for name in sharing:
                yield name, gram, of_layer.gradients.get(name)
            del gram
        del of_layer


def _weights_only(loaded: LoadedModel, names: tuple[str, ...]) -> Iterator[tuple[str, None, None]]:
    by_layer: dict[int | None, list[str]] = {}
    for name in names:
        by_layer.setdefault(loaded.topology.matrix(name).layer, []).append(name)
    paths = layer_paths(loaded.topology)
    for layer, of_layer in by_layer.items():
        if loaded.checkpoint is None:
            present: AbstractContextManager[None] = nullcontext()
        else:
            modules = [path for name in of_layer for path in loaded.topology.matrix(name).modules]
            wanted = modules if layer is None else [paths[layer]]
            present = loaded.checkpoint.present(loaded.model, wanted, loaded.device)
        with present:
            for name in of_layer:
                yield name, None, None


def dense_weight(loaded: LoadedModel, name: str) -> Tensor:
    """The weight of a tensor, or the stacked weights of a stack's members."""
    found = [loaded.model.get_submodule(path) for path in loaded.topology.matrix(name).modules]
    weights = [as_matrix(module).detach() for module in found]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _check_dense(loaded: LoadedModel, name: str) -> None:
    for tensor in loaded.topology.tensors_of(name):
        path, shape = loaded.topology[tensor].module, loaded.topology[tensor].shape
        try:
            module = loaded.model.get_submodule(path)
        except AttributeError:  # its block is removed
            module = None
        is_dense = type(module).__name__ in ("Linear", "Conv1D") and module is not None
        # A linear module behind a norm with a factor holds a left factor.
        if module is None or not is_dense or tuple(as_matrix(module).shape) != shape:
            raise PointError(
                f"'{name}' must be dense while a factor bank is built, but a point is applied; undo it first"
            )

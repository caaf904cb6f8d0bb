"""Decompose the tensors that a factor bank lacks, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dse.cost import check_point
from dse.decomposition.calibration_text import CalibrationWindows
from dse.decomposition.factor_store import FactorStore
from dse.decomposition.factors import as_matrix
from dse.decomposition.layer_grams import GramSettings, iterate_layer_grams
from dse.decomposition.methods import METHODS, factorise
from dse.decomposition.mlp_width import channel_factors
from dse.design_point import WIDTH, DesignPoint, TensorChoice
from dse.errors import PointError
from dse.models import LoadedModel
from dse.models.layer_paths import layer_paths
from dse.progress import ProgressCallback

__all__ = ["dense_weight", "fill_channels", "fill_store"]


def fill_store(
    store: FactorStore,
    loaded: LoadedModel,
    method: str,
    ranks: Mapping[str, int],
    calibration: CalibrationWindows | None,
    settings: GramSettings,
    progress: ProgressCallback,
) -> None:
    """Decompose the tensors of `ranks` and write them, one by one, so that a killed build continues where it stopped.

    Args:
        store: Where the factors go.
        loaded: The dense model, resident or with its weights on disk.
        method: A key of `METHODS`.
        ranks: Tensor or stack to rank.
        calibration: Calibration text; required by calibrated methods.
        settings: Devices and memory.
        progress: Called as ("decompose", done, total) in tensors, and with the phases of `iterate_layer_grams`.
    """
    names = tuple(matrix.name for matrix in loaded.topology.matrices if matrix.name in ranks)
    for name in names:
        check_point(loaded.topology, DesignPoint.of({name: TensorChoice(method, ranks[name])}))
        _check_dense(loaded, name)
    progress("decompose", 0, len(names))
    inputs = _inputs(loaded, method, names, calibration, settings, progress)
    for done, (name, gram, gradient_gram) in enumerate(inputs, 1):
        progress("decompose", done - 1, len(names))
        store.put(name, factorise(dense_weight(loaded, name), method, ranks[name], gram, gradient_gram))
        progress("decompose", done, len(names))


def fill_channels(
    store: FactorStore,
    loaded: LoadedModel,
    names: Sequence[str],
    calibration: CalibrationWindows,
    settings: GramSettings,
    progress: ProgressCallback,
) -> None:
    """Order the channels of these MLPs and write what their widths are computed from, one MLP after the other.

    Args:
        store: Where the channels go.
        loaded: The dense model, resident or with its weights on disk.
        names: MLPs whose width can be reduced.
        calibration: Calibration text.
        settings: Devices and memory.
        progress: Called as ("decompose", done, total) in MLPs, and with the phases of `iterate_layer_grams`.
    """
    mlps = {loaded.topology.mlp(name).output.name: name for name in names}
    for name in mlps:
        _check_dense(loaded, name)
    progress("decompose", 0, len(mlps))
    inputs = _inputs(loaded, WIDTH, tuple(mlps), calibration, settings, progress)
    for done, (name, gram, gradient_gram) in enumerate(inputs, 1):
        assert gram is not None  # noqa: S101 - the method is calibrated
        store.put_channels(mlps[name], channel_factors(dense_weight(loaded, name), gram, gradient_gram))
        progress("decompose", done, len(mlps))


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

"""Measure a sensitivity profile: tensors one by one, then blocks as one, layer by layer."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dse.cost import parameters_saved, point_problems
from dse.decomposition import CalibrationWindows, FactorBank
from dse.design_point import REMOVED, DesignPoint, TensorChoice
from dse.errors import CalibrationError, NonFiniteError, ProfileError
from dse.files import cache_dir
from dse.models import LoadedModel
from dse.progress import ProgressCallback, ignore_progress
from dse.sensitivity.block_curve import BlockCurve
from dse.sensitivity.blocks import Block, blocks_of_topology, groups_that_remain
from dse.sensitivity.divergence_meter import DivergenceMeter, OptionDivergence
from dse.sensitivity.measurements import MeasurementCache
from dse.sensitivity.option import Option, Unit
from dse.sensitivity.profile import MeasuredPart, SensitivityProfile
from dse.sensitivity.profile_settings import ProfileSettings
from dse.sensitivity.sensitivity_table import SensitivityTable, TableOrigin
from dse.sensitivity.tensor_curve import TensorCurve, best_split, rank_of_kept_fraction, split_table
from dse.sensitivity.truncation import truncation_errors
from dse.topology import Matrix

__all__ = ["measure_profile", "profile_origin"]

logger = logging.getLogger("dse")

Choices = tuple[tuple[str, TensorChoice], ...]


def profile_origin(
    loaded: LoadedModel, windows: Tensor, calibration: CalibrationWindows | None, settings: ProfileSettings
) -> TableOrigin:
    """What a profile of this model, text and calibration is keyed by.

    Raises:
        CalibrationError: A calibrated method is asked for without calibration text.
    """
    if settings.is_calibrated and calibration is None:
        raise CalibrationError(f"methods {', '.join(settings.methods)} need calibration text, but none was given")
    digest = hashlib.sha256(f"{tuple(windows.shape)}".encode() + windows.cpu().numpy().tobytes())
    return TableOrigin(
        model=loaded.fingerprint,
        calibration=calibration.fingerprint if calibration is not None and settings.is_calibrated else "",
        methods=tuple(sorted(settings.methods)),
        text=digest.hexdigest()[:16],
        tokens=windows.numel(),
        dtype=str(loaded.dtype).removeprefix("torch."),
    )


def measure_profile(
    loaded: LoadedModel,
    windows: Tensor,
    calibration: CalibrationWindows | None = None,
    settings: ProfileSettings | None = None,
    *,
    text: str = "",
    folder: Path | None = None,
    progress: ProgressCallback = ignore_progress,
) -> SensitivityProfile:
    """The sensitivity profile of a model; what the cache holds is not measured again.

    Args:
        loaded: The dense model.
        windows: Text to measure divergence on, shape (windows, tokens).
        calibration: For methods that need it.
        settings: What to measure.
        text: Of the windows, in words, for the record.
        folder: Where profiles live; the user's cache by default.
        progress: Called as ("calibrate", ...), ("decompose", ...) and ("sensitivity", done, measurements).

    Raises:
        CalibrationError: A calibrated method is asked for without calibration text.
        ModelError: The model has no output head whose logits are its own.
        ProfileError: The model has no layers with decomposable tensors among those asked for.
        StorageFullError: The disk is full.
    """
    settings = settings or ProfileSettings()
    origin = profile_origin(loaded, windows, calibration, settings)
    home = (folder or cache_dir() / "sensitivity") / origin.fingerprint
    path = home / f"profile-{settings.fingerprint}.json"
    if path.exists():
        try:
            return SensitivityProfile.read(path, origin)
        except ProfileError as error:
            logger.warning("%s; it is made again from its measurements", error)
    bank = FactorBank.build(loaded, settings.rank_requests(loaded.topology), calibration, progress=progress)
    cache = MeasurementCache(home / "measurements.json", origin)
    profiler = _Profiler(loaded, windows, bank, cache, settings, progress)
    parts, table = profiler.run(origin)
    profile = SensitivityProfile(loaded.ref, loaded.topology.architecture, text, parts, table)
    profile.write(path)
    return profile


class _Profiler:
    """One run: what it measures with, what it found so far."""

    def __init__(
        self,
        loaded: LoadedModel,
        windows: Tensor,
        bank: FactorBank,
        cache: MeasurementCache,
        settings: ProfileSettings,
        progress: ProgressCallback,
    ) -> None:
        self._loaded, self._bank, self._cache, self._settings = loaded, bank, cache, settings
        self._blocks = blocks_of_topology(loaded.topology, settings.names, with_stacks=settings.with_stacks)
        if not self._blocks:
            raise ProfileError(
                f"a profile needs decomposable tensors inside the layers, but none of {loaded.topology.architecture}'s"
                " was asked for; name layers or roles that it has"
            )
        self._progress = progress
        self._done, self._total = 0, self._planned()
        progress("sensitivity", 0, self._total)
        self._meter = DivergenceMeter(loaded, windows, bank)
        names = list(dict.fromkeys(m.name for block in self._blocks for way in block.ways for m in way))
        self._errors: Mapping[str, Mapping[str, NDArray[np.float64]]] = {
            method: truncation_errors(loaded, names, method, bank, self._meter.batches) for method in settings.methods
        }
        self._parts: list[MeasuredPart] = []
        self._curves: dict[str, dict[str, TensorCurve]] = {}

    def run(self, origin: TableOrigin) -> tuple[tuple[MeasuredPart, ...], SensitivityTable]:
        """Measure everything, layer by layer; each layer is kept on disk before the next."""
        units = []
        for _, blocks in itertools.groupby(self._blocks, lambda block: block.layer):
            units += [self._unit(block) for block in blocks]
            self._cache.save()
        tensors = [part for part in self._parts if part.role not in ("attention", "mlp")]
        whole = [part for part in self._parts if part.role in ("attention", "mlp")]
        topology = self._loaded.topology
        table = SensitivityTable(
            tuple(units), topology.parameters_dense, origin, one_remains=groups_that_remain(topology)
        )
        return (*tensors, *whole), table

    def _planned(self) -> int:
        ways = [way for block in self._blocks for way in block.ways]
        per_way = len(self._settings.block_kept_fractions)
        removable = sum(self._is_removable(block) for block in self._blocks)
        return len(self._settings.methods) * sum(len(way) + per_way for way in ways) + removable

    def _unit(self, block: Block) -> Unit:
        dense = self._dense_parameters(block)
        options = [Option((), dense, 0.0)]
        for method in self._settings.methods:
            for way in block.ways:
                options += self._decompositions(block, way, method, dense)
        if self._is_removable(block):
            choices = ((block.name, TensorChoice.removal()),)
            if (divergence := self._measure(choices, block.layer)) is not None:
                self._note(block.name, block.layer, block.kind, REMOVED, 0.0, divergence)
                options.append(self._option(choices, dense, divergence.kl_divergence, divergence))
        distinct = {option.choices: option for option in reversed(options)}
        return Unit(block.name, block.layer, block.kind, tuple(o for o in options if distinct[o.choices] is o))

    def _decompositions(self, block: Block, way: Sequence[Matrix], method: str, dense: int) -> list[Option]:
        """Splits of the block at every kept fraction, measured or interpolated."""
        curves = [curve for matrix in way if (curve := self._curve(matrix, method)) is not None]
        if not curves:
            self._skip(len(self._settings.block_kept_fractions))
            return []
        table = split_table(curves, self._settings.multiple)
        predicted: dict[Choices, float] = {}
        measured: dict[Choices, OptionDivergence] = {}
        fractions = sorted({*self._settings.table_kept_fractions, *self._settings.block_kept_fractions}, reverse=True)
        for fraction in fractions:
            choices = best_split(table, fraction)
            if choices:
                predicted[choices] = table.divergence_of(DesignPoint(choices))
            if fraction not in self._settings.block_kept_fractions:
                continue
            if not choices:
                self._skip(1)
            elif (divergence := self._measure(choices, block.layer)) is not None:
                measured[choices] = divergence
                kept = table.parameters_dense - self._saved(choices)
                self._note(block.name, block.layer, block.kind, method, kept / table.parameters_dense, divergence)
        correction = BlockCurve.of([(predicted[c], d.kl_divergence) for c, d in measured.items()])
        found, least = [], 0.0
        for choices, divergence_sum in sorted(predicted.items(), key=lambda entry: self._saved(entry[0])):
            known = measured.get(choices)
            # What removes more does not cost less: noise of a measurement must not say so.
            least = max(least, correction.at(divergence_sum) if known is None else known.kl_divergence)
            found.append(self._option(choices, dense, least, known))
        return found

    def _curve(self, matrix: Matrix, method: str) -> TensorCurve | None:
        if matrix.name in self._curves.get(method, {}):  # of the block's other way
            self._skip(1)
            return self._curves[method][matrix.name]
        settings, layer = self._settings, matrix.layer
        rank = rank_of_kept_fraction(matrix, method, settings.tensor_kept_fraction, settings.multiple)
        choices = ((matrix.name, TensorChoice(method, rank)),)
        assert layer is not None  # noqa: S101 - blocks hold tensors of layers alone
        divergence = self._measure(choices, layer)
        if divergence is None:
            return None
        self._note(matrix.name, layer, matrix.role, method, 1 - self._saved(choices) / matrix.parameters, divergence)
        curve = TensorCurve(matrix, method, self._errors[method][matrix.name], rank, divergence.kl_divergence)
        self._curves.setdefault(method, {})[matrix.name] = curve
        return curve

    def _measure(self, choices: Choices, layer: int) -> OptionDivergence | None:
        """From the cache or by surgery; None where the model breaks down."""
        point = DesignPoint(choices)
        divergence = self._cache.get(point)
        if divergence is None:
            try:
                divergence = self._meter.measure(point, layer)
            except NonFiniteError as error:
                logger.warning("%s; it is left out of the profile", error)
            else:
                self._cache.put(point, divergence)
        self._skip(1)
        return divergence

    def _skip(self, measurements: int) -> None:
        self._done += measurements
        self._progress("sensitivity", self._done, self._total)

    def _option(self, choices: Choices, dense: int, divergence: float, known: OptionDivergence | None) -> Option:
        drop = None if known is None else known.log_likelihood_drop
        return Option(choices, dense - self._saved(choices), divergence, drop, is_measured=known is not None)

    def _note(self, name: str, layer: int, role: str, method: str, kept: float, divergence: OptionDivergence) -> None:
        self._parts.append(
            MeasuredPart(
                name,
                layer,
                role,
                method,
                kept,
                divergence.kl_divergence,
                divergence.kl_standard_error,
                divergence.log_likelihood_drop,
            )
        )

    def _saved(self, choices: Sequence[tuple[str, TensorChoice]]) -> int:
        return parameters_saved(self._loaded.topology, DesignPoint(tuple(choices)))

    def _dense_parameters(self, block: Block) -> int:
        """Of the block's matrices, and of the norms that would go with it."""
        if not self._is_removable(block):
            return block.parameters
        return max(block.parameters, self._saved(((block.name, TensorChoice.removal()),)))

    def _is_removable(self, block: Block) -> bool:
        """Some blocks are never removable, others only beside another of their kind."""
        topology, point = self._loaded.topology, DesignPoint.of({block.name: TensorChoice.removal()})
        return self._settings.with_removals and not point_problems(topology, point)

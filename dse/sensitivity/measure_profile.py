"""Measure a sensitivity profile, layer by layer: first single tensors, then whole blocks."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dse.cost import largest_rank, parameters_saved, point_problems
from dse.decomposition import CalibrationWindows, FactorBank
from dse.design_point import REMOVED, WIDTH, DesignPoint, TensorChoice
from dse.errors import CalibrationError, NonFiniteError, ProfileError
from dse.files import cache_dir
from dse.model_parts import Matrix, Mlp
from dse.models import LoadedModel
from dse.progress import ProgressCallback, ignore_progress
from dse.sensitivity.divergence_meter import DivergenceMeter, OptionDivergence
from dse.sensitivity.layer_blocks import Block, blocks_of_topology, groups_that_remain
from dse.sensitivity.measurement_cache import MeasurementCache
from dse.sensitivity.option import Choices, Option, Unit
from dse.sensitivity.profile_settings import ProfileSettings
from dse.sensitivity.sensitivity_curves import BlockCurve, TensorCurve, best_split, rank_of_kept_fraction, split_table
from dse.sensitivity.sensitivity_profile import MeasuredPart, SensitivityProfile
from dse.sensitivity.sensitivity_table import SensitivityTable, TableOrigin
from dse.sensitivity.truncation import truncation_errors

__all__ = ["measure_profile", "measure_profile_share", "profile_origin"]

logger = logging.getLogger("dse")

_BLOCK_KINDS = ("attention", "mlp")


def profile_origin(
    loaded: LoadedModel, windows: Tensor, calibration: CalibrationWindows | None, settings: ProfileSettings
) -> TableOrigin:
    """The origin of a profile of this model, text and calibration; it identifies the profile in the cache.

    Raises:
        CalibrationError: A method needs calibration text and there is none.
    """
    if settings.is_calibrated and calibration is None:
        raise CalibrationError(f"methods {', '.join(settings.methods)} need calibration text, but there is none")
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
    known: Mapping[str, OptionDivergence] | None = None,
    progress: ProgressCallback = ignore_progress,
) -> SensitivityProfile:
    """The sensitivity profile of a model; cached measurements are not repeated.

    Args:
        windows: Token ids of the text to measure the divergence on, shape (windows, tokens).
        calibration: Calibration text, for methods that need it.
        text: Description of the text, stored in the profile.
        folder: Folder of all profiles; default: the user's cache.
        known: Measurements of other processes, by the canonical JSON of their points.
        progress: Called as ("calibrate", ...), ("decompose", ...) and ("sensitivity", done, measurements).

    Raises:
        CalibrationError: A method needs calibration text and there is none.
        ModelError: The model has no output head, or its logits differ from those of its head.
        ProfileError: None of the selected tensors is a decomposable tensor inside the layers.
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
            logger.warning("%s; the profile is rebuilt from its measurements", error)
    bank = FactorBank.build(loaded, settings.rank_requests(loaded.topology), calibration, progress=progress)
    cache = MeasurementCache(home / "measurements.json", origin)
    cache.add(known or {})
    profiler = _Profiler(loaded, windows, bank, cache, settings, progress)
    parts, table = profiler.run(origin)
    profile = SensitivityProfile(loaded.ref, loaded.topology.architecture, text, parts, table)
    profile.write(path)
    return profile


def measure_profile_share(
    loaded: LoadedModel,
    windows: Tensor,
    calibration: CalibrationWindows | None,
    settings: ProfileSettings,
    share: tuple[int, int],
    *,
    progress: ProgressCallback = ignore_progress,
) -> dict[str, OptionDivergence]:
    """Measure every n-th layer of a profile, for n processes that measure it together.

    Args:
        share: Index of this process and number of processes.

    Returns:
        The canonical JSON of each point to its divergence, of all measurements in this machine's cache.
    """
    origin = profile_origin(loaded, windows, calibration, settings)
    cache = MeasurementCache(cache_dir() / "sensitivity" / origin.fingerprint / "measurements.json", origin)
    bank = FactorBank.build(loaded, settings.rank_requests(loaded.topology), calibration, progress=progress)
    _Profiler(loaded, windows, bank, cache, settings, progress).measure_layers(*share)
    return cache.entries


class _Profiler:
    """One run of `measure_profile`: its instruments and its results so far."""

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
                " is selected; name layers or roles that the model has"
            )
        self._progress = progress
        self._done, self._total = 0, self._planned()
        progress("sensitivity", 0, self._total)
        self._meter = DivergenceMeter(loaded, windows, bank)
        self._errors: Mapping[str, Mapping[str, NDArray[np.float64]]] = {
            method: truncation_errors(loaded, self._largest(method), bank, self._meter.batches)
            for method in settings.methods
        }
        self._parts: list[MeasuredPart] = []
        self._curves: dict[str, dict[str, TensorCurve]] = {}

    def _largest(self, method: str) -> dict[str, TensorChoice]:
        """Every matrix to the choice of its largest rank, in the form that has it."""
        found = {}
        for matrix in (m for block in self._blocks for part in block.partitions for m in part):
            choices = [TensorChoice(method, 1, form=form) for form in self._settings.forms_of(matrix)]
            best = max(choices, key=partial(largest_rank, matrix))
            found[matrix.name] = replace(best, rank=largest_rank(matrix, best))
        return found

    def run(self, origin: TableOrigin) -> tuple[tuple[MeasuredPart, ...], SensitivityTable]:
        """Measure all layers; each layer is saved before the next one starts."""
        units = self.measure_layers(0, 1)
        tensors = [part for part in self._parts if part.role not in _BLOCK_KINDS]
        whole_blocks = [part for part in self._parts if part.role in _BLOCK_KINDS]
        topology = self._loaded.topology
        table = SensitivityTable(
            tuple(units), topology.parameters_dense, origin, one_remains=groups_that_remain(topology)
        )
        return (*tensors, *whole_blocks), table

    def measure_layers(self, first: int, step: int) -> list[Unit]:
        """The units of every `step`-th layer, beginning with the one of index `first`."""
        units = []
        layers = (list(blocks) for _, blocks in itertools.groupby(self._blocks, lambda block: block.layer))
        for blocks in itertools.islice(layers, first, None, step):
            try:
                units += [self._unit(block) for block in blocks]
            finally:  # an error, such as out of memory, must not lose what was measured of this layer
                self._cache.save()
        return units

    def _planned(self) -> int:
        """Number of measurements."""
        partitions = [partition for block in self._blocks for partition in block.partitions]
        splits = len(self._settings.block_kept_fractions)
        removable = sum(self._is_removable(block) for block in self._blocks)
        narrow = splits * sum(self._mlp_of(block) is not None for block in self._blocks)
        return len(self._settings.methods) * sum(len(matrices) + splits for matrices in partitions) + narrow + removable

    def _unit(self, block: Block) -> Unit:
        dense = self._dense_parameters(block)
        options = [Option((), dense, 0.0)]
        for method in self._settings.methods:
            for matrices in block.partitions:
                options += self._decompositions(block, matrices, method, dense)
        if (mlp := self._mlp_of(block)) is not None:
            options += self._widths(mlp, dense)
        if self._is_removable(block):
            choices = ((block.name, TensorChoice.removal()),)
            if (divergence := self._measure(choices, block.layer)) is not None:
                self._note(block.name, block.layer, block.kind, REMOVED, 0.0, divergence)
                options.append(self._option(choices, dense, divergence.kl_divergence, divergence))
        distinct = {option.choices: option for option in reversed(options)}
        return Unit(block.name, block.layer, block.kind, tuple(o for o in options if distinct[o.choices] is o))

    def _decompositions(self, block: Block, matrices: Sequence[Matrix], method: str, dense: int) -> list[Option]:
        """One option per kept fraction of the block, measured or interpolated."""
        curves = [c for matrix in matrices if (c := self._curve(matrix, method, block.layer)) is not None]
        if not curves:
            self._advance(len(self._settings.block_kept_fractions))
            return []
        first, *others = self._split_tables(curves)
        table = first
        predicted: dict[Choices, float] = {}
        measured: dict[Choices, OptionDivergence] = {}
        for fraction in self._kept_fractions():
            choices = best_split(table, fraction)
            if choices:
                predicted[choices] = table.divergence_of(DesignPoint(choices))
            if fraction not in self._settings.block_kept_fractions:
                continue
            if not choices:
                self._advance(1)
            elif (divergence := self._measure(choices, block.layer)) is not None:
                measured[choices] = divergence
                kept = table.parameters_dense - self._saved(choices)
                self._note(block.name, block.layer, block.kind, method, kept / table.parameters_dense, divergence)
        correction = BlockCurve.of([(predicted[c], d.kl_divergence) for c, d in measured.items()])
        options = self._interpolated(predicted, measured, correction, dense)
        for table in others:  # at equal ranks they compute the same, so the measurements of the first form hold
            splits = [split for fraction in self._kept_fractions() if (split := best_split(table, fraction))]
            predicted = {split: table.divergence_of(DesignPoint(split)) for split in splits}
            options += self._interpolated(predicted, {}, correction, dense)
        return options

    def _split_tables(self, curves: Sequence[TensorCurve]) -> list[SensitivityTable]:
        """The ranks of a block's tensors in each form that all of them have."""
        common = set.intersection(*(set(self._settings.forms_of(curve.tensor)) for curve in curves))
        forms = [form for form in self._settings.forms if form in common] or [""]
        return [split_table([replace(c, form=form) for c in curves], self._settings.multiple) for form in forms]

    def _widths(self, mlp: Mlp, dense: int) -> list[Option]:
        """One option per kept fraction of an MLP's channels, measured or interpolated."""
        expected = self._bank.channels(mlp.name).divergence
        predicted: dict[Choices, float] = {}
        measured: dict[Choices, OptionDivergence] = {}
        for fraction in self._kept_fractions():
            width = self._settings.width_at(mlp, fraction)
            choices = ((mlp.name, TensorChoice(WIDTH, width)),)
            if width < mlp.channels:
                predicted[choices] = float(expected[width])
            if fraction not in self._settings.block_kept_fractions:
                continue
            if width == mlp.channels:
                self._advance(1)
            elif (divergence := self._measure(choices, mlp.layer)) is not None:
                measured[choices] = divergence
                self._note(mlp.name, mlp.layer, mlp.role, WIDTH, width / mlp.channels, divergence)
        correction = BlockCurve.of([(predicted[c], d.kl_divergence) for c, d in measured.items()])
        return self._interpolated(predicted, measured, correction, dense)

    def _kept_fractions(self) -> list[float]:
        """The kept fractions of the table's options, in descending order."""
        return sorted({*self._settings.table_kept_fractions, *self._settings.block_kept_fractions}, reverse=True)

    def _interpolated(
        self,
        predicted: Mapping[Choices, float],
        measured: Mapping[Choices, OptionDivergence],
        correction: BlockCurve,
        dense: int,
    ) -> list[Option]:
        """Options with their measured divergence, or the predicted one corrected by those that are measured."""
        found, least = [], 0.0
        for choices, divergence_sum in sorted(predicted.items(), key=lambda entry: self._saved(entry[0])):
            known = measured.get(choices)
            # The divergence must not decrease with the parameters removed; a decrease would be measurement noise.
            least = max(least, correction.at(divergence_sum) if known is None else known.kl_divergence)
            found.append(self._option(choices, dense, least, known))
        return found

    def _curve(self, matrix: Matrix, method: str, layer: int) -> TensorCurve | None:
        if matrix.name in self._curves.get(method, {}):  # measured for another partition of the block
            self._advance(1)
            return self._curves[method][matrix.name]
        settings = self._settings
        form = settings.forms_of(matrix)[0]
        rank = rank_of_kept_fraction(matrix, method, settings.tensor_kept_fraction, settings.multiple, form)
        choices = ((matrix.name, TensorChoice(method, rank, form=form)),)
        divergence = self._measure(choices, layer)
        if divergence is None:
            return None
        self._note(matrix.name, layer, matrix.role, method, 1 - self._saved(choices) / matrix.parameters, divergence)
        curve = TensorCurve(matrix, method, self._errors[method][matrix.name], rank, divergence.kl_divergence)
        self._curves.setdefault(method, {})[matrix.name] = curve
        return curve

    def _measure(self, choices: Choices, layer: int) -> OptionDivergence | None:
        """The divergence from the cache or the meter; None if the outputs are not finite."""
        point = DesignPoint(choices)
        divergence = self._cache.get(point)
        if divergence is None:
            try:
                divergence = self._meter.measure(point, layer)
            except NonFiniteError as error:
                logger.warning("%s; the profile leaves it out", error)
            else:
                self._cache.put(point, divergence)
        self._advance(1)
        return divergence

    def _advance(self, measurements: int) -> None:
        """Report measurements as done, including ones that are not needed."""
        self._done += measurements
        self._progress("sensitivity", self._done, self._total)

    def _option(self, choices: Choices, dense: int, divergence: float, known: OptionDivergence | None) -> Option:
        drop = None if known is None else known.log_likelihood_drop
        return Option(choices, dense - self._saved(choices), divergence, drop, is_measured=known is not None)

    def _note(self, name: str, layer: int, role: str, method: str, kept: float, divergence: OptionDivergence) -> None:
        self._parts.append(MeasuredPart(name, layer, role, method, kept, *dataclasses.astuple(divergence)))

    def _saved(self, choices: Sequence[tuple[str, TensorChoice]]) -> int:
        return parameters_saved(self._loaded.topology, DesignPoint(tuple(choices)))

    def _mlp_of(self, block: Block) -> Mlp | None:
        return self._settings.mlp_of(block, self._loaded.topology)

    def _dense_parameters(self, block: Block) -> int:
        """Parameters of the block's matrices, and of the norms that are removed with the block."""
        if not self._is_removable(block):
            return block.parameters
        return max(block.parameters, self._saved(((block.name, TensorChoice.removal()),)))

    def _is_removable(self, block: Block) -> bool:
        """Whether the block alone may be removed from the model, and removals are measured."""
        topology, point = self._loaded.topology, DesignPoint.of({block.name: TensorChoice.removal()})
        return self._settings.with_removals and not point_problems(topology, point)

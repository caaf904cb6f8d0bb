"""The sensitivity table of a study's search space, measured when the study is set up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

from torch import Tensor

from dse.config import StudyConfig
from dse.decomposition import CalibrationWindows, FactorBank, held_out_windows, longest_window
from dse.design_point import DesignPoint
from dse.errors import ModelError, NonFiniteError
from dse.files import cache_dir
from dse.models import LoadedModel
from dse.progress import ProgressCallback
from dse.search.spaces.base import SearchSpace
from dse.search.spaces.depth_profile import DepthProfileSpace
from dse.search.spaces.levels import LevelSpace
from dse.search.spaces.prior_table import level_table
from dse.sensitivity.divergence_meter import DivergenceMeter, OptionDivergence
from dse.sensitivity.layer_blocks import blocks_of_topology
from dse.sensitivity.measure_profile import measure_profile, measure_profile_share, profile_origin
from dse.sensitivity.measurement_cache import MeasurementCache
from dse.sensitivity.option import Unit
from dse.sensitivity.profile_settings import ProfileSettings
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.topology import Topology

__all__ = ["MIN_TRIALS", "measure_table_share", "profile_options", "study_table"]

MIN_TRIALS = 12
"""Smallest budget for which a sensitivity profile pays off: it takes about as long as a few trials."""

_NON_FINITE_DIVERGENCE = 20.0  # nats per token, for options with NaN outputs: above ln(vocabulary size) of any model


def study_table(
    config: StudyConfig,
    loaded: LoadedModel,
    space: SearchSpace,
    bank: FactorBank,
    calibration: CalibrationWindows | None,
    *,
    progress: ProgressCallback,
    notify: Callable[[str], None],
    known: Mapping[str, OptionDivergence] | None = None,
) -> SensitivityTable | None:
    """The measured sensitivity table of the space's options; None if the search does not use one or it is unavailable.

    Measurements are cached by model, calibration and text; an interrupted profile resumes where it stopped.

    Args:
        loaded: Its model, dense.
        bank: Factors up to the largest ranks of the space.
        calibration: Calibration text of the factors, for methods that need it.
        progress: Receives the progress of phase "sensitivity".
        known: Measurements of other processes, by the canonical JSON of their points.

    Raises:
        CalibrationError: There is too little text.
        StorageFullError: The cache is not writable.
    """
    if not _uses_table(config, space):
        return None
    if config.head is not None:
        notify("no sensitivity profile: it needs a language-model head; the search starts without one")
        return None
    windows, settings = _windows_and_settings(config, loaded, space)
    try:
        if isinstance(space, DepthProfileSpace):
            return measure_profile(loaded, windows, calibration, settings, known=known, progress=progress).table
        cache = _level_cache(loaded, windows, calibration, settings)
        cache.add(known or {})
        table = level_table(cast(LevelSpace, space), settings.methods[0])
        return _measured_level_table(table, loaded, windows, bank, cache, progress)
    except ModelError as error:
        notify(f"no sensitivity profile: {error}; the search starts without one")
        return None


def measure_table_share(
    config: StudyConfig,
    loaded: LoadedModel,
    space: SearchSpace,
    bank: FactorBank,
    calibration: CalibrationWindows | None,
    *,
    share: tuple[int, int],
    progress: ProgressCallback,
) -> dict[str, OptionDivergence]:
    """Measure a part of the study's sensitivity table, for several processes that measure it together.

    Args:
        share: Index of this process and number of processes.

    Returns:
        The canonical JSON of each point to its divergence, of all measurements in this machine's cache; nothing if the
        study has no table.
    """
    if not _uses_table(config, space) or config.head is not None:
        return {}
    windows, settings = _windows_and_settings(config, loaded, space)
    try:
        if isinstance(space, DepthProfileSpace):
            return measure_profile_share(loaded, windows, calibration, settings, share, progress=progress)
        cache = _level_cache(loaded, windows, calibration, settings)
        table = level_table(cast(LevelSpace, space), settings.methods[0])
        part = replace(table, units=table.units[share[0] :: share[1]])
        _measured_level_table(part, loaded, windows, bank, cache, progress)
        return cache.entries
    except ModelError:  # `study_table` tells the user
        return {}


def profile_options(config: StudyConfig, topology: Topology, space: SearchSpace) -> dict[int | None, int]:
    """First layer that an option changes to the number of measurements of the study's profile; empty without one."""
    if not _uses_table(config, space) or config.head is not None:
        return {}
    found: dict[int | None, int] = {}
    if isinstance(space, LevelSpace):
        for unit in level_table(space, config.space.methods[0]).units:
            layers = [topology.part(name).layer for name in unit.names]
            first = None if None in layers else min(layer for layer in layers if layer is not None)
            found[first] = found.get(first, 0) + len(unit.options) - 1
        return found
    names = tuple(t.name for t in topology.tensors if t.layer in space.layers and t.role in space.roles)
    settings = ProfileSettings(
        methods=tuple(config.space.methods),
        names=names,
        with_removals=config.space.removal,
        with_widths=config.space.widths,
        forms=config.space.factor_forms,
    )
    for block in blocks_of_topology(topology, settings.names, with_stacks=settings.with_stacks):
        measured = sum(len(part) + len(settings.block_kept_fractions) for part in block.partitions)
        narrow = len(settings.block_kept_fractions) * (settings.mlp_of(block, topology) is not None)
        others = narrow + settings.with_removals
        found[block.layer] = found.get(block.layer, 0) + len(settings.methods) * measured + others
    return found


def _uses_table(config: StudyConfig, space: SearchSpace) -> bool:
    is_asked = config.search_parts.warm_starts and config.budget.trials >= MIN_TRIALS
    return is_asked and isinstance(space, (LevelSpace, DepthProfileSpace))


def _windows_and_settings(
    config: StudyConfig, loaded: LoadedModel, space: SearchSpace
) -> tuple[Tensor, ProfileSettings]:
    """Token ids of the text to measure on, and what is measured."""
    windows = held_out_windows(
        loaded.tokenizer, config.calibration, config.search.profile_tokens, longest_window=longest_window(loaded.model)
    ).to(loaded.device)
    methods = tuple(config.space.methods)
    settings = ProfileSettings(
        methods=methods if isinstance(space, DepthProfileSpace) else methods[:1],
        names=tuple(t.name for t in loaded.topology.tensors if t.layer in space.layers and t.role in space.roles),
        multiple=config.space.ranks.settled_multiple,
        with_removals=config.space.removal,
        with_widths=config.space.widths,
        forms=config.space.factor_forms,
    )
    return windows, settings


def _level_cache(
    loaded: LoadedModel, windows: Tensor, calibration: CalibrationWindows | None, settings: ProfileSettings
) -> MeasurementCache:
    origin = profile_origin(loaded, windows, calibration, settings)
    return MeasurementCache(cache_dir() / "sensitivity" / origin.fingerprint / "measurements.json", origin)


def _measured_level_table(
    table: SensitivityTable,
    loaded: LoadedModel,
    windows: Tensor,
    bank: FactorBank,
    cache: MeasurementCache,
    progress: ProgressCallback,
) -> SensitivityTable:
    """The table of a space's groups at each of their levels, each measured alone."""
    total, done = sum(len(unit.options) - 1 for unit in table.units), 0
    measured: dict[str, Unit] = {}
    meter: DivergenceMeter | None = None
    # In the order of first layers, so that the layers before a group are computed once.
    for unit in sorted(table.units, key=lambda unit: _first_layer(loaded, unit) or 0):
        options = [unit.dense]
        for option in unit.options[1:]:
            point = DesignPoint(option.choices)
            known: OptionDivergence | None = cache.get(point)
            if known is None:
                meter = meter or DivergenceMeter(loaded, windows, bank)
                try:
                    known = meter.measure(point, _first_layer(loaded, unit))
                    cache.put(point, known)
                except NonFiniteError:
                    known = None
            divergence = _NON_FINITE_DIVERGENCE if known is None else max(known.kl_divergence, 0.0)
            options.append(replace(option, divergence=divergence, is_measured=known is not None))
            done += 1
            progress("sensitivity", done, total)
        cache.save()
        measured[unit.name] = replace(unit, options=tuple(options))
    return replace(table, units=tuple(measured[unit.name] for unit in table.units), origin=cache.origin)


def _first_layer(loaded: LoadedModel, unit: Unit) -> int | None:
    """The first layer that a unit changes; None if it changes something outside the layers."""
    layers = [loaded.topology.part(name).layer for name in unit.names]
    return None if None in layers else min(layer for layer in layers if layer is not None)

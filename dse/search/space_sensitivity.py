"""The sensitivity table of a study's search space, measured when the study is set up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
from dse.sensitivity.measure_profile import measure_profile, profile_origin
from dse.sensitivity.measurement_cache import MeasurementCache
from dse.sensitivity.option import Unit
from dse.sensitivity.profile_settings import ProfileSettings
from dse.sensitivity.sensitivity_table import SensitivityTable

__all__ = ["MIN_TRIALS", "study_table"]

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
) -> SensitivityTable | None:
    """The measured sensitivity table of the space's options; None if the search does not use one or it is unavailable.

    Measurements are cached by model, calibration and text; an interrupted profile resumes where it stopped.

    Args:
        loaded: Its model, dense.
        bank: Factors up to the largest ranks of the space.
        calibration: Calibration text of the factors, for methods that need it.
        progress: Receives the progress of phase "sensitivity".

    Raises:
        CalibrationError: There is too little text.
        StorageFullError: The cache is not writable.
    """
    if not config.search_parts.warm_starts or config.budget.trials < MIN_TRIALS:
        return None
    if not isinstance(space, (LevelSpace, DepthProfileSpace)):
        return None
    if config.head is not None:
        notify("no sensitivity profile: it needs a language-model head; the search starts without one")
        return None
    windows = held_out_windows(
        loaded.tokenizer, config.calibration, config.search.profile_tokens, longest_window=longest_window(loaded.model)
    ).to(loaded.device)
    methods = tuple(config.space.methods)
    settings = ProfileSettings(
        methods=methods if isinstance(space, DepthProfileSpace) else methods[:1],
        names=tuple(t.name for t in loaded.topology.tensors if t.layer in space.layers and t.role in space.roles),
        multiple=config.space.ranks.settled_multiple,
        with_removals=config.space.removal,
    )
    try:
        if isinstance(space, DepthProfileSpace):
            return measure_profile(loaded, windows, calibration, settings, progress=progress).table
        return _measured_level_table(space, loaded, windows, bank, calibration, settings, progress)
    except ModelError as error:
        notify(f"no sensitivity profile: {error}; the search starts without one")
        return None


def _measured_level_table(
    space: LevelSpace,
    loaded: LoadedModel,
    windows: Tensor,
    bank: FactorBank,
    calibration: CalibrationWindows | None,
    settings: ProfileSettings,
    progress: ProgressCallback,
) -> SensitivityTable:
    """Each group of the space at each of its levels, measured alone."""
    table = level_table(space, settings.methods[0])
    origin = profile_origin(loaded, windows, calibration, settings)
    cache = MeasurementCache(cache_dir() / "sensitivity" / origin.fingerprint / "measurements.json", origin)
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
    return replace(table, units=tuple(measured[unit.name] for unit in table.units), origin=origin)


def _first_layer(loaded: LoadedModel, unit: Unit) -> int | None:
    """The first layer that a unit changes; None if it changes something outside the layers."""
    layers = [loaded.topology.part(name).layer for name in unit.names]
    return None if None in layers else min(layer for layer in layers if layer is not None)

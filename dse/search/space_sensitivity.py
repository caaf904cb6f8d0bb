"""The divergence table of a study's space, measured at set-up: what allocations, refinement and refitting start from."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dse.config import StudyConfig
from dse.decomposition import CalibrationWindows, FactorBank, held_out_windows, longest_window
from dse.design_point import DesignPoint
from dse.errors import ModelError, NonFiniteError
from dse.files import cache_dir
from dse.models import LoadedModel
from dse.search.spaces.base import SearchSpace
from dse.search.spaces.depth_profile import DepthProfileSpace
from dse.search.spaces.levels import LevelSpace
from dse.search.spaces.prior_table import level_table
from dse.sensitivity import DivergenceMeter, ProfileSettings, measure_profile, profile_origin
from dse.sensitivity.measurements import MeasurementCache
from dse.sensitivity.option import Unit
from dse.sensitivity.sensitivity_table import SensitivityTable
from dse.study.events import StudyListener

__all__ = ["LEAST_TRIALS", "study_table"]

LEAST_TRIALS = 12
"""Trials from which a profile is worth its time: it costs about as much as a few of them."""

_WRECKED = 20.0  # nats per token, for what turns into NaN: above ln of any vocabulary


def study_table(
    config: StudyConfig,
    loaded: LoadedModel,
    space: SearchSpace,
    bank: FactorBank,
    calibration: CalibrationWindows | None,
    listener: StudyListener,
) -> SensitivityTable | None:
    """The measured divergences of the space's options; None where the search does not ask for them or cannot have them.

    Measurements are cached by model, calibration and text; a killed profile goes on where it stood.

    Raises:
        CalibrationError: There is too little text.
        StorageFullError: The cache cannot be written.
    """
    is_profiled = isinstance(space, (LevelSpace, DepthProfileSpace))
    if not (config.search_parts.warm_starts and is_profiled and config.budget.trials >= LEAST_TRIALS):
        return None
    if config.head is not None:
        listener.on_message("no sensitivity profile: it needs a language model's head; the search starts without one")
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
            return measure_profile(loaded, windows, calibration, settings, progress=listener.on_phase).table
        assert isinstance(space, LevelSpace)  # noqa: S101 - the other kind of the two
        return _levels(space, loaded, windows, bank, calibration, settings, listener)
    except ModelError as error:
        listener.on_message(f"no sensitivity profile: {error}; the search starts without one")
        return None


def _levels(
    space: LevelSpace,
    loaded: LoadedModel,
    windows: Tensor,
    bank: FactorBank,
    calibration: CalibrationWindows | None,
    settings: ProfileSettings,
    listener: StudyListener,
) -> SensitivityTable:
    """Each group of the space at each of its levels, measured alone."""
    table = level_table(space, settings.methods[0])
    origin = profile_origin(loaded, windows, calibration, settings)
    cache = MeasurementCache(cache_dir() / "sensitivity" / origin.fingerprint / "measurements.json", origin)
    total, done = sum(len(unit.options) - 1 for unit in table.units), 0
    measured: dict[str, Unit] = {}
    meter: DivergenceMeter | None = None
    # In the order of first layers, so that what lies before a group is computed once.
    for unit in sorted(table.units, key=lambda unit: _first_layer(loaded, unit) or 0):
        options = [unit.dense]
        for option in unit.options[1:]:
            point = DesignPoint(option.choices)
            known = cache.get(point)
            if known is None:
                meter = meter or DivergenceMeter(loaded, windows, bank)
                try:
                    known = meter.measure(point, _first_layer(loaded, unit))
                    cache.put(point, known)
                except NonFiniteError:
                    known = None
            divergence = _WRECKED if known is None else max(known.kl_divergence, 0.0)
            options.append(replace(option, divergence=divergence, is_measured=known is not None))
            done += 1
            listener.on_phase("sensitivity", done, total)
        cache.save()
        measured[unit.name] = replace(unit, options=tuple(options))
    return replace(table, units=tuple(measured[unit.name] for unit in table.units), origin=origin)


def _first_layer(loaded: LoadedModel, unit: Unit) -> int | None:
    layers = [loaded.topology.part(name).layer for name in unit.names]
    return None if None in layers else min(layer for layer in layers if layer is not None)

"""`ranks.multiple: device`: the multiple of ranks that the study's device is timed to like, settled once a study."""

from __future__ import annotations

from collections.abc import Iterable

from dse.config import SearchSpaceConfig, StudyConfig
from dse.measurement import device_lock
from dse.measurement.device_profile import rank_multiple
from dse.measurement.device_profile.model_profile import Phase
from dse.measurement.device_profile.product_timings import ProductTimings
from dse.measurement.device_profile.rank_multiple import rank_multiple_shapes
from dse.models import LoadedModel
from dse.runtime import timings_for
from dse.search.spaces.base import SearchSpace
from dse.study.events import StudyListener
from dse.study.measurement_plan import MeasurementPlan

__all__ = ["settled_space", "settled_study"]


def settled_study(
    config: StudyConfig, loaded: LoadedModel, plan: MeasurementPlan, listener: StudyListener
) -> StudyConfig:
    """The study with a number for a multiple; products are timed in the phases of its latencies, or in all it has.

    Raises:
        ConfigError: The space does not fit the model.
        StorageFullError: A timing cannot be kept.
    """
    if config.space.ranks.multiple != "device":
        return config
    phases = {name: phase for name, phase in plan.phases().items() if loaded.topology.is_decoder or "prefill" in name}
    asked = [phase for name, phase in phases.items() if name in {entry.name for entry in config.objectives}]
    space = settled_space(config.space, loaded, asked or phases.values(), timings_for(loaded.model), listener)
    return config.model_copy(update={"space": space})


def settled_space(
    space: SearchSpaceConfig,
    loaded: LoadedModel,
    phases: Iterable[Phase],
    timings: ProductTimings,
    listener: StudyListener,
) -> SearchSpaceConfig:
    """The space with a number for a multiple, timed now where this device has not timed it yet.

    Raises:
        ConfigError: The space does not fit the model.
        StorageFullError: A timing cannot be kept.
    """
    if space.ranks.multiple != "device":
        return space
    names = SearchSpace.from_config(space.at_multiple(1), loaded.topology).tensor_names()
    experts = loaded.topology.experts_by_name
    sizes = [loaded.topology.matrix(name).shape for name in names if name not in experts]
    phases = tuple(phases)
    shapes = rank_multiple_shapes(sizes, phases)
    with device_lock(loaded.device):
        for done, shape in enumerate(shapes):
            listener.on_phase("rank multiple", done, len(shapes))
            timings.best_seconds(shape)
    listener.on_phase("rank multiple", len(shapes), len(shapes))
    multiple = rank_multiple(sizes, phases, timings)
    reason = "a smaller step would save no time" if multiple > 1 else "no multiple is faster than the ranks below it"
    listener.on_message(f"ranks are multiples of {multiple}: {reason} on this device")
    return space.at_multiple(multiple)

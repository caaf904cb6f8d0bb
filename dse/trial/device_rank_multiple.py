"""`ranks.multiple: device`: find the rank multiple at which this device is fastest, once per study."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dse.config import SearchSpaceConfig, StudyConfig
from dse.measurement import device_lock
from dse.measurement.device_profile import (
    Phase,
    ProductTimings,
    find_rank_multiple,
    rank_multiple_shapes,
    timings_for,
)
from dse.models import LoadedModel
from dse.progress import ProgressCallback
from dse.search.spaces.base import SearchSpace
from dse.trial.measurement_plan import MeasurementPlan

__all__ = ["settled_space", "settled_study"]

_PHASE_OF = {"ttft_s": "prefill_latency_s", "tpot_s": "decode_latency_s", "throughput_tokens_s": "decode_latency_s"}
"""Objective of a serving engine to the latency whose products dominate it."""


def settled_study(
    config: StudyConfig,
    loaded: LoadedModel,
    plan: MeasurementPlan,
    progress: ProgressCallback,
    notify: Callable[[str], None],
    timings: ProductTimings | None = None,
) -> StudyConfig:
    """The study with `device` replaced by a number, from products timed in the phases of its latency objectives.

    A study without latency objectives uses all phases of its model. `timings` are those of a serving engine; None times
    products in this process.

    Raises:
        ConfigError: The space does not fit the model.
        StorageFullError: A timing cannot be stored.
    """
    if config.space.ranks.multiple != "device":
        return config
    phases = {name: phase for name, phase in plan.phases().items() if loaded.topology.is_decoder or "prefill" in name}
    wanted = {_PHASE_OF.get(entry.name, entry.name) for entry in config.objectives}
    asked = [phase for name, phase in phases.items() if name in wanted]
    space = settled_space(
        config.space, loaded, asked or phases.values(), timings or timings_for(loaded.model), progress, notify
    )
    return config.model_copy(update={"space": space})


def settled_space(
    space: SearchSpaceConfig,
    loaded: LoadedModel,
    phases: Iterable[Phase],
    timings: ProductTimings,
    progress: ProgressCallback,
    notify: Callable[[str], None],
) -> SearchSpaceConfig:
    """The space with `device` replaced by a number; products without a timing on this device are timed now.

    Raises:
        ConfigError: The space does not fit the model.
        StorageFullError: A timing cannot be stored.
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
            progress("rank multiple", done, len(shapes))
            timings.seconds(shape)
    progress("rank multiple", len(shapes), len(shapes))
    multiple = find_rank_multiple(sizes, phases, timings)
    reason = "smaller steps save no time" if multiple > 1 else "no multiple is faster than the ranks below it"
    notify(f"ranks are multiples of {multiple}: {reason} on this device")
    return space.at_multiple(multiple)

"""Defaults that depend on the device: the dtype of the weights, and how decode steps are executed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dse.config import StudyConfig
from dse.errors import ConfigError
from dse.measurement import LatencySpec, check_workload, device_in_use
from dse.models import LoadedModel

__all__ = ["settled_mode", "with_device_defaults", "with_stored_defaults"]


def with_device_defaults(
    config: StudyConfig, loaded: LoadedModel, first: LatencySpec, notify: Callable[[str], None]
) -> StudyConfig:
    """The study with dtype and mode named, where it leaves them to the device.

    Args:
        config: The study.
        loaded: Its model, on its device.
        first: The cell of the measurement grid that holds the objectives.
        notify: Receives the reason in one line where the device decides.
    """
    if config.model.dtype == "auto":
        dtype = str(loaded.dtype).removeprefix("torch.")
        if loaded.device.type == "cuda":
            notify(f"dtype {dtype}: the checkpoint's, in which a GPU serves it (`model.dtype`)")
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    if config.measurement.mode == "auto":
        mode, reason = settled_mode(loaded, first)
        if reason:
            notify(f"mode {mode}: {reason} (`measurement.mode`)")
        measurement = config.measurement.model_copy(update={"mode": mode})
        config = config.model_copy(update={"measurement": measurement})
    return config


def settled_mode(loaded: LoadedModel, spec: LatencySpec) -> tuple[str, str]:
    """The mode that "auto" means for a model, and the reason; "" on a CPU, where it is always eager.

    Serving engines decode with CUDA graphs. Batch-1 eager decode on a GPU mostly times Python and kernel launches, of
    which a low-rank layer has more.
    """
    if loaded.device.type != "cuda":
        return "eager", ""
    if getattr(loaded, "waiting", None):
        return "eager", "the weights of one side move between measurements, and a CUDA graph needs them in one place"
    try:
        with device_in_use(loaded.device):
            check_workload(loaded.model, dataclasses.replace(spec, mode="cuda_graph"))
    except ConfigError as error:
        return "eager", " ".join(str(error).split())
    return "cuda_graph", "as in serving; eager decode on a GPU mostly times Python and kernel launches"


def with_stored_defaults(config: StudyConfig, stored: StudyConfig) -> StudyConfig:
    """The study with dtype and mode as its folder has them, where it leaves them to the device."""
    if config.model.dtype == "auto":
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": stored.model.dtype})})
    if config.measurement.mode == "auto":
        measurement = config.measurement.model_copy(update={"mode": stored.measurement.mode})
        config = config.model_copy(update={"measurement": measurement})
    return config

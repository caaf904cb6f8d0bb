"""Engines for measurements: write a design point as the folder that an engine loads, and pair it with the baseline."""

from __future__ import annotations

from pathlib import Path

import torch

from dse.config import MeasurementConfig
from dse.decomposition.surgery import FactorSource
from dse.design_point import DesignPoint
from dse.engines import EngineFormat, EnginePair, EngineSettings, engine_named
from dse.errors import ConfigError, ExportError
from dse.export.point_export import export_point
from dse.models import LoadedModel

__all__ = ["engine_pair", "write_engine_folder"]

_FORMATS = {"huggingface": "transformers", "onnx": "onnx", "openvino": "openvino"}
"""Kind of folder to the export format that writes it."""


def write_engine_folder(
    loaded: LoadedModel, point: DesignPoint, source: FactorSource, folder: Path, form: EngineFormat
) -> None:
    """Write a model at a design point; the dense point writes the dense model.

    The folder is not verified: the engine loads it right away, and a study compares nothing but its timings.

    Args:
        loaded: The dense model; its weights are bit-identical afterwards.
        point: The design point.
        source: Source of the point's factors.
        folder: A folder that does not exist.
        form: The kind of folder.

    Raises:
        ExportError: The engine's format cannot hold the point.
        StorageFullError: The disk has no room.
    """
    if folder_format := _FORMATS.get(form):
        export_point(loaded, point, source, folder, format=folder_format, verify=False)
    else:
        raise ExportError(f"an engine's folder must be of format {' or '.join(_FORMATS)}, but got '{form}'")


def engine_pair(config: MeasurementConfig, loaded: LoadedModel, source: FactorSource | None = None) -> EnginePair:
    """The engine of a study or a command, not started yet.

    Args:
        config: Engine, interpreter, options, time limit and cells.
        loaded: The dense model.
        source: Source of the points' factors; None as long as only the dense model is run.

    Raises:
        EngineUnavailableError: The engine is not installed in its interpreter.
        ConfigError: The model cannot generate.
    """
    engine = engine_named(config.engine)
    engine.check_available(config.python)
    if not loaded.topology.is_decoder:
        raise ConfigError(
            f"engine '{engine.name}' needs a model that generates, but {loaded.topology.architecture} does not; measure"
            " it with `engine: transformers`"
        )
    settings = EngineSettings(
        python=config.python,
        options=config.options,
        time_limit_s=config.engine_time_limit_s,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        threads=torch.get_num_threads() if loaded.device.type == "cpu" else 0,
        context_tokens=max(prompt + new for _, prompt, new in config.cells),
    )
    return EnginePair(engine, settings, loaded, write_engine_folder, source)

"""Write a design point as the folder that an engine loads for a measurement."""

from __future__ import annotations

from pathlib import Path

from dse.decomposition.surgery import FactorSource
from dse.design_point import DesignPoint
from dse.engines import EngineFormat
from dse.errors import ExportError
from dse.export.point_export import export_point
from dse.models import LoadedModel

__all__ = ["write_engine_folder"]

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

"""Every export format by its name. A new format is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dse.design_point import DesignPoint
from dse.errors import ExportError, did_you_mean
from dse.export.decilm_format import check_decilm, write_decilm
from dse.export.dense_form import dense_form_width, merged_state, write_dense_form
from dse.export.low_rank_form import write_low_rank_form
from dse.export.modelling_code import auto_classes
from dse.export.onnx_format import check_onnx, write_onnx
from dse.export.openvino_format import check_openvino, write_openvino
from dse.models import LoadedModel

__all__ = ["EXPORT_FORMATS", "ExportFormat", "Weights", "export_format"]

Weights = Mapping[str, Tensor]
"""Weights by name, as a reload in transformers must have them; empty if transformers does not load the folder."""


@dataclass(frozen=True)
class ExportFormat:
    """One kind of folder.

    Attributes:
        name: Its name on the command line.
        summary: What it is for, in a few words.
        engine: The engine that verifies it before it is put in place.
        write: Writes weights and config of the resident model, to which the point is applied; returns its weights.
        check: Raises `ExportError` if the model or the point cannot be exported in this format.
        weight_files: Patterns of the files that hold the weights.
        needs_remote_code: Whether transformers runs code of the folder.
        is_graph: Whether the folder holds a graph, which transformers does not load.
        extra: The extra of this package that installs what it needs; None if nothing.
    """

    name: str
    summary: str
    engine: str
    write: Callable[[LoadedModel, DesignPoint, Path], Weights]
    check: Callable[[LoadedModel, DesignPoint], None]
    weight_files: tuple[str, ...] = ("*.safetensors",)
    needs_remote_code: bool = False
    is_graph: bool = False
    extra: str | None = None


def _check_architecture(loaded: LoadedModel, point: DesignPoint) -> None:
    auto_classes(loaded.model)


def _low_rank(loaded: LoadedModel, point: DesignPoint, folder: Path) -> Weights:
    if point.is_dense:
        return _dense(loaded, point, folder)
    return write_low_rank_form(loaded.model, loaded.topology, point, auto_classes(loaded.model), folder)


def _dense(loaded: LoadedModel, point: DesignPoint, folder: Path) -> Weights:
    state = merged_state(loaded.model, loaded.topology, point)
    write_dense_form(loaded.model, state, folder, dense_form_width(loaded.model.config, loaded.topology, point))
    return state


def _onnx(loaded: LoadedModel, point: DesignPoint, folder: Path) -> Weights:
    write_onnx(loaded, folder)
    return {}


def _openvino(loaded: LoadedModel, point: DesignPoint, folder: Path) -> Weights:
    write_openvino(loaded, folder)
    return {}


EXPORT_FORMATS: Mapping[str, ExportFormat] = {
    form.name: form
    for form in (
        ExportFormat(
            "transformers",
            "factors, for transformers and vLLM",
            "transformers",
            _low_rank,
            _check_architecture,
            needs_remote_code=True,
        ),
        ExportFormat(
            "dense", "factors multiplied out: runs anywhere, saves nothing", "transformers", _dense, _check_architecture
        ),
        ExportFormat(
            "onnx",
            "a graph for ONNX Runtime",
            "onnxruntime",
            _onnx,
            lambda loaded, point: check_onnx(loaded),
            weight_files=("model.onnx*",),
            is_graph=True,
            extra="onnx",
        ),
        ExportFormat(
            "openvino",
            "a graph for OpenVINO",
            "openvino",
            _openvino,
            lambda loaded, point: check_openvino(loaded),
            weight_files=("openvino_model.*",),
            is_graph=True,
            extra="openvino",
        ),
        ExportFormat(
            "decilm",
            "removed blocks and widths of a Llama-like model as DeciLM, which vLLM runs natively",
            "transformers",
            write_decilm,
            check_decilm,
            needs_remote_code=True,
        ),
    )
}


def export_format(name: str) -> ExportFormat:
    """Look up a format.

    Raises:
        ExportError: The name is unknown.
    """
    if name not in EXPORT_FORMATS:
        known = ", ".join(EXPORT_FORMATS)
        raise ExportError(f"a format must be one of {known}, but got '{name}'{did_you_mean(name, EXPORT_FORMATS)}")
    return EXPORT_FORMATS[name]

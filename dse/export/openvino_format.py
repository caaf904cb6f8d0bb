"""`--format openvino`: OpenVINO's intermediate representation, with the key-value cache as state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dse.export.traced_graph import (
    check_traceable,
    dynamic_shapes,
    example_inputs,
    quiet_tracing,
    tracing_errors,
    write_graph_config,
)
from dse.models import LoadedModel

__all__ = ["check_openvino", "write_openvino"]

GRAPH = "openvino_model.xml"


def check_openvino(loaded: LoadedModel) -> None:
    """Check packages and kind of model.

    Raises:
        ExportError: The model cannot be exported to OpenVINO.
    """
    check_traceable(loaded, "OpenVINO", "openvino", ("openvino",))


def write_openvino(loaded: LoadedModel, folder: Path) -> None:
    """Write `openvino_model.xml`, its weights and config.json of the resident model, with the point applied.

    Inputs are `input_ids`, `attention_mask`, `position_ids` and `beam_idx`, the output `logits`; a request keeps the
    cache, as `optimum.intel.OVModelForCausalLM` and OpenVINO GenAI expect.

    Raises:
        ExportError: The model cannot be traced.
    """
    with tracing_errors("OpenVINO"), quiet_tracing():
        import openvino
        from transformers.exporters import OpenVINOConfig, OpenVINOExporter

        inputs = example_inputs(loaded.model)
        settings = OpenVINOConfig(dynamic_shapes=dynamic_shapes(inputs))
        found: Any = OpenVINOExporter().export(loaded.model, inputs, settings)
        graph = getattr(found, "program", found)  # transformers before 5.22 returns the graph itself
        openvino.save_model(graph, folder / GRAPH, compress_to_fp16=False)
    write_graph_config(loaded.model, inputs, folder)

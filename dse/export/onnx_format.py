"""`--format onnx`: one graph with a key-value cache as inputs and outputs, for ONNX Runtime."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from dse.errors import ExportError
from dse.export.traced_graph import (
    check_traceable,
    dynamic_shapes,
    example_inputs,
    port_names,
    quiet_tracing,
    tracing_errors,
    write_graph_config,
)
from dse.models import LoadedModel

__all__ = ["check_onnx", "write_onnx"]

GRAPH = "model.onnx"
WEIGHTS = "model.onnx_data"
_EMBEDDED_BYTES = 1_500_000_000
"""Largest weights inside the graph file, whose format ends at 2 GB."""

_DTYPES = (torch.float32, torch.float16)


def check_onnx(loaded: LoadedModel) -> None:
    """Check packages, kind of model and dtype.

    Raises:
        ExportError: The model cannot be exported to ONNX.
    """
    check_traceable(loaded, "ONNX", "onnx", ("onnx", "onnxscript", "onnx_ir"))
    if loaded.model.dtype not in _DTYPES:
        raise ExportError(
            f"an export to ONNX must be float32 or float16, which ONNX Runtime computes on a CPU, but the model is"
            f" {str(loaded.model.dtype).removeprefix('torch.')}; load it in float32"
        )


def write_onnx(loaded: LoadedModel, folder: Path) -> None:
    """Write `model.onnx` and config.json of the resident model, with the point applied.

    Inputs are `input_ids`, `attention_mask`, `position_ids` and `past_key_values.N.key|value`, outputs `logits` and
    `present.N.key|value`. Weights of more than 1.5 GB go to a file beside the graph.

    Raises:
        ExportError: The model cannot be traced.
    """
    with tracing_errors("ONNX"), quiet_tracing():
        import onnx_ir
        from transformers.exporters import OnnxConfig, OnnxExporter

        inputs = example_inputs(loaded.model)
        settings = OnnxConfig(dynamic_shapes=dynamic_shapes(inputs))
        found: Any = OnnxExporter().export(loaded.model, inputs, settings)
        found = getattr(found, "program", found)  # transformers before 5.22 returns torch's ONNXProgram
        graph = getattr(found, "model", found)
        for ports, cache in ((graph.graph.inputs, "past_key_values"), (graph.graph.outputs, "present")):
            for port, name in zip(ports, port_names([str(port.name) for port in ports], cache), strict=True):
                port.name = name
        _name_axes(graph.graph)
        weight_bytes = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
        onnx_ir.save(graph, folder / GRAPH, external_data=WEIGHTS if weight_bytes > _EMBEDDED_BYTES else None)
    write_graph_config(loaded.model, inputs, folder)


def _name_axes(graph: Any) -> None:
    """Give the tracer's symbols, such as `s44`, the names of the axes they stand for; they appear in every shape."""
    import onnx_ir

    ports = {port.name: port for port in graph.inputs}
    axes = {("input_ids", 0): "batch_size", ("input_ids", 1): "sequence_length"}
    axes |= {("attention_mask", 1): "total_sequence_length", ("past_key_values.0.key", 2): "past_sequence_length"}
    names: dict[str, str] = {}
    for (port, axis), name in axes.items():
        if port in ports and isinstance(symbol := ports[port].shape[axis], onnx_ir.SymbolicDim):
            names.setdefault(str(symbol.value), name)
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, onnx_ir.SymbolicDim) and size.value is not None:
                text = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), str(size.value))
                value.shape[axis] = onnx_ir.SymbolicDim(text)

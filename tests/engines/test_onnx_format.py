"""`--format onnx`: a graph that ONNX Runtime runs, with the ports that Optimum reads."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from graph_conformance import GraphFormatConformance
from tiny_models import loaded_tiny_model

from dse.errors import ExportError
from dse.export.onnx_format import check_onnx
from dse.export.traced_graph import check_traceable, port_names


class TestOnnxFormat(GraphFormatConformance):
    form: ClassVar[str] = "onnx"
    engine: ClassVar[str] = "onnxruntime"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnx_ir")

    @pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2", "opt"])
    def test_other_families(self, family: str, tmp_path: Path) -> None:
        self.check_family(family, tmp_path)

    def test_ports_have_the_names_that_optimum_reads(self, written: tuple) -> None:
        import onnx

        graph = onnx.load(written[2].folder / "model.onnx").graph
        caches = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
        assert [port.name for port in graph.input] == [
            "input_ids",
            "attention_mask",
            "position_ids",
            *(f"past_key_values.{cache}" for cache in caches),
        ]
        assert [port.name for port in graph.output] == ["logits", *(f"present.{cache}" for cache in caches)]
        axes = [dim.dim_param or dim.dim_value for dim in graph.input[3].type.tensor_type.shape.dim]
        assert axes == ["batch_size", 2, "past_sequence_length", 8]

    def test_bfloat16_is_refused(self) -> None:
        import torch

        loaded = loaded_tiny_model("llama")
        loaded.model.to(torch.bfloat16)
        with pytest.raises(ExportError, match="must be float32 or float16"):
            check_onnx(loaded)


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(ExportError, match=r"no_such_module is not installed; `pip install 'lowrank-dse\[onnx\]'`"):
        check_traceable(loaded_tiny_model("llama"), "ONNX", "onnx", ("json", "no_such_module"))


def test_caches_are_numbered_without_gaps() -> None:
    names = ["input_ids", *(f"input.past_key_values.layers.{n}.{part}" for n in (0, 3) for part in ("keys", "values"))]
    assert port_names(names, "past_key_values") == [
        "input_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]

"""`--format openvino`: a graph whose key-value cache is state, with the ports that Optimum Intel reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from graph_conformance import GraphFormatConformance


class TestOpenVinoFormat(GraphFormatConformance):
    form: ClassVar[str] = "openvino"
    engine: ClassVar[str] = "openvino"
    modules: ClassVar[tuple[str, ...]] = ("openvino",)

    def test_another_family(self, tmp_path: Path) -> None:
        self.check_family("gemma2", tmp_path)

    def test_ports_have_the_names_that_optimum_reads(self, written: tuple) -> None:
        text = (written[2].folder / "openvino_model.xml").read_text(encoding="utf-8")
        ports = set(re.findall(r'names="(\w+)"', text))
        assert {"input_ids", "attention_mask", "position_ids", "beam_idx", "logits"} <= ports
        assert 'type="ReadValue"' in text  # the cache is state, not ports
        assert "past_key_values" not in {port for port in ports if port.startswith("past")}

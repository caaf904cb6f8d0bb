"""What every graph format must do; `test_onnx_format.py` and `test_openvino_format.py` inherit it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
from engine_environments import engine_python, needs_modules
from tiny_models import loaded_encoder, loaded_tiny_model

from dse.decomposition import FactorBank
from dse.design_point import DesignPoint, TensorChoice
from dse.engines import ENGINES, EngineSettings, EngineWork
from dse.errors import ExportError
from dse.export import ExportResult, export_point
from dse.export.reload_check import tensor_digests
from dse.models import LoadedModel

MIXED = {
    "layers.0.query_key_value": TensorChoice("svd", 4),
    "layers.1.gate_up": TensorChoice("tucker", 5),
    "layers.2.down": TensorChoice("tucker", 3),
    "layers.2.query": TensorChoice("svd", 2),
    "layers.2.key": TensorChoice("svd", 5, form="pivoted"),
    "layers.2.attention_output": TensorChoice("svd", 9, form="pivoted"),
    "layers.1.attention": TensorChoice.removal(),
    "layers.0.mlp": TensorChoice.removal(),
}
"""Stacks with and without a core, tensors of different ranks, and one removed block of each kind."""


def exported(loaded: LoadedModel, point: DesignPoint, folder: Path, form: str) -> ExportResult:
    return export_point(
        loaded, point, FactorBank.build(loaded, [point], folder=folder / "bank"), folder / form, format=form
    )


class GraphFormatConformance:
    """A format that holds a graph, and its engine."""

    form: ClassVar[str]
    engine: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        needs_modules(*self.modules)
        engine_python(self.engine)

    @pytest.fixture(scope="class")
    @classmethod
    def written(cls, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, DesignPoint, ExportResult]:
        needs_modules(*cls.modules)
        engine_python(cls.engine)
        folder = tmp_path_factory.mktemp(cls.form)
        loaded = loaded_tiny_model("llama", num_hidden_layers=3)
        before = tensor_digests(loaded.model.state_dict().items())
        point = DesignPoint.of(MIXED)
        result = exported(loaded, point, folder, cls.form)
        assert tensor_digests(loaded.model.state_dict().items()) == before
        return loaded, point, result

    def test_the_engine_computes_what_the_decomposed_model_computes(self, written: tuple) -> None:
        report = written[2].engine_reports[0]
        assert report.engine == self.engine
        assert report.differing_prompts == 0
        assert report.max_difference < 1e-5

    def test_the_folder_holds_config_tokenizer_and_provenance(self, written: tuple) -> None:
        loaded, point, result = written
        names = set(result.files)
        assert {"config.json", "tokenizer.json", "generation_config.json", "verification.json", "README.md"} <= names
        assert (
            DesignPoint.from_json(
                json.loads((result.folder / "design_point.json").read_text(encoding="utf-8")), loaded.topology
            )
            == point
        )
        config = json.loads((result.folder / "config.json").read_text(encoding="utf-8"))
        assert config["model_type"] == "llama"
        assert config["num_hidden_layers"] == 2  # as many as there are caches: one attention block is removed

    def test_the_card_says_how_to_load_it(self, written: tuple) -> None:
        card = (written[2].folder / "README.md").read_text(encoding="utf-8")
        assert f"### {ENGINES[self.engine].title}" in card
        assert "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code" not in card

    def test_batches_of_any_size_generate_as_single_prompts(self, written: tuple) -> None:
        """The graph takes any batch, prompt length and number of cached tokens."""
        work = EngineWork(prompt_tokens=5, new_tokens=3, concurrency=3, requests=6)
        with ENGINES[self.engine].start(written[2].folder, EngineSettings(threads=1)) as session:
            window = session.run(work)
            assert session.greedy([[5, 6, 7], [7, 6, 5, 4]], 1) == [
                tokens[:1] for tokens in session.greedy([[5, 6, 7], [7, 6, 5, 4]], 3)
            ]
        assert window.output_tokens == 18

    def check_family(self, family: str, tmp_path: Path) -> None:
        """Export a low-rank point of another family, which the engine must reproduce."""
        loaded = loaded_tiny_model(family, num_hidden_layers=2)
        names = [tensor.name for tensor in loaded.topology.tensors if tensor.layer == 1]
        point = DesignPoint.of({name: TensorChoice("svd", 3) for name in names})
        result = exported(loaded, point, tmp_path, self.form)
        assert result.engine_reports[0].max_difference < 1e-5

    def test_an_encoder_is_refused_in_one_line(self, tmp_path: Path) -> None:
        loaded = loaded_encoder("bert", "classification")
        with pytest.raises(ExportError, match="needs a decoder that generates text"):
            exported(loaded, DesignPoint.dense(), tmp_path, self.form)
        assert not (tmp_path / self.form).exists()

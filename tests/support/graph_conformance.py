"""What every graph format must do; `test_onnx_format.py` and `test_openvino_format.py` inherit it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
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
    families: ClassVar[tuple[str, ...]] = ("mistral", "qwen3", "gemma2", "gpt_neox", "gpt2", "opt")

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        needs_modules(*self.modules)
        engine_python(self.engine)

    @pytest.fixture(scope="class")
    def written(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, DesignPoint, ExportResult, Path]:
        needs_modules(*self.modules)
        engine_python(self.engine)
        folder = tmp_path_factory.mktemp(self.form)
        loaded = loaded_tiny_model("llama", num_hidden_layers=3)
        before = tensor_digests(loaded.model.state_dict().items())
        point = DesignPoint.of(MIXED)
        result = exported(loaded, point, folder, self.form)
        assert tensor_digests(loaded.model.state_dict().items()) == before
        return loaded, point, result, folder

    def test_the_engine_computes_what_the_decomposed_model_computes(self, written: tuple) -> None:
        report = written[2].engine_reports[0]
        assert report.engine == self.engine
        assert report.differing_prompts == 0
        assert report.max_difference < 1e-5

    def test_the_folder_holds_config_tokenizer_and_provenance(self, written: tuple) -> None:
        loaded, point, result, _ = written
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

    def test_it_is_smaller_than_the_dense_graph(self, written: tuple) -> None:
        assert written[2].weight_file_bytes < written[2].dense_weight_bytes * 4  # tiny: names weigh more than weights
        assert 0 < written[2].reduction < 1

    def test_batches_of_any_size_generate_as_single_prompts(self, written: tuple) -> None:
        """The graph takes any batch, prompt length and number of cached tokens."""
        work = EngineWork(prompt_tokens=5, new_tokens=3, concurrency=3, requests=6)
        with ENGINES[self.engine].start(written[2].folder, EngineSettings(threads=1)) as session:
            window = session.run(work)
            assert session.greedy([[5, 6, 7], [7, 6, 5, 4]], 1) == [
                tokens[:1] for tokens in session.greedy([[5, 6, 7], [7, 6, 5, 4]], 3)
            ]
        assert window.output_tokens == 18

    @pytest.mark.parametrize("index", range(6))
    def test_other_families(self, index: int, tmp_path: Path) -> None:
        loaded = loaded_tiny_model(self.families[index], num_hidden_layers=2)
        names = [tensor.name for tensor in loaded.topology.tensors if tensor.layer == 1]
        point = DesignPoint.of({name: TensorChoice("svd", 3) for name in names})
        result = exported(loaded, point, tmp_path, self.form)
        assert result.engine_reports[0].max_difference < 1e-5

    def test_an_encoder_is_refused_in_one_line(self, tmp_path: Path) -> None:
        loaded = loaded_encoder("bert", "classification")
        with pytest.raises(ExportError, match="needs a decoder that generates text"):
            exported(loaded, DesignPoint.dense(), tmp_path, self.form)
        assert not (tmp_path / self.form).exists()

    @pytest.mark.real_model
    def test_smollm2(self, tmp_path: Path) -> None:
        import dse

        threads = torch.get_num_threads()
        loaded = dse.load_model("demo:smollm2-135m-instruct")
        point = DesignPoint.of(
            {
                **{f"layers.{layer}.gate_up": TensorChoice("svd", 200) for layer in (20, 21)},
                **{f"layers.{layer}.down": TensorChoice("tucker", 180) for layer in (10, 11)},
                "layers.14.attention": TensorChoice.removal(),
                "layers.25.mlp": TensorChoice.removal(),
            }
        )
        torch.set_num_threads(2)
        try:
            result = exported(loaded, point, tmp_path, self.form)
        finally:
            torch.set_num_threads(threads)
        report = result.engine_reports[0]
        assert report.differing_prompts == 0
        assert report.max_difference < 2e-4
        # Embeddings and the output head are tied, and a graph holds them once.
        expected = (1 - result.reduction) * result.dense_weight_bytes
        assert result.weight_file_bytes == pytest.approx(expected, rel=0.03)

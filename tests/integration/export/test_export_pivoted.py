"""Exports of points with pivoted factors: they load without dse, and compute like the resident model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from export_families import FAMILIES, GREEDY, TOKENS, reloaded
from tiny_models import loaded_tiny_model, tiny_model, with_random_vectors

from dse.cost import point_cost
from dse.decomposition import FactorBank, PivotedLinear, decompose
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ExportError
from dse.export import export_point
from dse.export.low_rank_form import _as_ranges
from dse.export.templates.modeling_lowrank import numbers_of
from dse.models import LoadedModel
from dse.models.transformers_patches import quiet_transformers


def mixed(loaded: LoadedModel) -> DesignPoint:
    """Every tensor of layer 1 pivoted, one of layer 0 with two factors, the last MLP removed if it can be."""
    pivoted = {t.name: TensorChoice("svd", 5, form="pivoted") for t in loaded.topology.tensors if t.layer == 1}
    plain = next(t.name for t in loaded.topology.tensors if t.layer == 0)
    removed = [block.name for block in loaded.topology.blocks if block.name == "layers.0.mlp"]
    return DesignPoint.of(pivoted | {plain: TensorChoice("svd", 4)} | dict.fromkeys(removed, TensorChoice.removal()))


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_with_pivoted_factors_reload_exactly(family: str, tmp_path: Path, make_loaded: Callable) -> None:
    loaded = make_loaded(with_random_vectors(tiny_model(family, initializer_range=0.2)))
    point, verify = mixed(loaded), family in ("llama", "gpt2")
    bank = FactorBank.build(loaded, [point], None, folder=tmp_path / "bank")
    result = export_point(loaded, point, bank, tmp_path / "thin", verify=verify)
    of_dense = export_point(loaded, point, bank, tmp_path / "dense", format="dense", verify=verify)
    thin = reloaded(family, tmp_path / "thin", trust_remote_code=True)
    dense = reloaded(family, tmp_path / "dense")
    with torch.inference_mode(), decompose(loaded, point, bank):
        expected = loaded.model(TOKENS).logits
        assert torch.equal(thin(TOKENS).logits, expected)
        torch.testing.assert_close(dense(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)
    held = sum(p.numel() for p in thin.parameters())
    assert held == point_cost(loaded.topology, point).parameters == result.parameters
    assert of_dense.parameters == loaded.topology.parameters_dense
    card = (tmp_path / "thin" / "README.md").read_text()
    assert '"form": "pivoted"' in card
    assert "of them as independent rows or columns" in card
    assert not [name for name in thin.state_dict() if name.endswith("order")]


def test_pivoted_factors_are_split_over_devices_like_their_matrix(tmp_path: Path, make_loaded: Callable) -> None:
    """Independent columns of a matrix that is split by outputs, independent rows of one that is split by inputs."""
    loaded = make_loaded(with_random_vectors(tiny_model("llama", initializer_range=0.2)))
    point = mixed(loaded)
    bank = FactorBank.build(loaded, [point], None, folder=tmp_path / "bank")
    export_point(loaded, point, bank, tmp_path / "thin", verify=False)
    thin = reloaded("llama", tmp_path / "thin", trust_remote_code=True)
    plan = thin.config.base_model_tp_plan
    for name, dense in (("self_attn.q_proj", "colwise"), ("mlp.down_proj", "rowwise")):
        module = thin.get_submodule(f"model.layers.1.{name}")
        assert module.of_columns == (dense == "colwise")
        assert plan[f"layers.*.{name}.pivots"] == dense
        assert plan[f"layers.*.{name}.combinations"] == "replicate"
        assert list(plan).index(f"layers.*.{name}.pivots") < list(plan).index(f"layers.*.{name}$")
    form = json.loads((tmp_path / "thin" / "config.json").read_text())["low_rank"]["layers.1.mlp.down_proj"]
    assert numbers_of(form["rows"]) == list(thin.model.layers[1].mlp.down_proj.chosen)


def test_a_pivoted_export_generates_and_compiles(tmp_path: Path, make_loaded: Callable) -> None:
    loaded = make_loaded(with_random_vectors(tiny_model("qwen2", initializer_range=0.2)))
    point = mixed(loaded)
    bank = FactorBank.build(loaded, [point], None, folder=tmp_path / "bank")
    export_point(loaded, point, bank, tmp_path / "thin", verify=False)
    thin = reloaded("llama", tmp_path / "thin", trust_remote_code=True)
    with torch.inference_mode(), decompose(loaded, point, bank):
        assert torch.equal(thin.generate(TOKENS, **GREEDY), loaded.model.generate(TOKENS, **GREEDY))
    one = next(module for module in thin.modules() if type(module).__name__ == PivotedLinear.__name__)
    x = torch.randn(2, 3, one.in_features)
    traced = torch.export.export(one, (x,)).module()
    compiled = torch.compile(one, fullgraph=True, backend="eager")
    with torch.inference_mode():
        torch.testing.assert_close(traced(x), one(x))
        torch.testing.assert_close(compiled(x), one(x))


def test_a_half_precision_copy_and_a_body_load(tmp_path: Path, make_loaded: Callable) -> None:
    loaded = make_loaded(with_random_vectors(tiny_model("llama", initializer_range=0.2)))
    point = mixed(loaded)
    bank = FactorBank.build(loaded, [point], None, folder=tmp_path / "bank")
    export_point(loaded, point, bank, tmp_path / "thin", verify=False)
    whole = reloaded("llama", tmp_path / "thin", trust_remote_code=True)
    half = reloaded("llama", tmp_path / "thin", trust_remote_code=True, dtype=torch.bfloat16)
    with quiet_transformers():
        body = hf.AutoModel.from_pretrained(tmp_path / "thin", trust_remote_code=True).eval()
    with torch.inference_mode():
        expected = whole(TOKENS, output_hidden_states=True)
        assert torch.equal(body(TOKENS).last_hidden_state, expected.hidden_states[-1])
        apart = (half(TOKENS).logits.float() - expected.logits).abs().max()
    assert 0 < float(apart) < 0.05 * float(expected.logits.abs().max())
    # A config alone builds the model, as engines do.
    again = hf.AutoModelForCausalLM.from_config(whole.config, trust_remote_code=True).eval()
    again.load_state_dict(whole.state_dict())
    with torch.inference_mode():
        assert torch.equal(again(TOKENS).logits, expected.logits)


def test_decilm_refuses_pivoted_factors(tmp_path: Path) -> None:
    loaded = loaded_tiny_model("llama")
    point = DesignPoint.of({"layers.0.up": TensorChoice("svd", 3, form="pivoted")})
    bank = FactorBank.build(loaded, [point], None, folder=tmp_path / "bank")
    with pytest.raises(ExportError, match="it decomposes 1 tensors"):
        export_point(loaded, point, bank, tmp_path / "deci", format="decilm", verify=False)


def test_independent_columns_are_written_as_ranges() -> None:
    for numbers, written in (([0, 1, 2, 3, 7, 9, 10], "0-3,7,9-10"), ([4], "4"), ([0, 2], "0,2")):
        assert _as_ranges(numbers) == written
        assert numbers_of(written) == numbers

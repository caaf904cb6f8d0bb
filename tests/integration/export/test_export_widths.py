"""Exports of points with MLPs of reduced width: they load without dse, and compute like the resident model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from decomposition_support import windows_of
from export_families import FAMILIES, GREEDY, TOKENS, reloaded
from tiny_models import tiny_model, with_random_vectors

from dse.cost import point_cost
from dse.decomposition import FactorBank, decompose
from dse.design_point import DesignPoint, TensorChoice
from dse.export import export_point
from dse.models import LoadedModel, topology_of

WINDOWS = windows_of(torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(1)))


def with_widths(loaded: LoadedModel, *widths: int) -> DesignPoint:
    return DesignPoint.of(
        {
            mlp.name: TensorChoice("width", width)
            for mlp, width in zip(loaded.topology.mlps, widths, strict=True)
            if width < mlp.channels
        }
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_with_widths_reload_exactly(family: str, tmp_path: Path, make_loaded: Callable) -> None:
    """In the low-rank form every MLP has its own width, in the dense form all have one, filled up with zeros."""
    loaded = make_loaded(with_random_vectors(tiny_model(family)))
    topology, verify = loaded.topology, family == "llama"
    narrow = with_widths(loaded, 24, 16, 40)
    query = next(t.name for t in topology.tensors if t.role in ("query", "query_key_value") and t.layer == 1)
    points = {
        "narrow": narrow,
        "mixed": DesignPoint((*with_widths(loaded, 24, 48, 16).choices, (query, TensorChoice("svd", 4)))),
    }
    bank = FactorBank.build(loaded, points.values(), WINDOWS, folder=tmp_path / "bank")
    for name, point in points.items():
        result = export_point(loaded, point, bank, tmp_path / name, verify=verify)
        of_dense = export_point(loaded, point, bank, tmp_path / f"{name}-dense", format="dense", verify=verify)
        thin = reloaded(family, tmp_path / name, trust_remote_code=True)
        dense = reloaded(family, tmp_path / f"{name}-dense")
        with torch.inference_mode(), decompose(loaded, point, bank):
            expected = loaded.model(TOKENS).logits
            assert torch.equal(thin(TOKENS).logits, expected)
            torch.testing.assert_close(dense(TOKENS).logits, expected, atol=1e-5, rtol=1e-4)
        held = sum(p.numel() for p in thin.parameters())
        assert held == point_cost(topology, point).parameters == result.parameters
        assert sum(p.numel() for p in dense.parameters()) == of_dense.parameters
        assert type(dense) is type(loaded.model)
        # Only a point that narrows every MLP makes the dense form smaller: to the largest width.
        smaller = sum(mlp.parameters_per_channel * (48 - 40) for mlp in topology.mlps) if name == "narrow" else 0
        assert of_dense.parameters == topology.parameters_dense - smaller
    assert [mlp.channels for mlp in topology_of(dense).mlps] == [48, 48, 48]
    card = (tmp_path / "narrow" / "README.md").read_text()
    assert "3 of its 3 MLPs reduced to 16 to 40 channels" in card
    assert "fewer parameters. Its MLPs have one width" in (tmp_path / "narrow-dense" / "README.md").read_text()
    assert "**saves nothing**" in (tmp_path / "mixed-dense" / "README.md").read_text()


def test_a_narrow_export_generates_with_a_cache(tmp_path: Path, make_loaded: Callable) -> None:
    loaded = make_loaded(with_random_vectors(tiny_model("qwen2")))
    point = with_widths(loaded, 24, 16, 40)
    bank = FactorBank.build(loaded, [point], WINDOWS, folder=tmp_path / "bank")
    export_point(loaded, point, bank, tmp_path / "narrow", verify=False)
    thin = reloaded("llama", tmp_path / "narrow", trust_remote_code=True)
    with torch.inference_mode(), decompose(loaded, point, bank):
        assert torch.equal(thin.generate(TOKENS, **GREEDY), loaded.model.generate(TOKENS, **GREEDY))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_decilm_has_a_width_for_each_layer(family: str, tmp_path: Path, make_loaded: Callable) -> None:
    """The format that vLLM runs natively, for a point of widths and a removed block."""
    loaded = make_loaded(with_random_vectors(tiny_model(family)))
    point = DesignPoint((*with_widths(loaded, 24, 48, 16).choices, ("layers.1.mlp", TensorChoice.removal())))
    bank = FactorBank.build(loaded, [point], WINDOWS, folder=tmp_path / "bank")
    result = export_point(loaded, point, bank, tmp_path / "deci", format="decilm", verify=family == "llama")
    thin = reloaded("llama", tmp_path / "deci", trust_remote_code=True)
    assert [block.ffn.intermediate_size for block in thin.config.block_configs] == [24, None, 16]
    with torch.inference_mode(), decompose(loaded, point, bank):
        torch.testing.assert_close(thin(TOKENS).logits, loaded.model(TOKENS).logits, atol=1e-5, rtol=1e-4)
    assert sum(p.numel() for p in thin.parameters()) == result.parameters

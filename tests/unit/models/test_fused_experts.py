"""Fused expert tensors in the topology: the supported layout, and the reasons why others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import EXPERT_ROLES, tiny_model
from torch import nn

from dse.cost import point_cost
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import PointError
from dse.models import topology_of

DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
}


def on_meta(family: str, **changes: Any) -> hf.PreTrainedModel:
    with torch.device("meta"):
        return tiny_model(family, **changes)


def test_mixtral_experts_have_three_dimensions() -> None:
    topology = topology_of(tiny_model("mixtral"))
    assert [t.name for t in topology.experts[:3]] == [
        "layers.0.expert_gate_up", "layers.0.expert_down", "layers.1.expert_gate_up",
    ]  # fmt: skip
    assert [t.shape for t in topology.experts] == 3 * [(4, 96, 32), (4, 32, 48)]
    assert {t.experts_per_token for t in topology.experts} == {2}
    assert topology.experts[0].module == "model.layers.0.mlp.experts"
    assert topology.experts[0].parameter == "gate_up_proj"
    # They can be selected by name and role but are not part of "all", because not every method supports them.
    assert topology.part("layers.2.expert_down") is topology.experts[5]
    assert topology.select([1], EXPERT_ROLES) == ("layers.1.expert_gate_up", "layers.1.expert_down")
    assert not any("expert" in name for name in topology.select())
    assert topology.blocks_by_name["layers.1.mlp"].experts == topology.select([1], EXPERT_ROLES)
    with pytest.raises(PointError, match=r"'layers\.0\.expert_down' is a fused expert tensor of shape 4 x 32 x 48"):
        topology.matrix("layers.0.expert_down")


FAMILIES: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "Qwen3Moe": ("qwen3_moe", {}, [0, 1, 2]),
    "Qwen3MoeWithDenseLayers": ("qwen3_moe", {"mlp_only_layers": [0]}, [1, 2]),
    "Qwen2Moe": ("qwen2_moe", {}, [0, 1, 2]),
    "Olmoe": ("olmoe", {}, [0, 1, 2]),
    "GraniteMoe": ("granitemoe", {}, [0, 1, 2]),
    "DeepseekV3": ("deepseek_v3", DEEPSEEK, [1, 2]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_the_supported_layout_have_expert_tensors(family: str) -> None:
    model_type, changes, layers = FAMILIES[family]
    topology = topology_of(on_meta(model_type, **changes))
    assert sorted({tensor.layer for tensor in topology.experts}) == layers
    assert len(topology.experts) == 2 * len(layers)
    assert not topology.experts_refused
    parameters = dict(on_meta(model_type, **changes).named_parameters())
    for tensor in topology.experts:
        assert tuple(parameters[f"{tensor.module}.{tensor.parameter}"].shape) == tensor.shape
        assert not any(tensor.module == path for path in topology.unmapped)


OTHERS = {
    "gpt_oss": "store their weights transposed",
    "llama4_text": "does not compute the sum over a token's experts",
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_layouts_are_refused_with_the_reason(family: str) -> None:
    reason = OTHERS[family]
    topology = topology_of(on_meta(family))
    assert not topology.experts
    assert set(topology.experts_refused) == {f"layers.{i}.{role}" for i in range(3) for role in EXPERT_ROLES}
    with pytest.raises(PointError, match=f"'layers.0.expert_down' must be a fused expert tensor.*{reason}.*remove it"):
        DesignPoint.from_json({"tensors": {"layers.0.expert_down": {"method": "tucker", "rank": 2}}}, topology)
    with pytest.raises(PointError, match=reason):
        DesignPoint.uniform(topology, "tucker", 2, roles=["expert_down"])
    # They stay dense and are counted.
    assert any(path.endswith("experts") for path in topology.unmapped)


def test_a_module_that_computes_something_else_is_refused() -> None:
    model = tiny_model("mixtral")
    kind = type(model.model.layers[0].mlp.experts)

    class Doubled(kind):  # type: ignore[misc, valid-type]
        def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(*arguments)

    model.model.layers[1].mlp.experts.__class__ = Doubled
    topology = topology_of(model)
    assert {t.layer for t in topology.experts} == {0, 2}
    assert "Doubled does not compute the sum" in topology.experts_refused["layers.1.expert_down"]


def test_shared_experts_weights_are_refused() -> None:
    model = tiny_model("mixtral")
    first, second = model.model.layers[0].mlp.experts, model.model.layers[1].mlp.experts
    second.down_proj = first.down_proj
    topology = topology_of(model)
    assert {t.layer for t in topology.experts} == {2}
    assert "shares its weights" in topology.experts_refused["layers.0.expert_gate_up"]


def test_an_additional_parameter_is_refused() -> None:
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.experts.scale = nn.Parameter(torch.ones(4, 1))
    assert (
        "are not a pair of 3-D gate_up_proj and down_proj" in topology_of(model).experts_refused["layers.0.expert_down"]
    )


def test_cost_of_a_published_size_by_hand() -> None:
    """Mixtral-8x7B: 8 experts of three 14336 x 4096 matrices in each of 32 layers, two experts per token."""
    published = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8}
    topology = topology_of(on_meta("mixtral", **published, **heads))
    assert topology.parameters_dense == 46_702_792_704
    point = DesignPoint.uniform(topology, "tucker", 2048, roles=EXPERT_ROLES)
    gate_up = 8 * 2048**2 + 2048 * (28672 + 4096)
    down = 8 * 2048**2 + 2048 * (4096 + 14336)
    saved = 32 * (8 * 3 * 14336 * 4096 - gate_up - down)
    here, dense = point_cost(topology, point), point_cost(topology, DesignPoint.dense())
    assert here.parameters == topology.parameters_dense - saved
    per_token = 32 * (
        (2048 * 4096 + 2 * 2048**2 + 2 * 28672 * 2048) + (2 * 2048 * 14336 + 2 * 2048**2 + 4096 * 2048)
    )  # fmt: skip
    dense_per_token = 32 * 2 * 3 * 14336 * 4096
    assert here.flops_decode_per_token is not None
    assert dense.flops_decode_per_token is not None
    assert dense.flops_decode_per_token - here.flops_decode_per_token == 2 * (dense_per_token - per_token)
    assert dense.flops_prefill_per_token - here.flops_prefill_per_token == 2 * (dense_per_token - per_token)


def test_points_write_the_expert_rank_only_if_set() -> None:
    topology = topology_of(tiny_model("mixtral"))
    point = DesignPoint.of(
        {"layers.0.expert_down": TensorChoice("tucker", 4, 2), "layers.0.expert_gate_up": TensorChoice("tucker", 4)}
    )
    assert point.to_json() == {
        "tensors": {
            "layers.0.expert_down": {"method": "tucker", "rank": 4, "expert_rank": 2},
            "layers.0.expert_gate_up": {"method": "tucker", "rank": 4},
        }
    }
    assert DesignPoint.from_json(point.to_json(), topology) == point
    assert point.compact(topology) is None
    compact = {"method": "tucker", "rank": 4, "expert_rank": 2, "layers": [0, 1], "roles": EXPERT_ROLES}
    assert DesignPoint.from_json(compact, topology).compact(topology) == compact
    for wrong in (-1, True, 1.0, "2"):
        with pytest.raises(PointError, match="`expert_rank >= 0` must hold"):
            DesignPoint.from_json({**compact, "expert_rank": wrong}, topology)
    with pytest.raises(PointError, match="`expert_rank` applies to method 'tucker'"):
        TensorChoice("svd", 4, 2)

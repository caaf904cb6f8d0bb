"""Architectures without built-in rules, mixtures of experts, and user-defined roles."""

from __future__ import annotations

import re

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from torch import nn

from dse.errors import ModelError, UnknownArchitectureError
from dse.models import topology_of
from dse.models.roles import ROLE_SUFFIXES, role_of


def mamba() -> hf.PreTrainedModel:
    return tiny_model("mamba")


def llama(**changes: object) -> hf.PreTrainedModel:
    return tiny_model("llama", vocab_size=64, pad_token_id=0, **changes)


def test_unknown_architecture_lists_what_was_found_and_how_to_name_it() -> None:
    with pytest.raises(UnknownArchitectureError) as caught:
        topology_of(mamba())
    message = str(caught.value)
    for found in ("MambaForCausalLM", "'backbone.layers'", "mixer.in_proj (128 x 32)", "mixer.out_proj (32 x 64)"):
        assert found in message
    assert "`role_names: {mixer.in_proj: in_proj}`" in message
    assert "\n" not in message


def test_the_remedy_of_the_error_works() -> None:
    model = mamba()
    with pytest.raises(UnknownArchitectureError) as caught:
        topology_of(model)
    suffix, role = re.search(r"role_names: \{(\S+): (\S+)\}", str(caught.value)).groups()  # type: ignore[union-attr]
    topology = topology_of(model, {suffix: role})
    assert topology.roles == (role,)
    assert [t.module for t in topology.tensors] == [f"backbone.layers.{i}.mixer.in_proj" for i in range(3)]


def test_user_roles_follow_known_roles_and_other_modules_stay_unmapped() -> None:
    topology = topology_of(mamba(), {"mixer.out_proj": "output", "mixer.in_proj": "input", "x_proj": "selection"})
    assert topology.roles == (
        "output",
        "input",
        "selection",
    )  # `output` is a known role; the others follow in registration order
    assert topology.tensors[0].module == "backbone.layers.0.mixer.out_proj"
    assert set(topology.unmapped) == {
        f"backbone.layers.{i}.mixer{module}" for i in range(3) for module in ("", ".conv1d", ".dt_proj")
    }


def test_an_untied_head_can_be_given_a_role() -> None:
    topology = topology_of(llama(tie_word_embeddings=False), {"lm_head": "head"})
    head = topology["head"]
    assert (head.module, head.layer, head.shape) == ("lm_head", None, (64, 32))
    assert "head" not in topology.roles
    assert topology.head_parameters == 64 * 32


@pytest.mark.parametrize("inside", [False, True])
def test_tied_weights_are_never_untied(inside: bool) -> None:
    if not inside:
        with pytest.raises(ModelError, match=r"tied weight cannot be decomposed.*'lm_head'.*untie"):
            topology_of(llama(tie_word_embeddings=True), {"lm_head": "head"})
        return
    model = llama()
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    topology = topology_of(model)
    assert "layers.0.up" not in topology.by_name
    assert "layers.1.up" not in topology.by_name
    assert "layers.2.up" in topology.by_name
    assert "model.layers.0.mlp.up_proj" in topology.unmapped
    assert topology.parameters_dense == topology_of(llama()).parameters_dense - 48 * 32
    with pytest.raises(ModelError, match="tied weight"):
        topology_of(model, {"mlp.up_proj": "up"})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"mixer.in_proj": "input"}, "no path ends in 'mixer.in_proj'"),
        ({"mlp.up_prj": "up"}, "did you mean 'mlp.up_proj'"),
        ({"embed_tokens": "embedding"}, "which is of type Embedding"),
        ({"q_proj": "Query"}, "lower-case"),
        ({"q_proj": "layers"}, "lower-case"),
        ({"": "query"}, "end of a module path"),
        ({"q_proj.": "query"}, "end of a module path"),
        ({"q_proj": 3}, "lower-case"),
        ({3: "query"}, "end of a module path"),
        ({"mlp.up_proj": "gate"}, "'gate' fits both.*give them different roles"),
    ],
)
def test_invalid_role_names_are_refused(names: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        topology_of(llama(), names)


def test_one_role_for_two_modules_outside_the_layers_is_refused() -> None:
    model = tiny_model("roberta")
    assert topology_of(model, {"lm_head.dense": "transform"})["transform"].module == "lm_head.dense"
    model.lm_head.extra = nn.Module()
    model.lm_head.extra.dense = nn.Linear(8, 8)
    with pytest.raises(ModelError, match=r"'transform' fits both 'lm_head.dense' and 'lm_head.extra.dense'"):
        topology_of(model, {"lm_head.dense": "transform", "extra.dense": "transform"})


def test_encoder_decoders_are_ambiguous_until_named() -> None:
    model = tiny_model("t5")
    with pytest.raises(UnknownArchitectureError, match=r"SelfAttention\.q \(32 x 32\)"):
        topology_of(model)
    topology = topology_of(model, {"EncDecAttention.q": "cross_query", "SelfAttention.q": "query"})
    assert topology.roles == ("query", "cross_query")


def test_layers_that_share_weights_are_refused() -> None:
    with pytest.raises(UnknownArchitectureError, match="runs 3 layers over 1 blocks"):
        topology_of(tiny_model("albert"))


def test_a_model_without_layers_is_refused() -> None:
    model = llama()
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(UnknownArchitectureError, match="must repeat one block"):
        topology_of(model)


def test_layers_of_linear_subclasses_are_refused_without_a_false_remedy() -> None:
    with pytest.raises(UnknownArchitectureError, match=r"hold FalconLinear only.*not supported"):
        topology_of(tiny_model("falcon"))


def test_subclasses_of_linear_are_not_decomposable() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = llama()
    model.model.layers[1].self_attn.q_proj = Scaled(32, 32, bias=False)
    topology = topology_of(model)
    assert "layers.1.query" not in topology.by_name
    assert topology.unmapped == ("model.layers.1.self_attn.q_proj",)
    assert topology.other_matmul_parameters == 32 * 32


def test_routers_and_experts_are_not_matrices_but_are_counted() -> None:
    topology = topology_of(tiny_model("mixtral"))
    assert topology.roles == ("query", "key", "value", "attention_output")
    assert set(topology.unmapped) == {f"model.layers.{i}.mlp.gate" for i in range(3)}
    # A token uses the router (4 x 32) and two of the four experts, each of three 48 x 32 matrices.
    assert topology.other_matmul_parameters == 3 * (4 * 32 + 2 * 3 * 48 * 32)


def test_shared_experts_have_their_own_roles() -> None:
    topology = topology_of(tiny_model("qwen2_moe"))
    assert topology.roles[-3:] == ("shared_gate", "shared_up", "shared_down")
    assert topology["layers.2.shared_up"].shape == (40, 32)


@settings(deadline=None)
@given(st.text(alphabet="abq_.proj", max_size=20))
def test_the_longest_suffix_wins_for_any_prefix(prefix: str) -> None:
    assert role_of(f"{prefix}.attention.output.dense", {}) == "attention_output"
    assert role_of(f"{prefix}.output.dense", {}) == "output"
    assert role_of(f"{prefix}.output.dense", {"output.dense": "other"}) == "other"
    assert role_of(f"{prefix}xq_proj", {}) != "query"  # a suffix ends at a dot, not inside a word


def test_every_suffix_has_one_role() -> None:
    suffixes = [suffix for known in ROLE_SUFFIXES.values() for suffix in known]
    assert len(suffixes) == len(set(suffixes))

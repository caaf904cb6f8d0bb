"""Removed blocks: the model computes as if they returned zero, generates correctly, and is restored bit for bit."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from tiny_models import as_loaded, tiny_model, with_random_vectors
from torch import nn

from dse.cost import check_point, point_cost
from dse.decomposition import FactorBank, apply_point, decompose
from dse.decomposition.block_removal import cache_slots
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import PointError
from dse.models import LoadedModel, topology_of

TOKENS = torch.arange(3, 15).reshape(2, 6)
SETTINGS = {"vocab_size": 64, "num_hidden_layers": 4, "eos_token_id": None, "pad_token_id": 0}
WINDOWED = {"head_dim": 8, "sliding_window": 5}
KINDS = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("mistral", WINDOWED),
    "Qwen3": ("qwen3", WINDOWED),
    "Gemma2": ("gemma2", {**WINDOWED, "layer_types": KINDS}),
    "Olmo2": ("olmo2", {}),
    "GPT2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "GPTNeoX": ("gpt_neox", {"use_parallel_residual": True}),
    "GPTNeoXSerial": ("gpt_neox", {"use_parallel_residual": False}),
    "Phi": ("phi", {}),
    "Mixtral": ("mixtral", {"num_local_experts": 3}),
    "OPT": ("opt", {"word_embed_proj_dim": 32}),
}
REMOVED = {
    "first": {0: ["attention"]},
    "middle": {1: ["attention"], 2: ["mlp"]},
    "last": {3: ["attention"]},
    "layers": {0: ["attention", "mlp"], 2: ["attention", "mlp"], 3: ["mlp"]},
}
NOTHING = FactorBank(None, {})  # type: ignore[arg-type]


def build(family: str) -> LoadedModel:
    model_type, changes = FAMILIES[family]
    return as_loaded(with_random_vectors(tiny_model(model_type, **{**SETTINGS, **changes})))


def removal(loaded: LoadedModel, where: dict[int, list[str]]) -> DesignPoint:
    names = [f"layers.{layer}.{role}" for layer, roles in where.items() for role in roles]
    return DesignPoint.of({n: TensorChoice.removal() for n in names if n in loaded.topology.blocks_by_name})


def zeroed(loaded: LoadedModel, point: DesignPoint) -> nn.Module:
    """The dense model with all weights of the removed blocks, and of the norms after them, set to zero."""
    model = copy.deepcopy(loaded.model)
    for name in point.removed:
        block = loaded.topology.blocks_by_name[name]
        for path in (block.module, *block.norms):
            for parameter in model.get_submodule(path).parameters():
                parameter.data.zero_()
    return model


@pytest.mark.parametrize("where", REMOVED, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_removed_block_equals_a_block_with_zero_output(family: str, where: str) -> None:
    loaded = build(family)
    point = removal(loaded, REMOVED[where])
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    expected = zeroed(loaded, point)(TOKENS).logits
    dense = loaded.model(TOKENS).logits
    slots = {n: m.layer_idx for n, m in loaded.model.named_modules() if hasattr(m, "layer_idx")}
    with decompose(loaded, point, NOTHING):
        torch.testing.assert_close(loaded.model(TOKENS).logits, expected, atol=1e-6, rtol=1e-5)
        counted = sum(p.numel() for p in {id(p): p for p in loaded.model.parameters()}.values())
        assert counted == point_cost(loaded.topology, point).parameters
        assert not torch.allclose(expected, dense, atol=1e-3)
    after = loaded.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {n: m.layer_idx for n, m in loaded.model.named_modules() if hasattr(m, "layer_idx")} == slots
    assert torch.equal(loaded.model(TOKENS).logits, dense)


def greedy_by_hand(model: nn.Module, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """Greedy decoding that runs the whole sequence for every token, without a cache."""
    for _ in range(tokens):
        prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


@pytest.mark.parametrize("where", REMOVED, ids=str)
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GPT2", "GPTNeoX"])
def test_generation_with_a_cache_equals_generation_without(family: str, where: str) -> None:
    loaded = build(family)
    point = removal(loaded, REMOVED[where])
    with decompose(loaded, point, NOTHING), torch.inference_mode():
        expected = greedy_by_hand(loaded.model, TOKENS, 4)
        for cache in ("dynamic", "static"):
            settings = {"cache_implementation": cache, "disable_compile": True}
            found = loaded.model.generate(TOKENS, max_new_tokens=4, do_sample=False, **settings)
            assert torch.equal(found, expected), cache


def test_beams_are_reordered_in_a_cache_with_empty_slots() -> None:
    loaded = build("Llama")
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with decompose(loaded, removal(loaded, REMOVED["layers"]), NOTHING), torch.inference_mode():
        assert torch.equal(
            loaded.model.generate(TOKENS, **settings), loaded.model.generate(TOKENS, use_cache=False, **settings)
        )


@pytest.mark.parametrize("where", ["first", "layers"])
def test_decode_steps_give_the_logits_of_the_whole_sequence(where: str) -> None:
    loaded = build("Gemma2")
    with decompose(loaded, removal(loaded, REMOVED[where]), NOTHING), torch.inference_mode():
        whole = loaded.model(TOKENS).logits
        begun = loaded.model(TOKENS[:, :-2], use_cache=True)
        steps, cache = [], begun.past_key_values
        for token in TOKENS[:, -2:].T:
            step = loaded.model(token[:, None], past_key_values=cache, use_cache=True)
            steps.append(step.logits)
        assert cache.get_seq_length() == TOKENS.shape[1]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, -2:], atol=1e-5, rtol=1e-4)


def test_baseline_and_candidate_can_be_swapped_while_blocks_are_removed() -> None:
    loaded = build("Llama")
    point = removal(loaded, REMOVED["layers"])
    dense = loaded.model(TOKENS).logits
    handle = apply_point(loaded.model, loaded.topology, point, NOTHING)
    thin = loaded.model(TOKENS).logits
    for _ in range(2):
        handle.use_baseline()
        assert not handle.is_applied
        assert torch.equal(loaded.model(TOKENS).logits, dense)
        handle.use_candidate()
        assert handle.is_applied
        assert torch.equal(loaded.model(TOKENS).logits, thin)
    with pytest.raises(PointError, match="removed already"):
        apply_point(loaded.model, loaded.topology, removal(loaded, REMOVED["first"]), NOTHING)
    handle.undo()
    assert torch.equal(loaded.model(TOKENS).logits, dense)


def test_a_skipped_layer_computes_nothing() -> None:
    loaded = build("Phi")
    point = removal(loaded, {1: ["attention", "mlp"]})
    called = []
    for name, module in loaded.model.named_modules():
        if name.startswith("model.layers.1."):
            module.register_forward_hook(lambda _m, _i, _o, name=name: called.append(name))
    with decompose(loaded, point, NOTHING):
        loaded.model(TOKENS)
    assert called == []


def test_the_first_cache_slot_of_every_kind_stays_in_use() -> None:
    """For any removal, the slots of a kind are filled from the front, in order, by attention blocks of that kind."""
    topology = build("Gemma2").topology
    attention = [block for block in topology.blocks if block.role == "attention"]
    for count in (1, 2):
        for gone in itertools.combinations([block.name for block in attention], count):
            point = DesignPoint.of(dict.fromkeys(gone, TensorChoice.removal()))
            moved = cache_slots(topology, gone)
            for kind in ("sliding_attention", "full_attention"):
                own = [b.layer for b in attention if b.cache_kind == kind]
                used = [
                    moved.get(b.cache_module, b.layer) for b in attention if b.cache_kind == kind and b.name not in gone
                ]
                assert used == own[: len(used)]
                if not used:
                    with pytest.raises(PointError, match="one attention block of every kind must remain"):
                        check_point(topology, point)


def test_removals_that_are_not_allowed_are_refused() -> None:
    topology = build("Llama").topology
    everything = DesignPoint.uniform(topology, "removed", 0, "all", ["attention"])
    with pytest.raises(PointError, match="one attention block must remain, but the point removes all 4"):
        check_point(topology, everything)
    check_point(topology, DesignPoint.uniform(topology, "removed", 0, "all", ["mlp"]))
    both = DesignPoint.of({"layers.1.mlp": TensorChoice.removal(), "layers.1.up": TensorChoice("svd", 2)})
    with pytest.raises(PointError, match=r"'layers.1.up' is part of both 'layers.1.mlp' and 'layers.1.up'"):
        check_point(topology, both)
    with pytest.raises(PointError, match=r"only attention and MLP blocks can be removed, but 'layers.1.up'"):
        check_point(topology, DesignPoint.of({"layers.1.up": TensorChoice.removal()}))
    with pytest.raises(PointError, match=r"an MLP reduced by method 'width', but 'layers.1.mlp' has method 'svd'"):
        check_point(topology, DesignPoint.of({"layers.1.mlp": TensorChoice("svd", 2)}))
    opt = build("OPT").topology
    with pytest.raises(
        PointError, match=r"'layers.2.mlp' must be a block that the model can skip exactly, but .* holds no module"
    ):
        check_point(opt, DesignPoint.of({"layers.2.mlp": TensorChoice.removal()}))


def test_layers_that_normalise_the_sum_have_no_removable_block() -> None:
    for family, changes in (("bert", {}), ("opt", {"do_layer_norm_before": False}), ("bloom", {})):
        topology = topology_of(tiny_model(family, **changes))
        assert topology.blocks == ()
        with pytest.raises(PointError, match="does not return its input when its blocks return zero"):
            check_point(topology, DesignPoint.uniform(topology, "removed", 0, [0], ["mlp"]))


def test_blocks_are_found_without_weights() -> None:
    for family in FAMILIES:
        with torch.device("meta"):
            model_type, changes = FAMILIES[family]
            model = tiny_model(model_type, **{**SETTINGS, **changes})
        assert topology_of(model).blocks == build(family).topology.blocks

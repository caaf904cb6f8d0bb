"""Removed blocks: the model computes what it would if they gave zero, generates right, and comes back to the bit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn

from dse.cost import check_point, cost
from dse.decomposition import FactorBank, apply_point, decompose
from dse.decomposition.removal import cache_slots
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import PointError
from dse.models import LoadedModel, topology_of

TOKENS = torch.arange(3, 15).reshape(2, 6)
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
WINDOWED = {**GROUPED, "head_dim": 8, "sliding_window": 5}
KINDS = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "eos_token_id": None}

FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True)),
    "Mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**WINDOWED)),
    "Qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**WINDOWED)),
    "Gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**WINDOWED, layer_types=KINDS)),
    "Olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED)),
    "GPT2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True)),
    "GPTNeoX": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**COMMON, use_parallel_residual=True)),
    "GPTNeoXSerial": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**COMMON, use_parallel_residual=False)),
    "Phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**COMMON)),
    "Mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=3)),
    "OPT": lambda: hf.OPTForCausalLM(hf.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32)),
}  # fmt: skip
REMOVED = {
    "first": {0: ["attention"]},
    "middle": {1: ["attention"], 2: ["mlp"]},
    "last": {3: ["attention"]},
    "layers": {0: ["attention", "mlp"], 2: ["attention", "mlp"], 3: ["mlp"]},
}
NOTHING = FactorBank(None, {})  # type: ignore[arg-type]


def build(family: str) -> LoadedModel:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval().requires_grad_(False)
    with torch.no_grad():  # norms and biases of fresh models are ones and zeros, which would hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return LoadedModel("test", None, model, None, topology_of(model), torch.device("cpu"), torch.float32)  # type: ignore[arg-type]


def removal(loaded: LoadedModel, where: dict[int, list[str]]) -> DesignPoint:
    names = [f"layers.{layer}.{role}" for layer, roles in where.items() for role in roles]
    return DesignPoint.of({n: TensorChoice.removal() for n in names if n in loaded.topology.blocks_by_name})


def zeroed(loaded: LoadedModel, point: DesignPoint) -> nn.Module:
    """The dense model with every weight of the removed blocks, and of norms behind them, set to zero."""
    model = copy.deepcopy(loaded.model)
    for name in point.removed:
        block = loaded.topology.blocks_by_name[name]
        for path in (block.module, *block.norms):
            for parameter in model.get_submodule(path).parameters():
                parameter.data.zero_()
    return model


@pytest.mark.parametrize("where", REMOVED, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_removed_block_is_one_that_gives_zero(family: str, where: str) -> None:
    loaded = build(family)
    point = removal(loaded, REMOVED[where])
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    expected = zeroed(loaded, point)(TOKENS).logits
    dense = loaded.model(TOKENS).logits
    slots = {n: m.layer_idx for n, m in loaded.model.named_modules() if hasattr(m, "layer_idx")}
    with decompose(loaded, point, NOTHING):
        torch.testing.assert_close(loaded.model(TOKENS).logits, expected, atol=1e-6, rtol=1e-5)
        counted = sum(p.numel() for p in {id(p): p for p in loaded.model.parameters()}.values())
        assert counted == cost(loaded.topology, point).parameters
        assert not torch.allclose(expected, dense, atol=1e-3)
    after = loaded.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {n: m.layer_idx for n, m in loaded.model.named_modules() if hasattr(m, "layer_idx")} == slots
    assert torch.equal(loaded.model(TOKENS).logits, dense)


def greedy_by_hand(model: nn.Module, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """The whole sequence anew for every token: no cache can be wrong."""
    for _ in range(tokens):
        prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


@pytest.mark.parametrize("where", REMOVED, ids=str)
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GPT2", "GPTNeoX"])
def test_generation_with_a_cache_is_generation_without(family: str, where: str) -> None:
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
def test_logits_of_a_decode_step_are_those_of_the_whole_sequence(where: str) -> None:
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


def test_sides_can_be_swapped_while_blocks_are_removed() -> None:
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


def test_a_passed_layer_computes_nothing() -> None:
    loaded = build("Phi")
    point = removal(loaded, {1: ["attention", "mlp"]})
    called = []
    for name, module in loaded.model.named_modules():
        if name.startswith("model.layers.1."):
            module.register_forward_hook(lambda _m, _i, _o, name=name: called.append(name))
    with decompose(loaded, point, NOTHING):
        loaded.model(TOKENS)
    assert called == []


def test_the_first_slot_of_every_kind_of_cache_stays_filled() -> None:
    """Whatever is removed: slots of a kind are filled from the front, by attention of that kind, in order."""
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


def test_what_cannot_be_removed_is_refused() -> None:
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
    with pytest.raises(PointError, match=r"a block can only be removed, but 'layers.1.mlp' is given method 'svd'"):
        check_point(topology, DesignPoint.of({"layers.1.mlp": TensorChoice("svd", 2)}))
    opt = build("OPT").topology
    with pytest.raises(PointError, match=r"'layers.2.mlp' must be passed by exactly .* holds no module"):
        opt.part("layers.2.mlp")


def test_layers_that_normalise_the_sum_have_no_removable_block() -> None:
    torch.manual_seed(0)
    config = {**COMMON, "eos_token_id": 2}
    for model in (
        hf.BertForMaskedLM(hf.BertConfig(**config)),
        hf.OPTForCausalLM(hf.OPTConfig(**config, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False)),
        hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    ):
        topology = topology_of(model)
        assert topology.blocks == ()
        with pytest.raises(PointError, match="does not hand on its input when its blocks give zero"):
            DesignPoint.uniform(topology, "removed", 0, [0], ["mlp"])


def test_blocks_are_found_without_weights() -> None:
    for family in FAMILIES:
        with torch.device("meta"):
            model = FAMILIES[family]()
        assert topology_of(model).blocks == build(family).topology.blocks

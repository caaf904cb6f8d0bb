"""Targets are scored as a full log-softmax would, whatever the slices of vocabulary and states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from dse.evaluation.scoring import TargetHead
from dse.evaluation.scoring import target_head as module

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
}
MODELS = {
    "plain": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "soft cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=30.0)),
    "scaled": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.4, eos_token_id=2)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=2.5)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(1)
    return MODELS[request.param]().eval().requires_grad_(False)


@pytest.mark.parametrize(("slice_tokens", "most_states"), [(7, 3), (4096, 512), (61, 1)])
def test_scores_equal_a_full_log_softmax(
    model: PreTrainedModel, slice_tokens: int, most_states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLICE_TOKENS", slice_tokens)
    generator = np.random.default_rng(0)
    ids = torch.arange(1, 10)[None]  # token 0 pads, and its embedding is zero
    truth = model(input_ids=ids).logits[0].double()
    hidden = model.base_model(input_ids=ids)[0][0]
    positions, targets = generator.integers(0, 9, 40), generator.integers(0, 61, 40)
    targets[:9], positions[:9] = truth.argmax(dim=-1).numpy(), np.arange(9)
    found = TargetHead(model).score(hidden, positions.tolist(), targets.tolist(), most_states=most_states)
    expected = torch.log_softmax(truth, dim=-1)[positions, targets].numpy()
    np.testing.assert_allclose(found.log_probabilities, expected, atol=2e-5)
    np.testing.assert_array_equal(found.is_largest, truth.argmax(dim=-1).numpy()[positions] == targets)


def test_a_head_of_another_kind_is_applied_whole(model: PreTrainedModel) -> None:
    hidden = torch.randn(5, 16)
    before = TargetHead(model).score(hidden, [0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    head = model.get_output_embeddings()
    model.set_output_embeddings(nn.Sequential(nn.Identity(), head))
    after = TargetHead(model).score(hidden, [0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    np.testing.assert_allclose(after.log_probabilities, before.log_probabilities, atol=1e-5)


def test_infinite_logits_give_no_finite_score() -> None:
    model = MODELS["plain"]().requires_grad_(False)
    model.lm_head.weight[3, 0] = torch.nan
    found = TargetHead(model).score(torch.randn(2, 16), [0, 1], [3, 4])
    assert np.isnan(found.log_probabilities).all()

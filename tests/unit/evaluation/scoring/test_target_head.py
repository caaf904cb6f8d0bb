"""Scores of targets against a full log-softmax, for any slices of vocabulary and states."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import PreTrainedModel

from dse.evaluation.scoring import TargetHead
from dse.evaluation.scoring import target_head as module

tiny = partial(tiny_model, vocab_size=61, num_hidden_layers=1, initializer_range=0.5, seed=1)
MODELS = {
    "plain": tiny,
    "soft cap": partial(tiny, "gemma2", final_logit_softcapping=30.0),
    "scaled": partial(tiny, "cohere", logit_scale=0.4),
    "divided": partial(tiny, "granite", logits_scaling=2.5),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


@pytest.mark.parametrize(("slice_tokens", "most_states"), [(7, 3), (4096, 512), (61, 1)])
def test_scores_agree_with_a_full_log_softmax(
    model: PreTrainedModel, slice_tokens: int, most_states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLICE_TOKENS", slice_tokens)
    generator = np.random.default_rng(0)
    ids = torch.arange(1, 10)[None]  # token 0 is padding with a zero embedding
    truth = model(input_ids=ids).logits[0].double()
    hidden = model.base_model(input_ids=ids)[0][0]
    positions, targets = generator.integers(0, 9, 40), generator.integers(0, 61, 40)
    targets[:9], positions[:9] = truth.argmax(dim=-1).numpy(), np.arange(9)
    found = TargetHead(model).score(hidden, positions.tolist(), targets.tolist(), most_states=most_states)
    expected = torch.log_softmax(truth, dim=-1)[positions, targets].numpy()
    np.testing.assert_allclose(found.log_probabilities, expected, atol=2e-5)
    np.testing.assert_array_equal(found.is_largest, truth.argmax(dim=-1).numpy()[positions] == targets)


def test_head_of_another_class_is_applied_as_a_whole(model: PreTrainedModel) -> None:
    hidden = torch.randn(5, 32)
    before = TargetHead(model).score(hidden, [0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    head = model.get_output_embeddings()
    model.set_output_embeddings(nn.Sequential(nn.Identity(), head))
    after = TargetHead(model).score(hidden, [0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    np.testing.assert_allclose(after.log_probabilities, before.log_probabilities, atol=1e-5)


def test_non_finite_logits_give_non_finite_scores() -> None:
    model = tiny()
    model.lm_head.weight[3, 0] = torch.nan
    found = TargetHead(model).score(torch.randn(2, 32), [0, 1], [3, 4])
    assert np.isnan(found.log_probabilities).all()

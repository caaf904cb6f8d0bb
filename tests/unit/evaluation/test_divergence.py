"""KL divergence from dense: closed forms, and a computation with all logits at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from evaluation_support import byte_tokenizer, tiny_llama

from dse.errors import ModelError, NonFiniteError
from dse.evaluation import divergence
from dse.evaluation.divergence import DenseDivergence, kl_divergence_of_logits
from dse.models import LoadedModel


def windows(loaded: LoadedModel, count: int = 5, tokens: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, loaded.model.config.vocab_size, (count, tokens), generator=generator)


def test_known_distributions_in_closed_form() -> None:
    p, q = (0.5, 0.25, 0.25), (0.2, 0.2, 0.6)
    logits = torch.tensor([p, p]).log() + 3.0, torch.tensor([q, p]).log() - 1.0  # softmax is invariant to a constant
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert kl_divergence_of_logits(*logits).tolist() == pytest.approx([expected, 0.0], abs=1e-7)


def test_two_token_vocabulary_in_closed_form() -> None:
    dense, point = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, -1.0]])
    p, q = 1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(1.0))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(kl_divergence_of_logits(dense, point)) == pytest.approx(expected, rel=1e-6)


def test_dense_model_has_zero_divergence_from_itself(loaded: LoadedModel) -> None:
    found = DenseDivergence(loaded.model, windows(loaded)).measure()
    assert found.windows.tolist() == [0.0] * 5
    assert (found.interval.value, found.interval.low, found.interval.high) == (0.0, 0.0, 0.0)


def test_divergence_agrees_with_all_logits_at_once_for_any_chunk_size(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = windows(loaded)
    with torch.inference_mode():
        before = loaded.model(input_ids=text).logits.double().log_softmax(-1)
    meters = []
    for batch_tokens, chunk_bytes in ((1, 1), (30, 4 * 257 * 5), (10**6, 10**9)):
        monkeypatch.setattr(divergence, "_BATCH_TOKENS", batch_tokens)
        monkeypatch.setattr(divergence, "_CHUNK_BYTES", chunk_bytes)
        meters.append((DenseDivergence(loaded.model, text), chunk_bytes))
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.up_proj.weight.mul_(0.5)
    with torch.inference_mode():
        after = loaded.model(input_ids=text).logits.double().log_softmax(-1)
    expected = (before.exp() * (before - after)).sum(-1).mean(-1).numpy()
    assert expected.min() > 1e-3
    for meter, chunk_bytes in meters:
        monkeypatch.setattr(divergence, "_CHUNK_BYTES", chunk_bytes)
        np.testing.assert_allclose(meter.measure().windows, expected, rtol=1e-4)
        assert meter.tokens == text.numel()
    interval = meters[0][0].measure().interval
    assert interval.low is not None
    assert interval.high is not None
    assert interval.low < interval.value == pytest.approx(expected.mean(), rel=1e-4)
    assert interval.documents == len(text)


def test_overflow_is_refused(loaded: LoadedModel) -> None:
    meter = DenseDivergence(loaded.model, windows(loaded))
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(math.inf)
    with pytest.raises(NonFiniteError, match="must be finite"):
        meter.measure()


def test_logits_that_differ_from_the_head_output_are_refused() -> None:
    loaded = tiny_llama(byte_tokenizer())

    handle = loaded.model.register_forward_hook(
        lambda module, arguments, output: output.__class__(logits=output.logits * 2.0)
    )
    try:
        with pytest.raises(ModelError, match="computes them differently"):
            DenseDivergence(loaded.model, windows(loaded))
    finally:
        handle.remove()

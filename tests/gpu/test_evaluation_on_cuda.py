"""Evaluation on a GPU: the fastest verified way of sharing, and batches that shrink when memory runs out."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tiny_models import tiny_model

from dse.errors import OutOfMemoryError
from dse.evaluation.evaluator_settings import BatchSize
from dse.evaluation.scoring import Query, Scorer


def choices(contexts: int) -> list[Query]:
    """Four continuations of each context."""
    generator = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(2, 250) for _ in range(length))

    return [Query((*context, *tokens(3)), 3) for context in (tokens(40) for _ in range(contexts)) for _ in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_timed_strategy_gives_the_same_scores(gpu: torch.device, dtype: torch.dtype) -> None:
    model = tiny_model("llama", vocab_size=257, initializer_range=0.1, max_position_embeddings=96).to(gpu, dtype)
    asked = choices(200)
    plain = Scorer(model, clock=None)._plain_scores(asked)
    scorer = Scorer(model, batch_tokens=1024)
    for (ours, _), (truth, _) in zip(scorer.score(asked), plain, strict=True):
        assert math.isclose(ours, truth, abs_tol=1e-3 if dtype == torch.float32 else 1.5)
    assert {kind for kind in scorer.strategies if kind[0]} == scorer._timed


def test_a_batch_that_does_not_fit_is_halved(gpu: torch.device) -> None:
    """Every token takes 1 % of the free memory, so a batch has fewer than 100."""
    free, _ = torch.cuda.mem_get_info(gpu)
    batch_size = BatchSize(4, "cuda")

    def work() -> int:
        block = torch.empty(batch_size.tokens * free // 100, dtype=torch.uint8, device=gpu)
        return block.numel()

    assert batch_size.run(work) > 0
    assert batch_size.tokens == 64
    with pytest.raises(OutOfMemoryError, match="batch of 16 tokens"):
        batch_size.run(lambda: torch.empty(4 * free, dtype=torch.uint8, device=gpu).numel())

"""Every architecture against lm-eval's `HFLM`, with the strategy that its attention allows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from evaluation_support import byte_tokenizer
from lm_eval.models.huggingface import HFLM
from tiny_models import tiny_model
from transformers import PreTrainedModel

from dse.evaluation.scoring import Query, Scorer, Strategy

SETTINGS = {
    "vocab_size": 257,
    "num_hidden_layers": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 256,
}

# Family, changes to its config, strategy, and strategy for rows deeper than the sliding window.
SHAPES: dict[str, tuple[str, dict[str, object], Strategy, Strategy | None]] = {
    "llama": ("llama", {}, "packed", None),
    "gpt2": ("gpt2", {}, "packed", None),
    "gpt_neox": ("gpt_neox", {}, "packed", None),
    "opt": ("opt", {"init_std": 0.3, "word_embed_proj_dim": 32, "pad_token_id": 1}, "packed", None),
    "qwen3": ("qwen3", {"head_dim": 8}, "packed", None),
    "phi3": ("phi3", {}, "packed", None),
    "mistral, sliding window": ("mistral", {"sliding_window": 16}, "packed", "packed"),
    "gemma2, soft caps and sliding window": (
        "gemma2",
        {"head_dim": 8, "sliding_window": 16, "attn_implementation": "eager"},
        "packed",
        "packed",
    ),
    "gemma3, sliding window": ("gemma3_text", {"head_dim": 8, "sliding_window": 16}, "packed", "packed"),
    "bloom, biases instead of positions": ("bloom", {}, "cached", None),
    "mamba, no attention": ("mamba", {}, "plain", None),
}


def build(shape: str) -> PreTrainedModel:
    family, changes, _, _ = SHAPES[shape]
    return tiny_model(family, seed=3, **{**SETTINGS, **changes})


def requests(seed: int = 0) -> list[tuple[None, list[int], list[int]]]:
    """Multiple choice, single-token choices, equal contexts of several tasks, one continuation after several contexts,
    minimal pairs, and whole texts."""
    generator = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [generator.randrange(2, 250) for _ in range(length)]

    made: list[tuple[None, list[int], list[int]]] = []
    frame = tokens(3)
    for _ in range(6):
        context = frame + tokens(generator.randrange(4, 20))
        made += [(None, context, tokens(generator.randrange(1, 6))) for _ in range(4)]
        made += [(None, context, tokens(1)) for _ in range(3)]
        ending = tokens(4)
        made += [(None, context + tokens(2), ending) for _ in range(2)]
        good = tokens(8)
        made += [(None, [256], good), (None, [256], good[:5] + tokens(1) + good[6:])]
        made.append((None, [256], tokens(40)))
    return made + made[:5]


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_agree_with_lm_eval(shape: str) -> None:
    model = build(shape)
    asked = requests()
    theirs = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=5, max_length=96, softmax_dtype="float32")
    expected = theirs._loglikelihood_tokens(asked, disable_tqdm=True)
    scorer = Scorer(model)
    found = scorer.score([Query((*context, *scored), len(scored)) for _, context, scored in asked])
    for (ours, is_greedy), (truth, was_greedy) in zip(found, expected, strict=True):
        assert math.isclose(ours, truth, abs_tol=1e-3)
        assert is_greedy == was_greedy
    _, _, strategy, windowed_strategy = SHAPES[shape]
    assert scorer.strategies[True, False] == strategy
    assert scorer.strategies.get((True, True)) == windowed_strategy  # some contexts exceed the window of 16


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_scores_do_not_depend_on_the_batch_size(batch_tokens: int) -> None:
    model = build("llama")
    queries = [Query((*context, *scored), len(scored)) for _, context, scored in requests(1)]
    expected = Scorer(model).score(queries)
    seen: list[int] = []
    found = Scorer(model, batch_tokens=batch_tokens).score(queries, lambda part: seen.extend(i for i, _ in part))
    assert sorted(seen) == list(range(len(queries)))
    for (ours, _), (truth, _) in zip(found, expected, strict=True):
        assert math.isclose(ours, truth, abs_tol=1e-4)


def test_shared_tokens_are_computed_once() -> None:
    model = build("llama")
    context = list(range(2, 42))
    queries = [Query((*context, 100 + i, 110 + i), 2) for i in range(4)]
    scorer = Scorer(model)
    scorer.score(queries)
    with counted_tokens(model) as count:
        scorer.score([*queries, *queries])
    assert count() == 40 + 4


def test_non_finite_scores_verify_no_strategy() -> None:
    """If the first state has non-finite scores, the strategy is chosen with the next state."""
    model = build("llama")
    queries = [Query((*context, *scored), len(scored)) for _, context, scored in requests(2)]
    scorer = Scorer(model)
    weight = model.lm_head.weight.clone()
    model.lm_head.weight.fill_(math.nan)
    assert all(math.isnan(value) for value, _ in scorer.score(queries))
    assert scorer.strategies == {}
    model.lm_head.weight.copy_(weight)
    scorer.score(queries)
    assert set(scorer.strategies.values()) == {"packed"}


def test_out_of_memory_does_not_change_the_strategy() -> None:
    model = build("llama")

    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    hook = model.model.register_forward_pre_hook(fail)
    scorer = Scorer(model)
    with pytest.raises(RuntimeError, match="can't allocate"):
        scorer.score([Query((2, 3, 4), 1), Query((2, 3, 5), 1)])
    hook.remove()
    assert scorer.strategies == {}


class counted_tokens:  # noqa: N801 - reads as a verb
    """Counts the tokens of every forward pass, including padding."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._total = model, 0

    def __enter__(self) -> Callable[[], int]:
        def note(_: object, __: object, keywords: dict[str, torch.Tensor]) -> None:
            self._total += keywords["input_ids"].numel()

        self._hook = self._model.base_model.register_forward_pre_hook(note, with_kwargs=True)
        return lambda: self._total

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

"""Every architecture against lm-eval's `HFLM`, with the strategy that its attention allows."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from evaluation_support import byte_tokenizer
from lm_eval.models.huggingface import HFLM
from tiny_models import tiny_model
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dse.evaluation.scoring import Query, Scorer, Strategy
from dse.evaluation.scoring.verification import agree, tolerance

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


def strategies_of(scorer: Scorer, *, is_deep: bool) -> set[Strategy]:
    """Strategies for trees, within or beyond the attention window."""
    return {strategy for kind, strategy in scorer.strategies.items() if kind[:2] == (True, is_deep)}


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
    assert strategies_of(scorer, is_deep=False) == {strategy}
    windowed = set() if windowed_strategy is None else {windowed_strategy}
    assert strategies_of(scorer, is_deep=True) == windowed  # some contexts exceed the window of 16


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


def _asked(seed: int = 0) -> list[Query]:
    return [Query((*context, *scored), len(scored)) for _, context, scored in requests(seed)]


def _flawed_attention(module: torch.nn.Module, query, key, value, attention_mask, **settings):  # type: ignore[no-untyped-def]
    """A kernel that ignores the mask of long rows: a fault that no short row shows."""
    is_tree = attention_mask is not None and query.shape[2] > 24
    if is_tree:
        settings["is_causal"] = True
    return sdpa_attention_forward(module, query, key, value, None if is_tree else attention_mask, **settings)


def test_every_length_is_verified() -> None:
    """Rows of up to 24 tokens are packed; the kernel's fault on longer ones is found, and they are scored otherwise."""
    AttentionInterface.register("flawed", _flawed_attention)
    model = tiny_model("llama", seed=3, **SETTINGS)
    expected = Scorer(model, clock=None).score(asked := _long_and_short())
    model.set_attn_implementation("flawed")
    scorer = Scorer(model)
    for (ours, _), (truth, _) in zip(scorer.score(asked), expected, strict=True):
        assert math.isclose(ours, truth, abs_tol=1e-4)
    trees = {kind[2]: strategy for kind, strategy in scorer.strategies.items() if kind[0]}
    assert trees == {3: "packed", 6: "cached"}


def _long_and_short() -> list[Query]:
    """Two-way choices after contexts of 4 and of 40 tokens, one tree of each length."""
    generator = random.Random(4)
    found = []
    for length in (4, 40):
        context = tuple(generator.randrange(2, 250) for _ in range(length))
        found += [Query((*context, *(generator.randrange(2, 250) for _ in range(3))), 2) for _ in range(2)]
    return found


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 1e-6, 2e-4), (torch.bfloat16, 1e-3, 0.5)])
def test_the_tolerance_follows_the_noise_of_the_dtype(dtype: torch.dtype, least: float, most: float) -> None:
    """Correct strategies agree within it, and a distribution that is off by the tolerance does not."""
    model = tiny_model("llama", seed=3, **SETTINGS).to(dtype)
    scorer, sample = Scorer(model), _asked()[:8]
    truth = scorer._plain_scores(sample, most_rows=1)
    found = tolerance(truth, [scorer._plain_scores(sample), scorer._plain_scores(sample, extra=8)], sample, dtype)
    assert least < found < most
    assert agree(scorer.score(sample), truth, sample, found)
    shifted = [
        (value + 1.01 * found * query.scored, greedy) for (value, greedy), query in zip(truth, sample, strict=True)
    ]
    assert not agree(shifted, truth, sample, found)


def test_a_strategy_without_a_mask_is_used_where_it_is_faster() -> None:
    """A scripted clock, as seconds of two runs each: packed, separate and plain; no clock measures nothing."""
    model = build("llama")
    asked = [query for seed in range(30) for query in _asked(seed)]
    expected = Scorer(model, clock=None).score(asked)
    for seconds, strategy in (
        ((3, 3, 2, 2, 9, 9), "separate"),
        ((1, 1, 2, 2, 9, 9), "packed"),
        ((3, 9, 4, 4, 9, 1), "plain"),
    ):
        scripted = itertools.cycle(seconds)
        times = itertools.accumulate(t for second in scripted for t in (0, second))
        scorer = Scorer(model, batch_tokens=256, clock=lambda: next(times))  # noqa: B023
        for (ours, _), (truth, _) in zip(scorer.score(asked), expected, strict=True):
            assert math.isclose(ours, truth, abs_tol=1e-3)
        assert strategy in strategies_of(scorer, is_deep=False)
        assert {s for kind, s in scorer.strategies.items() if not kind[0]} == {"packed"}  # chains have no mask


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

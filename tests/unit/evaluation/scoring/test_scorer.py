"""Every architecture is scored as lm-eval's own `HFLM` scores it, by whatever way its attention allows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from evaluation_support import byte_tokenizer
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from dse.evaluation.scoring import Query, Scorer, Strategy

VOCABULARY = 257
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "initializer_range": 0.3}
_GEMMA = _LLAMA | {"head_dim": 8, "pad_token_id": 0}

# model type, config, the way it is scored, the way it is scored where a window cuts.
SHAPES: dict[str, tuple[str, dict[str, object], Strategy, Strategy | None]] = {
    "llama": ("llama", _LLAMA, "packed", None),
    "gpt2": ("gpt2", _GPT2 | {"bos_token_id": None, "eos_token_id": 256}, "packed", None),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}, "packed", None),
    "opt": (
        "opt",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "init_std": 0.3}
        | {"num_attention_heads": 4, "max_position_embeddings": 96, "word_embed_proj_dim": 32, "pad_token_id": 1},
        "packed",
        None,
    ),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 8}, "packed", None),
    "phi3": ("phi3", _LLAMA | {"pad_token_id": 0}, "packed", None),
    "mistral, sliding window": ("mistral", _LLAMA | {"sliding_window": 16}, "packed", "packed"),
    "gemma2, soft caps and sliding window": (
        "gemma2",
        _GEMMA | {"sliding_window": 16, "attn_implementation": "eager"},
        "packed",
        "packed",
    ),
    "gemma3, sliding window": ("gemma3_text", _GEMMA | {"sliding_window": 16}, "packed", "packed"),
    "bloom, biases instead of positions": (
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
        "cached",
        None,
    ),
    "mamba, no attention": (
        "mamba",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "initializer_range": 0.3,
        },
        "plain",
        None,
    ),
}


def build(shape: str) -> PreTrainedModel:
    kind, settings, _, _ = SHAPES[shape]
    settings = dict(settings)
    implementation = settings.pop("attn_implementation", None)
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **settings)
    keywords = {} if implementation is None else {"attn_implementation": implementation}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **keywords)
    return model.eval().requires_grad_(False)


def requests(seed: int = 0) -> list[tuple[None, list[int], list[int]]]:
    """Multiple choice, choices of one token, equal contexts of other tasks, one continuation after several contexts,
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
def test_scores_equal_those_of_lm_eval(shape: str) -> None:
    model = build(shape)
    asked = requests()
    theirs = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=5, max_length=96, softmax_dtype="float32")
    expected = theirs._loglikelihood_tokens(asked, disable_tqdm=True)
    scorer = Scorer(model)
    found = scorer.score([Query((*context, *scored), len(scored)) for _, context, scored in asked])
    for (ours, is_greedy), (truth, was_greedy) in zip(found, expected, strict=True):
        assert math.isclose(ours, truth, abs_tol=1e-3)
        assert is_greedy == was_greedy
    _, _, way, cut_way = SHAPES[shape]
    assert scorer.strategies[True, False] == way
    assert scorer.strategies.get((True, True)) == cut_way  # contexts are shorter and longer than the windows of 16


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_batches_do_not_matter(batch_tokens: int) -> None:
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


def test_a_model_that_is_not_finite_proves_nothing() -> None:
    """The first state that is scored may be a wreck; the way must then be found with the next."""
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


def test_a_lack_of_memory_is_no_reason_to_change_the_way() -> None:
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
    """Counts the tokens, padding included, of every forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._total = model, 0

    def __enter__(self) -> Callable[[], int]:
        def note(_: object, __: object, keywords: dict[str, torch.Tensor]) -> None:
            self._total += keywords["input_ids"].numel()

        self._hook = self._model.base_model.register_forward_pre_hook(note, with_kwargs=True)
        return lambda: self._total

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

"""`HFLM` that computes shared prefixes once: the same answers, several times faster on multiple choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from dse.errors import ModelError
from dse.evaluation.evaluator_settings import batches
from dse.evaluation.scoring import Query, Score, Scorer, Strategy

__all__ = ["SharedPrefixLM"]

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""(texts or None, context tokens, continuation tokens), as `HFLM._loglikelihood_tokens` takes it."""

# Room for the key-value cache of a generation batch. Every step reads all weights, so more rows amortise them better.
_CPU_CACHE_BYTES = 2**29
_GPU_CACHE_SHARE = 0.25


@register_model("dse", "shared-prefix")
class SharedPrefixLM(HFLM):  # type: ignore[misc]
    """A drop-in for `lm_eval.models.huggingface.HFLM` for causal models.

    It returns the same log-likelihoods but computes them differently: sequences with a common prefix are packed as
    prefix trees, the output head is applied only where a token is scored, and batches are filled by tokens. See
    `dse.evaluation.scoring`. Importing this module registers it with lm-eval as the model type `dse`;
    `python -m dse.evaluation.lm_eval` is lm-eval's command line with that type registered.

    Args:
        pretrained: As in `HFLM`: a hub id, a folder or a model.
        batch_tokens: Maximum number of tokens in a scoring batch, including padding; None chooses by device. Generation
            batches are limited by the size of their key-value cache.
        keywords: All other arguments of `HFLM`. `batch_size`, `max_batch_size` and `logits_cache` have no effect, and
            `backend` must not be "seq2seq".

    Raises:
        ModelError: The model is an encoder-decoder.
    """

    def __init__(self, pretrained: Any, *, batch_tokens: int | str | None = None, **keywords: Any) -> None:
        super().__init__(pretrained, **keywords)
        if self.backend != "causal":
            raise ModelError(
                f"shared prefixes are for causal models, but '{pretrained}' is an encoder-decoder; use lm-eval's `hf`"
            )
        self._scorer = Scorer(self.model, batch_tokens=None if batch_tokens is None else int(batch_tokens))

    @property
    def strategies(self) -> set[Strategy]:
        """The strategies of sharing work that this model has used so far."""
        return set(self._scorer.strategies.values())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of every whole text; the windows of all texts are scored together."""
        self.batch_size_per_gpu = max(1, sum(len(request.args[0]) for request in requests))
        scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return scores

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuation of every context, with the generation settings of its task."""
        texts: list[str] = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Generating") as bar:
            for batch, tokens in self._generation_batches(requests):
                found = self._generate([requests[index] for index in batch], tokens)
                for index, text in zip(batch, found, strict=True):
                    texts[index] = text
                    self._generated(index, text)
                bar.update(len(batch))
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        # The last token is only predicted, never read, so max_length + 1 tokens fit; longer ones lose their beginning.
        queries = [
            Query(tuple((context + continuation)[-(self.max_length + 1) :]), len(continuation))
            for _, context, continuation in requests
        ]
        with (
            tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring requests") as bar,
            self._precision(),
        ):
            answers = self._scorer.score(queries, lambda found: self._finished(found, bar))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _finished(self, found: Sequence[tuple[int, Score]], bar: tqdm[Any]) -> None:
        bar.update(len(found))

    def _generate(self, requests: Sequence[Any], tokens: int) -> list[str]:
        """Generate one batch, whose key-value cache holds this many tokens at its end."""
        self.batch_size_per_gpu = len(requests)
        texts: list[str] = super().generate_until(requests, disable_tqdm=True)
        return texts

    def _generated(self, index: int, text: str) -> None:
        """A finished text; for subclasses."""

    def _precision(self) -> Any:
        if self.mixed_precision_dtype is None:
            return nullcontext()
        return torch.autocast(device_type=self.device.type, dtype=self.mixed_precision_dtype)

    def _generation_batches(self, requests: Sequence[Any]) -> Iterator[tuple[list[int], int]]:
        """Batches of equal settings whose key-value caches fit in memory, longest context first.

        Yields:
            Indices of the requests, and the tokens in the cache at the end of the generation, including padding.
        """
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for members in by_settings.values():
            new_tokens = normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks)["max_gen_toks"]
            whole = {index: min(lengths[index] + new_tokens, self.max_length) for index in members}
            longest_first = sorted(members, key=lambda index: -lengths[index])
            for batch in batches(longest_first, whole.__getitem__, self._cache_tokens()):
                yield batch, len(batch) * whole[batch[0]]

    def _cache_tokens(self) -> int:
        """Tokens whose keys and values fit into memory, at 2 x layers x key/value heads x head size each."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 1)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        per_token = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_size
        room: float = _CPU_CACHE_BYTES
        if self.device.type == "cuda":
            # Memory that the allocator keeps for reuse is free for a cache, too.
            kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            room = (torch.cuda.mem_get_info(self.device)[0] + kept) * _GPU_CACHE_SHARE
        return max(1, int(room // (per_token * self.model.dtype.itemsize)))

"""A masked language model as an lm-eval model: texts are scored by pseudo-log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval.api.model import LM
from torch import Tensor

from dse.errors import ModelError, TaskError
from dse.evaluation.evaluator_settings import BatchSize, batches
from dse.evaluation.lm_eval.language_model import ProgressingLM, check_finite, document_of
from dse.evaluation.scoring.masked_text import MaskedScoring, MaskedText, encode_masked, masked_positions, windows_of
from dse.models import LoadedModel, context_tokens

__all__ = ["MaskedScoringLM"]

_LONGEST_WITHOUT_LIMIT = 512


class _Row(NamedTuple):
    """One forward pass of one text: some tokens masked, one of them scored."""

    text: int
    target: int


class MaskedScoringLM(ProgressingLM, LM):  # type: ignore[misc]
    """Pseudo-log-likelihoods of a loaded model that surgery changes between calls.

    The score of a continuation is the sum over its tokens of log p(token | all other tokens of context and
    continuation). The scored token is masked, together with the tokens that `scoring` masks with it. Context and
    continuation are tokenised as one text with the model's special tokens around it. Special tokens and context are
    never masked or scored. A continuation is greedy if each of its tokens is the most likely at its position.

    Every scored token needs its own forward pass. Passes are sorted by length and batched by tokens, and the head is
    applied only at the scored position.

    Args:
        loaded: The model; it must have a masked-language-model head.
        max_length: Tokens per text, including special ones; longer texts lose their beginning.
        scoring: Which tokens are masked together.

    Source: Salazar et al. (2020), arXiv 1910.14659; Kauf and Ivanova (2023), arXiv 2305.10588.
    """

    def __init__(self, loaded: LoadedModel, *, max_length: int | None, scoring: MaskedScoring = "within_word") -> None:
        super().__init__()
        tokenizer = loaded.tokenizer
        if not tokenizer.is_fast:
            raise ModelError(f"pseudo-log-likelihoods need a fast tokenizer, but that of '{loaded.ref}' is a slow one")
        if tokenizer.mask_token_id is None:
            raise ModelError(
                f"pseudo-log-likelihoods need a tokenizer with a mask token, but that of '{loaded.ref}' has none"
            )
        self._model, self._tokenizer, self._ref = loaded.model, tokenizer, loaded.ref
        self._mask_id = int(tokenizer.mask_token_id)
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._scoring: MaskedScoring = scoring
        longest = context_tokens(loaded.model) or _LONGEST_WITHOUT_LIMIT
        self.max_length = min(longest, max_length or longest)
        self.batch_limit = BatchSize("auto", loaded.device.type)
        self._texts: dict[tuple[str, str], MaskedText] = {}

    def prepare(self, requests: Sequence[Any]) -> int:
        """Tokenise requests for all later calls; return how many are cut to `max_length`.

        Raises:
            TaskError: A request asks for generated text, has nothing to score, or exceeds the context.
        """
        cut = 0
        for request in requests:
            if request.request_type == "generate_until":
                raise TaskError(
                    f"task '{request.task_name}' asks for generated text, but '{self._ref}' is a masked language model,"
                    f" which cannot generate; choose a task that compares texts"
                )
            if request.request_type != "loglikelihood":
                continue
            text = self._encode(request)
            room = self.max_length - sum(text.frame)
            if not 0 < len(text.targets) <= room:
                raise TaskError(
                    f"a continuation must have 1 to {room} tokens, but {document_of(request)} has {len(text.targets)}"
                )
            cut += len(text) > self.max_length
        return cut

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(pseudo-log-likelihood of the continuation given the context, is greedy) of every request."""
        texts = [self._encode(request).cut_to(self.max_length) for request in requests]
        return self._score(texts, requests)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Pseudo-log-likelihood of every whole text, in non-overlapping windows of `max_length` tokens."""
        scores = []
        for request in requests:
            windows = list(windows_of(encode_masked(self._tokenizer, "", request.args[0]), self.max_length))
            found = self._score(windows, [request] * len(windows), keeps=False)
            scores.append(math.fsum(score for score, _ in found))
            self.keep(len(scores) - 1, scores[-1])
        return scores

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Refused, since a masked language model generates no text."""
        self.prepare(requests)
        return []

    def _encode(self, request: Any) -> MaskedText:
        context, continuation = request.args
        if not isinstance(context, str) or not isinstance(continuation, str):
            raise TaskError(f"a continuation must be a string, but {document_of(request)} has none")
        key = (context, continuation)
        if key not in self._texts:
            self._texts[key] = encode_masked(self._tokenizer, context, continuation)
        return self._texts[key]

    def _score(
        self, texts: Sequence[MaskedText], requests: Sequence[Any], *, keeps: bool = True
    ) -> list[tuple[float, bool]]:
        """(sum of the log-probabilities of the targets, whether all are the most likely tokens) of each text."""
        parts: list[list[float]] = [[] for _ in texts]
        greedy = [True] * len(texts)
        for batch in self._batches(texts):
            scores, likeliest = self._score_batch(texts, batch)
            for row, score, is_likeliest in zip(batch, scores, likeliest, strict=True):
                check_finite(score, requests[row.text])
                parts[row.text].append(score)
                greedy[row.text] &= is_likeliest
                if keeps and len(parts[row.text]) == len(texts[row.text].targets):
                    self.keep(row.text, (math.fsum(parts[row.text]), greedy[row.text]))
        return [(math.fsum(part), is_greedy) for part, is_greedy in zip(parts, greedy, strict=True)]

    def _batches(self, texts: Sequence[MaskedText]) -> Iterator[list[_Row]]:
        """Rows in batches filled by tokens, longest first, so that out-of-memory errors occur early."""
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        rows = (_Row(index, target) for index in order for target in texts[index].targets)
        return batches(rows, lambda row: len(texts[row.text]), self.batch_limit.tokens)

    def _score_batch(self, texts: Sequence[MaskedText], batch: Sequence[_Row]) -> tuple[list[float], list[bool]]:
        longest = max(len(texts[row.text]) for row in batch)
        token_ids = np.full((len(batch), longest), self._pad_id, dtype=np.int64)
        seen = np.zeros((len(batch), longest), dtype=np.int64)
        for place, row in enumerate(batch):
            text = texts[row.text]
            token_ids[place, : len(text)] = text.token_ids
            seen[place, : len(text)] = 1
            token_ids[place, list(masked_positions(text, row.target, self._scoring))] = self._mask_id
        device = self._model.device
        positions = torch.tensor([row.target for row in batch], device=device)
        wanted = torch.tensor([texts[row.text].token_ids[row.target] for row in batch], device=device)
        inputs = torch.from_numpy(token_ids).to(device), torch.from_numpy(seen).to(device)
        logits = _logits_at(self._model, *inputs, positions).float()
        scores = logits.gather(1, wanted[:, None]).squeeze(1) - logits.logsumexp(dim=1)
        return scores.tolist(), (logits.argmax(dim=1) == wanted).tolist()


@torch.inference_mode()
def _logits_at(model: Any, token_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """Logits at one position of each row, shape (rows, vocabulary).

    A hook reduces the body's hidden states to those positions before they reach the head, which treats each position
    separately. With a vocabulary of 30,000 words the head costs more than several layers.
    """
    rows = torch.arange(len(positions), device=positions.device)

    def keep_positions(_module: object, _arguments: object, output: Any) -> Any:
        hidden = output[0][rows, positions].unsqueeze(1)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output[next(iter(output))] = hidden
        return output

    body = model.base_model
    if body is model:  # no separate body: the head runs at every position
        logits: Tensor = model(input_ids=token_ids, attention_mask=attention_mask).logits
        return logits[rows, positions]
    handle = body.register_forward_hook(keep_positions)
    try:
        logits = model(input_ids=token_ids, attention_mask=attention_mask).logits
    finally:
        handle.remove()
    return logits.squeeze(1)

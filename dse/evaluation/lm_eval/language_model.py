"""The resident model as an lm-eval model: scored in place, with every score checked."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from dse.errors import ModelError, NonFiniteError, TaskError
from dse.evaluation.lm_eval.shared_prefix import Request, SharedPrefixLM
from dse.evaluation.scoring import Score
from dse.models import LoadedModel

__all__ = ["TOKENS_PER_ROW", "ScoringLM"]

TOKENS_PER_ROW = 128
"""A study's `batch_size` counts rows of this length: batches are filled by tokens."""


class ScoringLM(SharedPrefixLM):
    """`SharedPrefixLM` around a model that surgery changes between calls.

    It keeps only what cannot go stale: the tokens of a request, and how this architecture may share work.

    Attributes:
        rows: A batch holds at most so many times 128 tokens, and on a CPU no more than serve it; may be lowered between
            calls.
        tick: Called with the number of requests just finished.
    """

    def __init__(self, loaded: LoadedModel, *, batch_size: int, max_length: int | None) -> None:
        tokenizer = loaded.tokenizer
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of '{loaded.ref}' must have a beginning- or end-of-text token to score a text without "
                f"context, but it has neither"
            )
        with _ties_untouched(loaded.model):
            # HFLM gives the tokenizer a padding token; a copy keeps the model's own as it is for export.
            super().__init__(
                loaded.model,
                tokenizer=copy.deepcopy(tokenizer),
                max_length=max_length,
                softmax_dtype="float32",
            )
        self.rows = batch_size
        self.tick: Callable[[int], None] = lambda _: None
        self._asked: list[Any] = []
        self._tokens: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    @property
    def device(self) -> torch.device:
        """Where the model lies now."""
        return self.model.device  # type: ignore[no-any-return]

    def prepare(self, requests: Sequence[Any]) -> int:
        """Tokenise log-likelihood requests once for all calls; return how many are cut to `max_length`.

        Raises:
            TaskError: A continuation is empty or longer than the model's context.
        """
        cut = 0
        for request in requests:
            if request.request_type != "loglikelihood":
                continue
            context, continuation = request.args
            if not isinstance(context, str) or not isinstance(continuation, str) or not continuation:
                raise TaskError(f"a continuation must be a text of at least one token, but {_place(request)} has none")
            before, scored = self._encode_pair(context, continuation) if context else ([0], [0])
            if not 0 < len(scored) <= self.max_length:
                raise TaskError(
                    f"a continuation must have 1 to {self.max_length} tokens, but {_place(request)} has {len(scored)}"
                )
            cut += len(before) + len(scored) > self.max_length + 1
        return cut

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        key = (context, continuation)
        if key not in self._tokens:
            self._tokens[key] = super()._encode_pair(context, continuation)
        return self._tokens[key]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of every request."""
        self._asked = list(requests)
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of every whole text; documents go in slices, so that progress shows."""
        self._asked = []
        scores: list[float] = []
        for start in range(0, len(requests), self.rows):
            part = requests[start : start + self.rows]
            found = super().loglikelihood_rolling(part, disable_tqdm=True)
            for request, score in zip(part, found, strict=True):
                _check_finite(score, request)
            scores.extend(found)
            self.tick(len(part))
        return scores

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy (or as the task says) continuation of every context."""
        if not requests:
            return []
        # Generation turns NaN logits into tokens without a word; one forward pass tells.
        probe = torch.tensor([self.tok_encode(requests[0].args[0])[: self.max_length]], device=self.device)
        if probe.numel():
            _check_finite(float(self._model_call(probe).sum()), requests[0])
        self.cache_hook = _Ticker(self.tick)
        return super().generate_until(requests, disable_tqdm=True)

    def _finished(self, found: Sequence[tuple[int, Score]], bar: tqdm[Any]) -> None:
        """Refuse what is not finite as soon as it is known: a trial that is void need not be scored to its end."""
        if not self._asked:  # windows of whole texts
            return
        for index, (score, _) in found:
            _check_finite(score, self._asked[index])
        self.tick(len(found))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Score]:
        self.batch_tokens = self.rows * TOKENS_PER_ROW
        return super()._loglikelihood_tokens(requests, disable_tqdm=True)


class _Ticker:
    """Stands where lm-eval keeps its cache: hears of every generated text and keeps none."""

    def __init__(self, tick: Callable[[int], None]) -> None:
        self._tick = tick

    def add_partial(self, kind: str, request: object, answer: object) -> None:
        if kind == "generate_until":
            self._tick(1)


@contextlib.contextmanager
def _ties_untouched(model: PreTrainedModel) -> Iterator[None]:
    """Keep `HFLM` from calling `tie_weights()`, which would tie what a checkpoint deliberately holds apart."""
    model.tie_weights = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.tie_weights


def _place(request: Any) -> str:
    return f"document {request.doc_id} of task '{request.task_name}'"


def _check_finite(score: float, request: Any) -> None:
    if not math.isfinite(score):
        raise NonFiniteError(
            f"log-likelihoods must be finite, but {_place(request)} got {score}; the point's weights or activations "
            f"overflow, so the trial is void"
        )

"""The loaded causal model as an lm-eval model: scored in place, with a check of every score."""

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
from dse.evaluation.evaluator_settings import TOKENS_PER_ROW
from dse.evaluation.lm_eval.shared_prefix import Request, SharedPrefixLM
from dse.evaluation.scoring import Score
from dse.models import LoadedModel

__all__ = ["ProgressingLM", "ScoringLM", "check_finite", "document_of"]


class ProgressingLM:
    """An lm-eval model whose batch size and progress callback are set at each call."""

    _rows: int
    _tick: Callable[[int], None] = staticmethod(lambda _: None)

    def answer(self, kind: str, requests: Sequence[Any], *, rows: int, tick: Callable[[int], None]) -> list[Any]:
        """One answer for each of these requests, which are all of the same type.

        Args:
            kind: Type of the requests, the name of a method of lm-eval's `LM`, such as "loglikelihood".
            requests: In the order of the answers.
            rows: A batch has at most this many times 128 tokens.
            tick: Called with the number of requests just finished.

        Raises:
            NonFiniteError: A score is NaN or infinite.
        """
        self._rows, self._tick = rows, tick
        answers: list[Any] = getattr(self, kind)(requests)
        return answers


class ScoringLM(ProgressingLM, SharedPrefixLM):
    """`SharedPrefixLM` around a model that surgery changes between calls.

    Between calls it keeps only the tokens of the requests and how this architecture can share work; surgery changes
    neither.

    Args:
        loaded: The model.
        batch_size: A batch has at most this many times 128 tokens, or fewer if the device is fastest with fewer.
        max_length: Tokens of context; None for the model's own limit.

    Raises:
        ModelError: The tokenizer has neither a beginning- nor an end-of-text token.
    """

    def __init__(self, loaded: LoadedModel, *, batch_size: int, max_length: int | None) -> None:
        tokenizer = loaded.tokenizer
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of '{loaded.ref}' must have a beginning- or end-of-text token to score a text without "
                f"a context, but it has neither"
            )
        with _ties_untouched(loaded.model):
            # HFLM adds a padding token to the tokenizer; a copy leaves the original unchanged for export.
            super().__init__(
                loaded.model, tokenizer=copy.deepcopy(tokenizer), max_length=max_length, softmax_dtype="float32"
            )
        self._rows = batch_size
        self._asked: list[Any] = []
        self._tokens: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    @property
    def device(self) -> torch.device:
        """Present device of the model."""
        return self.model.device  # type: ignore[no-any-return]

    def prepare(self, requests: Sequence[Any]) -> int:
        """Tokenise log-likelihood requests for all later calls; return how many are cut to `max_length`.

        Raises:
            TaskError: A continuation is empty or longer than the model's context.
        """
        cut = 0
        for request in requests:
            if request.request_type != "loglikelihood":
                continue
            context, continuation = request.args
            if not isinstance(context, str) or not isinstance(continuation, str) or not continuation:
                raise TaskError(f"a continuation must be a non-empty string, but {document_of(request)} has none")
            before, scored = self._encode_pair(context, continuation) if context else ([0], [0])
            if not 0 < len(scored) <= self.max_length:
                raise TaskError(
                    f"a continuation must have 1 to {self.max_length} tokens, but {document_of(request)} has"
                    f" {len(scored)}"
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
        """Log-likelihood of every whole text, scored in slices so that progress is reported."""
        self._asked = []
        scores: list[float] = []
        for start in range(0, len(requests), self._rows):
            part = requests[start : start + self._rows]
            found = super().loglikelihood_rolling(part, disable_tqdm=True)
            for request, score in zip(part, found, strict=True):
                check_finite(score, request)
            scores.extend(found)
            self._tick(len(part))
        return scores

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Continuation of every context, greedy unless the task says otherwise."""
        if not requests:
            return []
        # Generation silently turns NaN logits into tokens; one forward pass detects them.
        probe = torch.tensor([self.tok_encode(requests[0].args[0])[: self.max_length]], device=self.device)
        if probe.numel():
            check_finite(float(self._model_call(probe).sum()), requests[0])
        self.cache_hook = _Ticker(self._tick)
        return super().generate_until(requests, disable_tqdm=True)

    def _finished(self, found: Sequence[tuple[int, Score]], bar: tqdm[Any]) -> None:
        """Refuse non-finite scores at once: an invalid trial need not be scored to its end."""
        if not self._asked:  # the windows of whole texts are checked by the caller
            return
        for index, (score, _) in found:
            check_finite(score, self._asked[index])
        self._tick(len(found))

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Score]:
        self._scorer.batch_tokens = self._rows * TOKENS_PER_ROW
        return super()._loglikelihood_tokens(requests, disable_tqdm=True)


class _Ticker:
    """Takes the place of lm-eval's cache hook to count generated texts."""

    def __init__(self, tick: Callable[[int], None]) -> None:
        self._tick = tick

    def add_partial(self, kind: str, request: object, answer: object) -> None:
        if kind == "generate_until":
            self._tick(1)


@contextlib.contextmanager
def _ties_untouched(model: PreTrainedModel) -> Iterator[None]:
    """Keep `HFLM` from calling `tie_weights()`, which would tie weights that a checkpoint stores separately."""
    model.tie_weights = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.tie_weights


def document_of(request: Any) -> str:
    """The document of a request, for messages."""
    return f"document {request.doc_id} of task '{request.task_name}'"


def check_finite(score: float, request: Any) -> None:
    """Check the score of a request.

    Raises:
        NonFiniteError: It is NaN or infinite.
    """
    if not math.isfinite(score):
        raise NonFiniteError(
            f"log-likelihoods must be finite, but {document_of(request)} got {score}; the point's weights or "
            f"activations overflow, so the trial is invalid"
        )

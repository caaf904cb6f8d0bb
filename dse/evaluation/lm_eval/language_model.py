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
from dse.evaluation.evaluator_settings import TOKENS_PER_ROW, BatchSize
from dse.evaluation.lm_eval.shared_prefix import Request, SharedPrefixLM
from dse.evaluation.scoring import Score
from dse.models import LoadedModel
from dse.out_of_memory import is_out_of_memory

__all__ = ["ProgressingLM", "ScoringLM", "check_finite", "document_of"]


class ProgressingLM:
    """An lm-eval model whose batch size and progress callback are set at each call.

    Attributes:
        batch_limit: Set by `answer`; batches are filled up to its tokens.
        keep: Subclasses call it with (position in the requests, answer) of every answer as soon as it is finished.
    """

    batch_limit: BatchSize
    keep: Callable[[int, Any], None] = staticmethod(lambda _position, _answer: None)

    def answer(
        self, kind: str, requests: Sequence[Any], batch_size: BatchSize, tick: Callable[[int], None]
    ) -> list[Any]:
        """One answer for each of these requests, which are all of the same type.

        After an out-of-memory error the batch size is halved, and the requests that have no answer yet are asked again.

        Args:
            kind: Type of the requests, the name of a method of lm-eval's `LM`, such as "loglikelihood".
            requests: In the order of the answers.
            batch_size: Limits the batches.
            tick: Called with the number of requests just finished.

        Raises:
            NonFiniteError: A score is NaN or infinite.
            OutOfMemoryError: The device has no room for the smallest batch.
        """
        self.batch_limit = batch_size
        found: dict[int, Any] = {}

        def ask_the_rest() -> None:
            waiting = [index for index in range(len(requests)) if index not in found]

            def keep(position: int, answer: Any) -> None:
                found[waiting[position]] = answer
                tick(1)

            self.keep = keep
            try:
                getattr(self, kind)([requests[index] for index in waiting])
            finally:
                del self.keep

        batch_size.run(ask_the_rest)
        return [found[index] for index in range(len(requests))]


class ScoringLM(ProgressingLM, SharedPrefixLM):
    """`SharedPrefixLM` around a model that surgery changes between calls.

    Between calls it keeps only the tokens of the requests and how this architecture can share work; surgery changes
    neither.

    Args:
        loaded: The model.
        max_length: Tokens of context; None for the model's own limit.

    Raises:
        ModelError: The tokenizer has neither a beginning- nor an end-of-text token.
    """

    def __init__(self, loaded: LoadedModel, *, max_length: int | None) -> None:
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
        self.batch_limit = BatchSize("auto", loaded.device.type)
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
        texts_at_once = max(1, self.batch_limit.tokens // TOKENS_PER_ROW)
        for start in range(0, len(requests), texts_at_once):
            part = requests[start : start + texts_at_once]
            found = super().loglikelihood_rolling(part, disable_tqdm=True)
            for position, (request, score) in enumerate(zip(part, found, strict=True), start):
                check_finite(score, request)
                self.keep(position, score)
            scores.extend(found)
        return scores

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Continuation of every context, greedy unless the task says otherwise."""
        if not requests:
            return []
        # Generation silently turns NaN logits into tokens; one forward pass detects them.
        probe = torch.tensor([self.tok_encode(requests[0].args[0])[: self.max_length]], device=self.device)
        if probe.numel():
            check_finite(float(self._model_call(probe).sum()), requests[0])
        return super().generate_until(requests, disable_tqdm=True)

    def _finished(self, found: Sequence[tuple[int, Score]], bar: tqdm[Any]) -> None:
        """Refuse non-finite scores at once: an invalid trial need not be scored to its end."""
        if not self._asked:  # the windows of whole texts are checked by the caller
            return
        for index, (score, is_greedy) in found:
            check_finite(score, self._asked[index])
            self.keep(index, (score, is_greedy))

    def _generated(self, index: int, text: str) -> None:
        self.keep(index, text)

    def _cache_tokens(self) -> int:
        """Tokens whose keys and values fit into memory: half of those of the last batch that did not fit."""
        most, limit = super()._cache_tokens(), self.batch_limit.generation_tokens
        return most if limit is None else max(1, min(most, limit))

    def _generate(self, requests: Sequence[Any], tokens: int) -> list[str]:
        try:
            return super()._generate(requests, tokens)
        except Exception as error:
            if is_out_of_memory(error):
                self.batch_limit.generation_tokens = tokens // 2
            raise

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Score]:
        self._scorer.batch_tokens = self.batch_limit.tokens
        return super()._loglikelihood_tokens(requests, disable_tqdm=True)


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

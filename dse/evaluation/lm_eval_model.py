"""The resident model as an lm-eval model: scored in place, in batches that fit, with every score checked."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from dse.errors import ModelError, NonFiniteError, TaskError
from dse.models import LoadedModel

__all__ = ["ScoringLM"]

# Room for one batch's logits and their log-softmax. 512 MiB is 1,365 tokens of a 49,152-word vocabulary; larger
# batches are not faster on a CPU, and a study must fit beside the model in 3 GiB.
_CPU_LOGITS_BYTES = 2**29

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""(texts or None, context tokens, continuation tokens), as `HFLM._loglikelihood_tokens` takes it."""


class ScoringLM(HFLM):  # type: ignore[misc]
    """`HFLM` around a model that surgery changes between calls.

    It keeps only what cannot go stale: the tokens of a request. Scores are those of `HFLM` in float32 log-softmax;
    batches hold at most `batch_size` rows and as many tokens as their logits have room for.

    Attributes:
        rows: Most rows in a batch; may be lowered between calls.
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
                pretrained=loaded.model,
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size,
                max_length=max_length,
                softmax_dtype="float32",
            )
        self.rows = batch_size
        self.tick: Callable[[int], None] = lambda _: None
        self._owners: dict[tuple[Any, ...], Any] = {}
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
        self._owners = {request.args: request for request in requests}
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of every whole text; documents go in slices, so that progress shows."""
        scores: list[float] = []
        self.batch_size_per_gpu = self.rows
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
        self.batch_size_per_gpu = self.rows
        self.cache_hook = _Ticker(self.tick)
        texts: list[str] = super().generate_until(requests, disable_tqdm=True)
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self.batch_size_per_gpu = self.rows
        scores: list[tuple[float, bool] | None] = [None] * len(requests)
        for batch in self._batches(requests):
            found = super()._loglikelihood_tokens([requests[index] for index in batch], disable_tqdm=True)
            for index, score in zip(batch, found, strict=True):
                scores[index] = score
                texts = requests[index][0]
                if texts is not None:
                    _check_finite(score[0], self._owners[texts])
            if requests[batch[0]][0] is not None:
                self.tick(len(batch))
        return [score for score in scores if score is not None]

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Indices of requests, longest first, in batches of at most `rows` rows and the tokens that have room.

        Requests that differ in their last token only share a row in `HFLM`, so they must share a batch.
        """

        def inputs(index: int) -> tuple[int, ...]:
            _, context, continuation = requests[index]
            return tuple(context + continuation[:-1])

        most_tokens = self._tokens_with_room()
        batch: list[int] = []
        seen: set[tuple[int, ...]] = set()
        longest = 0
        for row, index in sorted(
            ((inputs(i), i) for i in range(len(requests))), key=lambda pair: (-len(pair[0]), pair)
        ):
            is_new = row not in seen
            if batch and is_new and (len(seen) == self.rows or (len(seen) + 1) * longest > most_tokens):
                yield batch
                batch, seen = [], set()
            if not batch:
                longest = min(len(row), self.max_length)
            batch.append(index)
            seen.add(row)
        if batch:
            yield batch

    def _tokens_with_room(self) -> int:
        room = _CPU_LOGITS_BYTES
        if self.device.type == "cuda":
            room = torch.cuda.mem_get_info(self.device)[0] // 4
        bytes_per_token = self.config.get_text_config().vocab_size * (self.model.dtype.itemsize + 4)
        return max(1, int(room // bytes_per_token))


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

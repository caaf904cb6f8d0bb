"""Question-answering task: exact match and F1 of a model with an extractive question-answering head."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dse.config import DatasetTaskConfig
from dse.errors import ModelError, TaskError
from dse.evaluation.answers import DocumentAnswers
from dse.evaluation.evaluator_settings import BatchSize
from dse.evaluation.heads.dataset_rows import DatasetRows
from dse.evaluation.heads.encoder_batches import EncodedText, batch_outputs, encoded_texts
from dse.evaluation.heads.head_task import HeadTask, Tick, digest_of
from dse.evaluation.statistics.intervals import Outcomes
from dse.models import LoadedModel

__all__ = ["LONGEST_ANSWER_TOKENS", "QuestionAnsweringTask", "best_span", "exact_match", "token_f1"]

LONGEST_ANSWER_TOKENS = 30
_DEFAULT_STRIDE = 128
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, eq=False)
class _Window:
    """A question with a part of its context: whether each token is in the context, and its character range."""

    document: int
    encoded: EncodedText
    inside: tuple[bool, ...]
    spans: tuple[tuple[int, int], ...]


class QuestionAnsweringTask(HeadTask):
    """A question, a context and its accepted answers; the model answers with the best span of the context.

    Long contexts are split into overlapping windows. The best span over all windows has the highest sum of the logits
    of its first and last token and is at most 30 tokens long. If the dataset has questions without an answer, the
    answer is "" if the first token ([CLS]) scores higher than every span.
    """

    def __init__(self, config: DatasetTaskConfig, drawn: DatasetRows, loaded: LoadedModel, max_length: int) -> None:
        super().__init__(config, drawn)
        if not loaded.tokenizer.is_fast:
            raise ModelError(f"question answering needs a fast tokenizer, but that of '{loaded.ref}' is slow")
        self._loaded = loaded
        self._contexts = [str(row["context"]) for row in drawn.rows]
        self._accepted = [self._answers(position, row["answers"]) for position, row in enumerate(drawn.rows)]
        self._may_refuse = any(not accepted for accepted in self._accepted)
        self._windows = [
            self._encode(position, str(row["question"]), max_length) for position, row in enumerate(drawn.rows)
        ]
        self.digests = tuple(
            digest_of(["question_answering", [w.encoded for w in windows], context, accepted, self._may_refuse])
            for windows, context, accepted in zip(self._windows, self._contexts, self._accepted, strict=True)
        )

    def answer(self, positions: Sequence[int], batch_size: BatchSize, tick: Tick) -> Mapping[int, DocumentAnswers]:
        """The text of the best span of each context."""
        windows = [window for position in positions for window in self._windows[position]]
        waiting = {position: len(self._windows[position]) for position in positions}
        best: dict[int, tuple[float, str]] = {}
        refusal: dict[int, float] = {}
        for batch, _, output in batch_outputs(self._loaded, [window.encoded for window in windows], batch_size):
            starts, ends = output.start_logits.float().cpu(), output.end_logits.float().cpu()
            for row, index in enumerate(batch):
                window, length = windows[index], len(windows[index].spans)
                start, end = starts[row, :length], ends[row, :length]
                self.check_finite(window.document, bool(torch.isfinite(start + end).all()))
                score, text = self._best_text(window, start, end)
                if window.document not in best or score > best[window.document][0]:
                    best[window.document] = score, text
                nothing = float(start[0] + end[0])
                refusal[window.document] = min(refusal.get(window.document, nothing), nothing)
                waiting[window.document] -= 1
                tick(waiting[window.document] == 0)
        return {
            position: [["" if self._may_refuse and refusal[position] > score else text]]
            for position, (score, text) in best.items()
        }

    def outcomes(self, positions: Sequence[int], answers: Sequence[DocumentAnswers]) -> Mapping[str, Outcomes]:
        """F1 and exact match, each in [0, 1]."""
        found = [(str(answer[0][0]), self._accepted[p]) for p, answer in zip(positions, answers, strict=True)]
        return {
            "f1": np.asarray([token_f1(*pair) for pair in found], dtype=np.float64),
            "exact_match": np.asarray([exact_match(*pair) for pair in found], dtype=np.float64),
        }

    def _best_text(self, window: _Window, start: Tensor, end: Tensor) -> tuple[float, str]:
        score, first, last = best_span(start, end, torch.tensor(window.inside))
        begin, finish = window.spans[first][0], window.spans[last][1]
        return score, self._contexts[window.document][begin:finish].strip()

    def _answers(self, position: int, value: Any) -> tuple[str, ...]:
        """Accepted answers from SQuAD's `{text: [...]}`, a list of `{text: ...}`, a list of strings, or one string."""
        texts = value.get("text") if isinstance(value, Mapping) else value
        texts = [texts] if isinstance(texts, str) else texts
        if isinstance(texts, list):
            texts = [entry.get("text") if isinstance(entry, Mapping) else entry for entry in texts]
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise TaskError(
                f"`answers` must be a string, a list of strings, or a mapping with a list `text`, but"
                f" {self.document_name(position)} has {value!r:.80}"
            )
        return tuple(text for text in texts if text)

    def _encode(self, position: int, question: str, max_length: int) -> list[_Window]:
        stride = _DEFAULT_STRIDE if self.config.stride is None else self.config.stride
        tokenizer = self._loaded.tokenizer
        frame = len(tokenizer([question], [""])["input_ids"][0])
        room = max_length - frame
        if room < 1 or (self.config.stride is not None and stride >= room):
            raise TaskError(
                f"question and stride must leave room for a context within {max_length} tokens, but the question of"
                f" {self.document_name(position)} takes {frame} and the stride {stride}; raise `max_length` or lower"
                f" `stride`"
            )
        encoding = tokenizer(
            question,
            self._contexts[position],
            truncation="only_second",
            max_length=max_length,
            stride=min(stride, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        texts = encoded_texts(self._loaded, encoding, len(encoding["input_ids"]))
        windows = []
        for index, encoded in enumerate(texts):
            inside = tuple(part == 1 for part in encoding.sequence_ids(index))
            if not any(inside):
                raise TaskError(f"a context must not be empty, but that of {self.document_name(position)} is")
            spans = tuple((int(first), int(last)) for first, last in encoding["offset_mapping"][index])
            windows.append(_Window(position, encoded, inside, spans))
        return windows


def best_span(start: Tensor, end: Tensor, inside: Tensor) -> tuple[float, int, int]:
    """The span with the highest start[i] + end[j], i <= j < i + 30, both in the context: (score, i, j).

    Args:
        start: Logits of the first token, shape (tokens,).
        end: Logits of the last token, shape (tokens,).
        inside: Whether a token belongs to the context, shape (tokens,), bool.
    """
    scores = start[:, None] + end[None, :]
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(LONGEST_ANSWER_TOKENS - 1)
    allowed &= inside[:, None] & inside[None, :]
    flat = int(scores.masked_fill(~allowed, -torch.inf).argmax())
    first, last = divmod(flat, len(end))
    return float(scores[first, last]), first, last


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if the normalised answer equals an accepted one, else 0; "" means no answer."""
    return float(_normalised(answer) in {_normalised(text) for text in accepted or ("",)})


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, for the best-matching accepted answer.

    Source: Rajpurkar et al. (2016), arXiv 1606.05250; questions without an answer as in Rajpurkar et al. (2018).
    """
    return max(_f1(_normalised(answer).split(), _normalised(text).split()) for text in accepted or ("",))


def _normalised(answer: str) -> str:
    """SQuAD's normalisation: lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def _f1(found: list[str], target: list[str]) -> float:
    if not found or not target:
        return float(found == target)
    common = sum((Counter(found) & Counter(target)).values())
    return 2 * common / (len(found) + len(target))

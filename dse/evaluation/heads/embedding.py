"""Embedding task: agreement of a sentence encoder's cosines with reference scores or the dense model's cosines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dse.config import DatasetTaskConfig
from dse.errors import NonFiniteError, TaskError
from dse.evaluation.answers import DocumentAnswers
from dse.evaluation.evaluator_settings import BatchSize
from dse.evaluation.heads.dataset_rows import DatasetRows
from dse.evaluation.heads.encoder_batches import batch_outputs, encoded_texts
from dse.evaluation.heads.head_task import HeadTask, Tick, digest_of
from dse.evaluation.heads.pooling import POOLINGS, pooling_of
from dse.evaluation.statistics.intervals import Outcomes
from dse.evaluation.statistics.rank_correlation import cosine, spearman, spearman_outcomes
from dse.models import LoadedModel

__all__ = ["EmbeddingTask"]

_FEWEST_PAIRS = 3

Vectors = NDArray[np.float64]


class EmbeddingTask(HeadTask):
    """Pairs of sentences, with or without reference scores; the answer to a pair is two cosines.

    The first is the cosine between the two embeddings of the pair. The second is the mean, over the two sentences, of
    the cosine between the present embedding and the dense model's, which the constructor computes.
    """

    def __init__(
        self, config: DatasetTaskConfig, drawn: DatasetRows, loaded: LoadedModel, max_length: int, batch_size: BatchSize
    ) -> None:
        super().__init__(config, drawn)
        if len(drawn.rows) < _FEWEST_PAIRS:
            raise TaskError(
                f"an embedding task needs at least {_FEWEST_PAIRS} pairs to correlate, but '{self.name}' has"
                f" {len(drawn.rows)}"
            )
        self._loaded = loaded
        self._pooling = config.pooling or pooling_of(loaded)
        self._scores = self._reference_scores(drawn)
        lowered = bool(_sentence_settings(loaded).get("do_lower_case"))
        sentences = [str(row[column]) for row in drawn.rows for column in ("sentence1", "sentence2")]
        texts = [text.lower() for text in sentences] if lowered else sentences
        encoding = loaded.tokenizer(texts, truncation=True, max_length=min(max_length, _longest(loaded, max_length)))
        self._encoded = encoded_texts(loaded, encoding, len(texts))
        self.digests = tuple(
            digest_of(["embedding", self._pooling, self._encoded[2 * index], self._encoded[2 * index + 1]])
            for index in range(len(drawn.rows))
        )
        self._dense = self._embed(range(len(drawn.rows)), batch_size, lambda _: None)
        self._dense_cosines = np.array([cosine(first, second) for first, second in self._dense])

    def answer(self, positions: Sequence[int], batch_size: BatchSize, tick: Tick) -> Mapping[int, DocumentAnswers]:
        """Cosine of the pair, and mean cosine to the dense model's embeddings."""
        now = self._embed(positions, batch_size, tick)
        found: dict[int, DocumentAnswers] = {}
        for position, (first, second) in zip(positions, now, strict=True):
            dense_first, dense_second = self._dense[position]
            fidelity = (cosine(first, dense_first) + cosine(second, dense_second)) / 2
            of_pair = cosine(first, second)
            self.check_finite(position, math.isfinite(of_pair) and math.isfinite(fidelity))
            found[position] = [[of_pair], [fidelity]]
        return found

    def outcomes(self, positions: Sequence[int], answers: Sequence[DocumentAnswers]) -> Mapping[str, Outcomes]:
        """Rank correlation with the dense model's cosines, mean cosine to it, and correlation with reference scores."""
        cosines, fidelity = (np.array([float(answer[k][0]) for answer in answers]) for k in (0, 1))  # type: ignore[arg-type]
        chosen = list(positions)
        found = {
            "fidelity_spearman": self._correlated(cosines, self._dense_cosines[chosen]),
            "fidelity_cosine": fidelity,
        }
        if self._scores is not None:
            found["spearman"] = self._correlated(cosines, self._scores[chosen])
        return found

    def _correlated(self, cosines: Vectors, reference: Vectors) -> Vectors:
        if len(cosines) < _FEWEST_PAIRS or math.isnan(spearman(cosines, reference)):
            raise NonFiniteError(
                f"a rank correlation needs at least {_FEWEST_PAIRS} pairs that differ in similarity, but the"
                f" {len(cosines)} pairs of task '{self.name}' do not; the trial is invalid"
            )
        return spearman_outcomes(cosines, reference)

    def _reference_scores(self, drawn: DatasetRows) -> Vectors | None:
        if "score" not in drawn.rows[0]:
            if self.config.chosen_metric == "spearman":
                raise TaskError(
                    f"the metric spearman needs a column of reference scores, but '{self.name}' has none; name it in"
                    f" `columns` (`score: ...`), or use fidelity_spearman"
                )
            return None
        try:
            scores = np.array([float(row["score"]) for row in drawn.rows])
        except (TypeError, ValueError) as error:
            raise TaskError(f"reference scores must be numbers, but those of '{self.name}' are not: {error}") from error
        if not np.isfinite(scores).all() or (scores == scores[0]).all():
            raise TaskError(f"reference scores must be finite and differ, but those of '{self.name}' do not")
        return scores

    def _embed(self, positions: Sequence[int], batch_size: BatchSize, tick: Tick) -> Vectors:
        """Present embeddings, shape (positions, 2, width)."""
        places = [2 * position + part for position in positions for part in (0, 1)]
        vectors: dict[int, Vectors] = {}
        finished = 0
        for batch, inputs, output in batch_outputs(
            self._loaded, [self._encoded[place] for place in places], batch_size
        ):
            hidden = output.last_hidden_state.float()
            pooled = POOLINGS[self._pooling](hidden, inputs["attention_mask"]).cpu().double().numpy()
            vectors |= dict(zip(batch, pooled, strict=True))
            done = len(vectors) // 2
            tick(done - finished)
            finished = done
        return np.stack([vectors[index] for index in range(len(places))]).reshape(len(positions), 2, -1)


def _sentence_settings(loaded: LoadedModel) -> Mapping[str, object]:
    try:
        settings = json.loads(loaded.sentence_files.get("sentence_bert_config.json", "{}"))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _longest(loaded: LoadedModel, most: int) -> int:
    """The encoder's maximum length from sentence-transformers' files, else `most`."""
    longest = _sentence_settings(loaded).get("max_seq_length")
    return longest if isinstance(longest, int) and longest > 0 else most

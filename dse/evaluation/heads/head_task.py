"""Base class of dataset tasks, independent of the head."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dse.config import DatasetTaskConfig
from dse.errors import NonFiniteError
from dse.evaluation.answers import DocumentAnswers
from dse.evaluation.evaluator_settings import BatchSize
from dse.evaluation.graded_metrics import GradedMetric
from dse.evaluation.heads.dataset_rows import DatasetRows
from dse.evaluation.statistics.intervals import Outcomes

__all__ = ["HeadTask", "Tick"]

Tick = Callable[[int], None]
"""Called with the number of documents just answered."""


class HeadTask(ABC):
    """One dataset task: the constructor encodes its documents, and each call uses the present state of the model.

    Attributes:
        config: The task's configuration.
        documents: Indices of the documents in the dataset, ascending.
        places: Place of each document in the order of drawing.
        digests: Digest of each document: everything that its answer depends on besides the model.
    """

    def __init__(self, config: DatasetTaskConfig, drawn: DatasetRows) -> None:
        self.config = config
        self.documents = drawn.documents
        self.places = drawn.places
        self.digests: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the task in tables and records."""
        return self.config.task_name

    @abstractmethod
    def answer(self, positions: Sequence[int], batch_size: BatchSize, tick: Tick) -> Mapping[int, DocumentAnswers]:
        """Answers of the model in its present state.

        Args:
            positions: Positions of the documents in `documents`.
            batch_size: Tokens in a batch; halved when memory runs out.
            tick: Called as documents are finished.

        Returns:
            Position to the model's answers.

        Raises:
            NonFiniteError: An output is NaN or infinite.
        """

    @abstractmethod
    def outcomes(self, positions: Sequence[int], answers: Sequence[DocumentAnswers]) -> Mapping[str, Outcomes]:
        """Metric to one outcome per document, whose mean is the metric.

        Args:
            positions: Positions of the documents in `documents`.
            answers: Their answers, in this order.

        Raises:
            NonFiniteError: A metric cannot be computed from these answers.
        """

    @property
    def graded_names(self) -> tuple[GradedMetric, ...]:
        """The task's graded metrics."""
        return ()

    def graded(self, answers: Sequence[DocumentAnswers]) -> Mapping[str, Outcomes]:
        """Graded metric to one outcome per document, from the documents' answers."""
        return {}

    def document_name(self, position: int) -> str:
        """The document at a position, for messages."""
        return f"document {self.documents[position]} of task '{self.name}'"

    def check_finite(self, position: int, is_finite: bool) -> None:
        """Mark the trial as invalid if an output is not finite.

        Raises:
            NonFiniteError: `is_finite` is false.
        """
        if not is_finite:
            raise NonFiniteError(
                f"the model's outputs must be finite, but those of {self.document_name(position)} are not; the point's"
                f" weights or activations overflow, so the trial is invalid"
            )


def digest_of(value: Any) -> str:
    """Thirty-two hexadecimal digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]

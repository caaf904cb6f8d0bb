"""What tasks on a data set have in common, whatever the head."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dse.config import DatasetTaskConfig
from dse.errors import NonFiniteError
from dse.evaluation.answers import DocumentAnswers
from dse.evaluation.graded_metrics import GradedMetric
from dse.evaluation.heads.dataset_rows import DatasetRows

__all__ = ["HeadTask", "Tick"]

Tick = Callable[[int], None]
"""Called with the number of documents just answered."""


class HeadTask(ABC):
    """One task: its documents are encoded when it is made, and answered by the model as it is at each call.

    Attributes:
        config: As the user asked for it.
        documents: Indices in the data set, ascending.
        places: For each, its place in the order of drawing.
        digests: For each, of all that its answer depends on beside the model.
    """

    def __init__(self, config: DatasetTaskConfig, drawn: DatasetRows) -> None:
        self.config = config
        self.documents = drawn.documents
        self.places = drawn.places
        self.digests: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """In tables and records."""
        return self.config.task_name

    @abstractmethod
    def answer(self, positions: Sequence[int], rows: int, tick: Tick) -> Mapping[int, DocumentAnswers]:
        """Ask the model as it is now.

        Args:
            positions: Of the documents, in `documents`.
            rows: A batch holds at most this many times 128 tokens.
            tick: Called as documents are finished.

        Returns:
            Position to what the model answers.

        Raises:
            NonFiniteError: An output is NaN or infinite.
        """

    @abstractmethod
    def outcomes(
        self, positions: Sequence[int], answers: Sequence[DocumentAnswers]
    ) -> Mapping[str, NDArray[np.float64]]:
        """Metric to one outcome per document, whose mean is the metric.

        Args:
            positions: Of the documents, in `documents`.
            answers: Theirs, in this order.

        Raises:
            NonFiniteError: A metric cannot be computed from these answers.
        """

    @property
    def graded_names(self) -> tuple[GradedMetric, ...]:
        """Graded metrics that the task has beside its metrics."""
        return ()

    def graded(self, answers: Sequence[DocumentAnswers]) -> Mapping[str, NDArray[np.float64]]:
        """Graded metric to one outcome per document, from their answers in this order."""
        return {}

    def place_of(self, position: int) -> str:
        """How to name a document in a message."""
        return f"document {self.documents[position]} of task '{self.name}'"

    def check_finite(self, position: int, is_finite: bool) -> None:
        """Void the trial where an output is not a number.

        Raises:
            NonFiniteError: `is_finite` is false.
        """
        if not is_finite:
            raise NonFiniteError(
                f"the model's outputs must be finite, but {self.place_of(position)} got others; the point's weights or"
                f" activations overflow, so the trial is void"
            )


def digest_of(value: Any) -> str:
    """Thirty-two hexadecimal digits of a value made of JSON's kinds."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]

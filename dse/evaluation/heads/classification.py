"""Classification task: accuracy of a model with a sequence-classification head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dse.config import DatasetTaskConfig
from dse.double_precision import in_double
from dse.errors import TaskError, did_you_mean
from dse.evaluation.answers import DocumentAnswers
from dse.evaluation.evaluator_settings import BatchSize
from dse.evaluation.graded_metrics import CHOICE_PROBABILITY, GRADED_METRICS, TARGET_LOG_LIKELIHOOD, GradedMetric
from dse.evaluation.heads.dataset_rows import DatasetRows
from dse.evaluation.heads.encoder_batches import batch_outputs, encoded_texts
from dse.evaluation.heads.head_task import HeadTask, Tick, digest_of
from dse.evaluation.statistics.intervals import Outcomes
from dse.models import LoadedModel

__all__ = ["ClassificationTask"]


class ClassificationTask(HeadTask):
    """One text or a pair with a label; answered by the likeliest label and the right label's log-probability."""

    def __init__(self, config: DatasetTaskConfig, drawn: DatasetRows, loaded: LoadedModel, max_length: int) -> None:
        super().__init__(config, drawn)
        self._loaded = loaded
        self._targets = _target_labels(config, drawn, loaded)
        texts = [str(row["text"]) for row in drawn.rows]
        pairs = [str(row["text_pair"]) for row in drawn.rows] if "text_pair" in drawn.rows[0] else None
        encoding = loaded.tokenizer(texts, pairs, truncation=True, max_length=max_length)
        self._encoded = encoded_texts(loaded, encoding, len(texts))
        self.digests = tuple(
            digest_of(["classification", encoded, target])
            for encoded, target in zip(self._encoded, self._targets, strict=True)
        )

    def answer(self, positions: Sequence[int], batch_size: BatchSize, tick: Tick) -> Mapping[int, DocumentAnswers]:
        """Index of the most likely label, as a string, and log-probability of the right label."""
        found: dict[int, DocumentAnswers] = {}
        for batch, _, output in batch_outputs(
            self._loaded, [self._encoded[position] for position in positions], batch_size
        ):
            logits = in_double(output.logits)
            finite, likeliest = torch.isfinite(logits).all(dim=1).tolist(), logits.argmax(dim=1).tolist()
            log_p = logits.log_softmax(dim=1).tolist()
            for row, index in enumerate(batch):
                position = positions[index]
                self.check_finite(position, finite[row])
                found[position] = [[str(likeliest[row])], [float(log_p[row][self._targets[position]])]]
            tick(len(batch))
        return found

    def outcomes(self, positions: Sequence[int], answers: Sequence[DocumentAnswers]) -> Mapping[str, Outcomes]:
        """Accuracy: 1 if the label is right, else 0."""
        right = [
            float(answer[0][0] == str(self._targets[position]))
            for position, answer in zip(positions, answers, strict=True)
        ]
        return {"accuracy": np.asarray(right, dtype=np.float64)}

    @property
    def graded_names(self) -> tuple[GradedMetric, ...]:
        """Both metrics, since the labels are choices of which one is right."""
        return GRADED_METRICS

    def graded(self, answers: Sequence[DocumentAnswers]) -> Mapping[str, Outcomes]:
        """Probability of the right label and its logarithm."""
        log_p = np.asarray([answer[1][0] for answer in answers], dtype=np.float64)
        return {CHOICE_PROBABILITY: np.exp(log_p), TARGET_LOG_LIKELIHOOD: log_p}


def _target_labels(config: DatasetTaskConfig, drawn: DatasetRows, loaded: LoadedModel) -> list[int]:
    """The model's index for each document's label."""
    names = {int(index): str(name) for index, name in (loaded.model.config.id2label or {}).items()}
    if len(names) < 2:
        raise TaskError(
            f"a classification task needs a head of at least two labels, but that of '{loaded.ref}' has {len(names)}"
        )
    found: dict[str, int] = {}
    _check_label_keys(config, drawn)
    labels = []
    for document, row in zip(drawn.documents, drawn.rows, strict=True):
        text = _label_text(row["label"], drawn.label_names)
        if text not in found:
            found[text] = _index_of(text, row["label"], config, names, drawn.label_names)
        if found[text] not in names:
            known = ", ".join(f"{index} ({name})" for index, name in names.items())
            raise TaskError(
                f"a label must be one of the model's ({known}), but row {document} of task '{config.task_name}' has"
                f" '{row['label']}'; map it in `labels`, or use another split if this one has no labels"
            )
        labels.append(found[text])
    return labels


def _label_text(label: Any, names: Sequence[str] | None) -> str:
    is_index = isinstance(label, int) and not isinstance(label, bool)
    return names[label] if names is not None and is_index and 0 <= label < len(names) else str(label)


def _check_label_keys(config: DatasetTaskConfig, drawn: DatasetRows) -> None:
    """Refuse a key of `labels` that looks like a misspelt label."""
    known = {str(row["label"]) for row in drawn.rows} | {_label_text(r["label"], drawn.label_names) for r in drawn.rows}
    known |= set(drawn.label_names or ())
    for key in config.labels:
        # A label may be absent among few drawn documents, so only near misses are refused.
        if key not in known and not key.lstrip("-").isdigit() and did_you_mean(key, known):
            raise TaskError(
                f"`labels` must name labels of the dataset, but '{config.task_name}' has no '{key}'"
                f"{did_you_mean(key, known)}"
            )


def _index_of(
    text: str, label: Any, config: DatasetTaskConfig, names: Mapping[int, str], label_names: Sequence[str] | None
) -> int:
    """From the user's mapping; else by name, ignoring case; else by number, if one side has no names of its own."""
    by_name = {name.casefold(): index for index, name in names.items()}
    mapped = config.labels.get(text, config.labels.get(str(label)))
    if mapped is not None:
        return by_name.get(mapped.casefold(), int(mapped) if mapped.isdigit() else -1)
    if text.casefold() in by_name:
        return by_name[text.casefold()]
    is_number = isinstance(label, int | float | bool) and float(label).is_integer()
    has_own_names = not all(name == f"LABEL_{index}" for index, name in names.items())
    if not is_number or (label_names is not None and has_own_names and int(label) >= 0):
        raise TaskError(
            f"a label of the dataset must be one of the model's ({', '.join(names.values())}), but"
            f" '{config.task_name}' has '{text}'; map it, for example `labels: {{{text}: {names[0]}}}`"
        )
    return int(label)

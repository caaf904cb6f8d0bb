"""Results of an evaluation: one record per task, with the outcome of every document, and their storage."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dse.defaults import RENAMED_OBJECTIVES
from dse.errors import StudyError, TaskError
from dse.evaluation.graded_metrics import GRADED_METRICS
from dse.evaluation.statistics.intervals import Interval, PairedDrop, PairedRatio, mean_interval, perplexity_interval
from dse.evaluation.statistics.paired_tests import drop_with_test, perplexity_ratio_with_test
from dse.files import write_bytes

__all__ = ["EvaluationResult", "TaskResult", "choose_metric", "kind_of", "read_graded", "read_outcomes"]

PERPLEXITY_METRICS = ("word_perplexity", "perplexity", "byte_perplexity")
"""Metrics of the form exp(-log-likelihood per unit); their outcomes are (log-likelihood, units) pairs."""

Kind = Literal["accuracy", "perplexity", "other"]

_STORED_FIELDS = ("task", "metric", "value", "stderr", "documents", "higher_is_better", "weight", "kind")
_PREFERRED_METRICS = ("acc", "acc_norm", "exact_match", "f1", *PERPLEXITY_METRICS)


@dataclass(frozen=True, eq=False)
class TaskResult:
    """Result of one task.

    Attributes:
        task: Name of the task.
        metric: Name of its main metric.
        value: Value of the main metric.
        stderr: Its unpaired standard error, as lm-eval reports it; None if absent.
        documents: Number of documents evaluated.
        higher_is_better: Direction of the main metric.
        outcomes: float64, one row per document in the order of the dataset: shape (documents,) for a metric that is a
            mean, (documents, 2) for (log-likelihood, words) and other pairs; NaN for a document without an outcome.
        all_metrics: Every metric of the task: name to (value, standard error); None if absent.
        weight: Weight of the task in the means of `EvaluationResult`.
        kind: `accuracy` (mean over documents of values in [0, 1], higher is better; also a rank correlation, as the
            mean of its pseudo-values), `perplexity`, or `other`, which is part of no mean.
        graded: Graded metrics (see `dse.evaluation.graded_metrics`): name to outcomes, shape (documents,).
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int
    higher_is_better: bool
    outcomes: NDArray[np.float64]
    all_metrics: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    weight: float = 1.0
    kind: Kind = "other"
    graded: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Results of all tasks for one design point.

    Attributes:
        tasks: One result per task, in the requested order.
        seconds: Wall time of the evaluation.
        batch_tokens: Most tokens in a batch at the end of the evaluation; lower than at its start if memory ran out.
            None in results of earlier versions.
    """

    tasks: tuple[TaskResult, ...]
    seconds: float
    batch_tokens: int | None = None

    @property
    def accuracy(self) -> float | None:
        """Weighted mean over the tasks of kind `accuracy`; None without one."""
        return _weighted_mean(self._of_kind("accuracy"), lambda task: task.value)

    @property
    def accuracy_stderr(self) -> float | None:
        """Standard error of `accuracy` for independent tasks; None if a task has none."""
        tasks = self._of_kind("accuracy")
        if not tasks or any(task.stderr is None for task in tasks):
            return None
        total = sum(task.weight for task in tasks)
        return math.sqrt(sum((task.weight / total * (task.stderr or 0.0)) ** 2 for task in tasks))

    @property
    def perplexity(self) -> float | None:
        """Weighted geometric mean over the tasks of kind `perplexity`; None without one."""
        mean = _weighted_mean(self._of_kind("perplexity"), lambda task: math.log(task.value))
        return None if mean is None else math.exp(mean)

    def accuracy_interval(self, confidence: float = 0.95) -> Interval | None:
        """`accuracy` with its confidence interval; None without an accuracy task."""
        tasks = self._of_kind("accuracy")
        return mean_interval(_outcomes(tasks), _weights(tasks), confidence) if tasks else None

    def perplexity_interval(self, confidence: float = 0.95) -> Interval | None:
        """`perplexity` with its confidence interval; None without a perplexity task."""
        tasks = self._of_kind("perplexity")
        return perplexity_interval(_outcomes(tasks), _weights(tasks), confidence) if tasks else None

    def accuracy_drop(self, baseline: EvaluationResult, confidence: float = 0.95) -> PairedDrop | None:
        """Baseline accuracy minus this accuracy, paired by document; None without an accuracy task.

        Tested by exact McNemar for 0/1 outcomes and by the paired bootstrap for graded ones.

        Raises:
            TaskError: The baseline was evaluated on other tasks or documents.
        """
        ours, theirs = _aligned(self._of_kind("accuracy"), baseline._of_kind("accuracy"))
        return drop_with_test(_outcomes(theirs), _outcomes(ours), _weights(ours), confidence) if ours else None

    def perplexity_ratio(self, baseline: EvaluationResult, confidence: float = 0.95) -> PairedRatio | None:
        """This perplexity over the baseline's, tested by the paired bootstrap; None without a perplexity task.

        Raises:
            TaskError: The baseline was evaluated on other tasks or documents.
        """
        ours, theirs = _aligned(self._of_kind("perplexity"), baseline._of_kind("perplexity"))
        if not ours:
            return None
        return perplexity_ratio_with_test(_outcomes(theirs), _outcomes(ours), _weights(ours), confidence)

    def graded_interval(self, metric: str, confidence: float = 0.95) -> Interval | None:
        """Weighted mean of a graded metric over the tasks that have it; None without one."""
        tasks = self._graded_tasks(metric)
        return mean_interval([t.graded[metric] for t in tasks], _weights(tasks), confidence) if tasks else None

    def graded_drop(self, metric: str, baseline: EvaluationResult, confidence: float = 0.95) -> PairedDrop | None:
        """Baseline minus this in a graded metric, tested by the paired bootstrap; None without a task that has it.

        Raises:
            TaskError: The baseline was evaluated on other tasks or documents.
        """
        ours, theirs = _aligned(self._graded_tasks(metric), baseline._graded_tasks(metric))
        if not ours:
            return None
        before, after = ([task.graded[metric] for task in tasks] for tasks in (theirs, ours))
        return drop_with_test(before, after, _weights(ours), confidence)

    @property
    def graded_metrics(self) -> tuple[str, ...]:
        """Graded metrics that at least one task has."""
        return tuple(name for name in GRADED_METRICS if self._graded_tasks(name))

    def to_json(self) -> dict[str, Any]:
        """Everything except the outcomes (see `write_outcomes`), as JSON values."""
        return {
            "seconds": self.seconds,
            "batch_tokens": self.batch_tokens,
            "tasks": [
                {name: getattr(task, name) for name in _STORED_FIELDS}
                | {"all_metrics": {name: list(pair) for name, pair in task.all_metrics.items()}}
                for task in self.tasks
            ],
        }

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any],
        outcomes: Mapping[str, NDArray[np.float64]] | None = None,
        graded: Mapping[str, Mapping[str, NDArray[np.float64]]] | None = None,
    ) -> EvaluationResult:
        """Inverse of `to_json`.

        Args:
            data: The result of `to_json`.
            outcomes: The result of `read_outcomes`; without it, tasks have no outcomes and no intervals.
            graded: The result of `read_graded`; without it, tasks have no graded metrics.

        Raises:
            StudyError: `data` lacks a key or has a value of the wrong type.
        """
        try:
            tasks = tuple(_task_of_json(task, outcomes or {}, graded or {}) for task in data["tasks"])
            return cls(tasks, float(data["seconds"]), data.get("batch_tokens"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StudyError(f"a stored evaluation must have every field, but: {error!r}; evaluate it again") from error

    def write_outcomes(self, path: Path) -> None:
        """Write the outcomes of every task to a compressed .npz file, atomically and without pickle.

        Raises:
            StorageFullError: The disk is full or the folder cannot be written.
        """
        arrays = {f"outcomes_{index}": task.outcomes for index, task in enumerate(self.tasks)}
        for index, task in enumerate(self.tasks):
            arrays |= {f"{name}_{index}": outcomes for name, outcomes in task.graded.items()}
        names = np.asarray([task.task for task in self.tasks], dtype=np.str_)
        stream = io.BytesIO()
        np.savez_compressed(stream, allow_pickle=False, tasks=names, **arrays)
        write_bytes(path, stream.getvalue())

    def _of_kind(self, kind: Kind) -> list[TaskResult]:
        return [task for task in self.tasks if task.kind == kind]

    def _graded_tasks(self, metric: str) -> list[TaskResult]:
        return [task for task in self.tasks if metric in task.graded and not np.isnan(task.graded[metric]).all()]


def read_outcomes(path: Path) -> dict[str, NDArray[np.float64]]:
    """Read the outcomes that `EvaluationResult.write_outcomes` wrote: task name to outcomes.

    Raises:
        StudyError: The file is missing or damaged.
    """
    names, arrays = _read_arrays(path)
    try:
        return {name: arrays[f"outcomes_{index}"] for index, name in enumerate(names)}
    except KeyError as error:
        raise _damaged(path) from error


def read_graded(path: Path) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Read the graded outcomes that `EvaluationResult.write_outcomes` wrote: task name to metric to outcomes.

    Files of version 0.1, which use the old metric names, are read as well.

    Raises:
        StudyError: The file is missing or damaged.
    """
    names, arrays = _read_arrays(path)
    stored_names: dict[str, str] = {**{name: name for name in GRADED_METRICS}, **RENAMED_OBJECTIVES}
    keys = [{f"{stored}_{index}": metric for stored, metric in stored_names.items()} for index in range(len(names))]
    return {
        task: {metric: arrays[key] for key, metric in of_task.items() if key in arrays}
        for task, of_task in zip(names, keys, strict=True)
    }


def _read_arrays(path: Path) -> tuple[list[str], dict[str, NDArray[np.float64]]]:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            names = [str(name) for name in archive["tasks"]]
            return names, {key: archive[key].astype(np.float64, copy=False) for key in archive if key != "tasks"}
    except FileNotFoundError:
        raise StudyError(f"stored outcomes must exist, but '{path}' does not exist; evaluate the trial again") from None
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> StudyError:
    return StudyError(f"stored outcomes must be readable, but '{path}' is damaged; evaluate the trial again")


def kind_of(metric: str, outcomes: NDArray[np.float64], *, is_mean: bool, higher_is_better: bool) -> Kind:
    """The kind of a metric, from its name, its outcomes and their aggregation."""
    if outcomes.ndim == 2:
        return "perplexity" if metric.partition(",")[0] in PERPLEXITY_METRICS else "other"
    present = outcomes[~np.isnan(outcomes)]
    is_share = bool(present.size) and bool(((present >= 0.0) & (present <= 1.0)).all())
    return "accuracy" if is_mean and higher_is_better and is_share else "other"


def choose_metric(task: str, available: Sequence[str], asked: str | None = None) -> str:
    """Choose the main metric of a task.

    Args:
        task: Name of the task, for the message.
        available: The task's metrics in its own order, as `name` or `name,filter`.
        asked: The user's choice; a name without a filter selects its first filter.

    Raises:
        TaskError: The task has no metric, or not the requested one.
    """
    if not available:
        raise TaskError(f"a task must have a metric, but '{task}' has none; add a `metric_list`")
    if asked is None:
        found = (_with_name(name, available) for name in _PREFERRED_METRICS)
        return next((metric for metric in found if metric is not None), available[0])
    metric = asked if asked in available else _with_name(asked, available)
    if metric is None:
        raise TaskError(f"the metric of task '{task}' must be one of {', '.join(available)}, but got '{asked}'")
    return metric


def _with_name(name: str, available: Sequence[str]) -> str | None:
    return next((metric for metric in available if metric.partition(",")[0] == name), None)


def _kind(value: object) -> Kind:
    if value == "accuracy" or value == "perplexity" or value == "other":
        return value
    raise ValueError(f"unknown kind {value!r}")


def _outcomes(tasks: Sequence[TaskResult]) -> list[NDArray[np.float64]]:
    return [task.outcomes for task in tasks]


def _weights(tasks: Sequence[TaskResult]) -> list[float]:
    return [task.weight for task in tasks]


def _weighted_mean(tasks: Sequence[TaskResult], value: Callable[[TaskResult], float]) -> float | None:
    total = sum(task.weight for task in tasks)
    return sum(task.weight * value(task) for task in tasks) / total if tasks else None


def _aligned(*both: list[TaskResult]) -> tuple[list[TaskResult], ...]:
    """Both lists, after a check that they have the same tasks and metrics."""
    names = [[(task.task, task.metric) for task in tasks] for tasks in both]
    if names[0] != names[1]:
        raise TaskError(f"paired results must be of the same tasks and metrics, but got {names[0]} and {names[1]}")
    return both


def _task_of_json(
    data: Mapping[str, Any],
    outcomes: Mapping[str, NDArray[np.float64]],
    graded: Mapping[str, Mapping[str, NDArray[np.float64]]],
) -> TaskResult:
    stderr = data["stderr"]
    return TaskResult(
        task=str(data["task"]),
        metric=str(data["metric"]),
        value=float(data["value"]),
        stderr=None if stderr is None else float(stderr),
        documents=int(data["documents"]),
        higher_is_better=bool(data["higher_is_better"]),
        outcomes=outcomes.get(str(data["task"]), np.empty(0, dtype=np.float64)),
        all_metrics={str(name): (value, error) for name, (value, error) in data["all_metrics"].items()},
        weight=float(data["weight"]),
        kind=_kind(data["kind"]),
        graded=graded.get(str(data["task"]), {}),
    )

"""The rows of a data set that a task reads: from a local file, from the hub, or from those shipped with the package."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import datasets

from dse.config import HEAD_COLUMNS, LOCAL_SUFFIXES, DatasetTaskConfig
from dse.errors import TaskError, UserError, did_you_mean
from dse.evaluation.hub_access import hub_dataset
from dse.files import disk_errors

__all__ = ["DatasetRows", "read_rows", "shipped_datasets"]

_SHIPPED = Path(__file__).resolve().parent.parent / "data" / "tasks"


@dataclass(frozen=True, eq=False)
class DatasetRows:
    """Rows drawn from a data set.

    Attributes:
        documents: Indices in the data set, ascending.
        places: For each, its place in the order of drawing: the first n drawn are those with the lowest places.
        rows: For each, the columns that the head reads, by the head's own names for them.
        label_names: Names of the integer labels, where the data set has them.
    """

    documents: tuple[int, ...]
    places: tuple[int, ...]
    rows: tuple[Mapping[str, Any], ...]
    label_names: tuple[str, ...] | None = None


def shipped_datasets() -> Mapping[str, Path]:
    """Names and files of the data sets shipped with the package that are not lm-eval tasks."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.jsonl")) if not path.with_suffix(".yaml").exists()}


def read_rows(task: DatasetTaskConfig, *, limit: int | None, seed: int) -> DatasetRows:
    """Read a task's data set and draw its documents by seed.

    Args:
        task: Which data set, and which of its columns.
        limit: Most documents; None means all. A smaller limit draws a part of what a larger one draws.
        seed: Of the draw.

    Raises:
        TaskError: The data set cannot be had or read, lacks a column, or has no row.
        StorageFullError: The cache of `datasets` cannot be written.
    """
    try:
        with disk_errors(Path(datasets.config.HF_DATASETS_CACHE)), _quiet_datasets():
            table = _load(task)
            columns = _columns(task, list(table.column_names))
            if not len(table):
                raise TaskError(f"a task must have at least one document, but '{task.task_name}' has none")
            order = list(range(len(table)))
            random.Random(f"{seed}:{task.task_name}").shuffle(order)
            drawn = sorted((index, place) for place, index in enumerate(order[:limit]))
            documents = tuple(index for index, _ in drawn)
            chosen = table.select(documents)
            rows = tuple({role: row[column] for role, column in columns.items()} for row in chosen)
            feature = table.features.get(columns.get("label", ""))
    except (UserError, MemoryError):
        raise
    except Exception as error:  # parsers of a user's files raise anything
        reason = " ".join(str(error.__cause__ or error).split())
        if isinstance(error, StopIteration) or "corresponds to no data" in reason:  # how `datasets` meets an empty file
            raise TaskError(f"a task must have at least one document, but '{task.task_name}' has none") from error
        raise TaskError(
            f"the data set of task '{task.task_name}' must be one that can be read, but: {type(error).__name__}:"
            f" {reason:.200}"
        ) from error
    for document, row in zip(documents, rows, strict=True):
        empty = next((role for role, value in row.items() if value is None), None)
        if empty is not None:
            raise TaskError(f"every column must be filled, but row {document} of '{task.task_name}' has no {empty}")
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return DatasetRows(documents, tuple(place for _, place in drawn), rows, names)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without logs and bars; those of a download stay off as well, since `datasets` knows but one switch."""
    level, has_bars = datasets.utils.logging.get_verbosity(), not datasets.utils.are_progress_bars_disabled()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)
        if has_bars:
            datasets.utils.enable_progress_bars()


def _load(task: DatasetTaskConfig) -> Any:
    if not task.is_hub:
        path = _local_path(task)
        kind = LOCAL_SUFFIXES[path.suffix.lower()]
        options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
        return datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    if Path(task.dataset).exists():
        raise TaskError(
            f"a data set must be one file ({', '.join(LOCAL_SUFFIXES)}) or one of the hub, but '{task.dataset}' is a"
            f" local folder; name the file"
        )
    with hub_dataset(task.task_name, f"the data set '{task.dataset}'"):
        return datasets.load_dataset(task.dataset, task.config, split=task.split, revision=task.revision)


def _local_path(task: DatasetTaskConfig) -> Path:
    if task.is_file:
        path = Path(task.dataset).expanduser()
        if not path.is_file():
            raise TaskError(
                f"a data set must exist, but '{PurePath(task.dataset)}' does not; name a file that is there"
            )
        return path
    shipped = shipped_datasets()
    if task.dataset not in shipped:
        raise TaskError(
            f"a shipped data set must be one of {', '.join(shipped)}, but got '{task.dataset}'"
            f"{did_you_mean(task.dataset, shipped)}"
        )
    return shipped[task.dataset]


def _columns(task: DatasetTaskConfig, available: list[str]) -> dict[str, str]:
    """The head's name of each column that is there to the data set's own."""
    found = {}
    for role, is_required in HEAD_COLUMNS[task.head].items():
        column = task.column(role)
        if column in available:
            found[role] = column
        elif is_required or role in task.columns:
            raise TaskError(
                f"a {task.head.replace('_', '-')} task needs the column '{column}' ({role}), but '{task.task_name}' has"
                f" {', '.join(available)}{did_you_mean(column, available)}; name it in `columns`"
            )
    return found

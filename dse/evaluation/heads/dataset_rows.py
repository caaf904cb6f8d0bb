"""Read the rows of a dataset: from a local file, from the hub, or from the package."""

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

_SHIPPED = Path(__file__).resolve().parents[2] / "data" / "tasks"


@dataclass(frozen=True, eq=False)
class DatasetRows:
    """Rows drawn from a dataset.

    Attributes:
        documents: Indices of the rows in the dataset, ascending.
        places: Place of each row in the order of drawing; the first n drawn have the places below n.
        rows: The columns that the head reads, by the head's names for them.
        label_names: Names of the integer labels, if the dataset has them.
    """

    documents: tuple[int, ...]
    places: tuple[int, ...]
    rows: tuple[Mapping[str, Any], ...]
    label_names: tuple[str, ...] | None = None


def shipped_datasets() -> Mapping[str, Path]:
    """Names and files of the datasets in the package that are not lm-eval tasks."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.jsonl")) if not path.with_suffix(".yaml").exists()}


def read_rows(task: DatasetTaskConfig, *, limit: int | None, seed: int) -> DatasetRows:
    """Read a task's dataset and draw its documents by seed.

    Args:
        task: The dataset and its columns.
        limit: Maximum number of documents; None means all. A smaller limit draws a subset of a larger one.
        seed: Seed of the draw.

    Raises:
        TaskError: The dataset is unavailable or unreadable, lacks a column, or has no row.
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
    except Exception as error:  # parsers of users' files can raise anything
        reason = " ".join(str(error.__cause__ or error).split())
        # What `datasets` raises for an empty file.
        if isinstance(error, StopIteration) or "corresponds to no data" in reason:
            raise TaskError(f"a task must have at least one document, but '{task.task_name}' has none") from error
        raise TaskError(
            f"the dataset of task '{task.task_name}' must be readable, but: {type(error).__name__}: {reason:.200}"
        ) from error
    for document, row in zip(documents, rows, strict=True):
        empty = next((role for role, value in row.items() if value is None), None)
        if empty is not None:
            raise TaskError(
                f"no column may have missing values, but row {document} of '{task.task_name}' has no {empty}"
            )
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return DatasetRows(documents, tuple(place for _, place in drawn), rows, names)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without logs and progress bars, including those of downloads: `datasets` has a single switch for both."""
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
            f"a dataset must be a file ({', '.join(LOCAL_SUFFIXES)}) or a hub dataset, but '{task.dataset}' is a local"
            f" folder; name the file"
        )
    with hub_dataset(task.task_name, f"the dataset '{task.dataset}'"):
        return datasets.load_dataset(task.dataset, task.config, split=task.split, revision=task.revision)


def _local_path(task: DatasetTaskConfig) -> Path:
    if task.is_file:
        path = Path(task.dataset).expanduser()
        if not path.is_file():
            raise TaskError(f"a dataset must exist, but '{PurePath(task.dataset)}' does not; name an existing file")
        return path
    shipped = shipped_datasets()
    if task.dataset not in shipped:
        raise TaskError(
            f"a dataset of the package must be one of {', '.join(shipped)}, but got '{task.dataset}'"
            f"{did_you_mean(task.dataset, shipped)}"
        )
    return shipped[task.dataset]


def _columns(task: DatasetTaskConfig, available: list[str]) -> dict[str, str]:
    """The head's name of each available column to the dataset's name for it."""
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

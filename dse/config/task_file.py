"""Files that hold one task on a data set; lm-eval's own task files are left to lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dse.config.dataset_task import DatasetTaskConfig
from dse.errors import ConfigError
from dse.yaml_reading import read_yaml, validated

__all__ = ["dataset_task_of_file", "load_dataset_task"]


def load_dataset_task(path: Path) -> DatasetTaskConfig | None:
    """The task of a file that has a `dataset`; None for every other file.

    Raises:
        ConfigError: The file has a `dataset` and breaks the schema.
    """
    data = dataset_task_of_file(path)
    return None if data is None else validated(DatasetTaskConfig, data, str(path))


def dataset_task_of_file(path: Path) -> dict[str, Any] | None:
    """What such a file says, its data file's path made absolute; None for every other file."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        return None
    try:
        data = read_yaml(path.expanduser())
    except (ConfigError, RuntimeError):  # not plain YAML, or not there: lm-eval's reader says what is wrong
        return None
    if not isinstance(data, Mapping) or not isinstance(data.get("dataset"), str) or "task" in data:
        return None
    found = {"name": path.stem, **data}
    beside = path.expanduser().parent / data["dataset"]
    if beside.is_file():
        found["dataset"] = str(beside.resolve())
    return found

"""YAML files with one dataset task; lm-eval task files are left to lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dse.config.dataset_task import DatasetTaskConfig
from dse.errors import ConfigError
from dse.yaml_reading import read_yaml, validated

__all__ = ["dataset_task_of_file", "load_dataset_task"]


def load_dataset_task(path: Path) -> DatasetTaskConfig | None:
    """The task of a file with the key `dataset`; None for any other file.

    Raises:
        ConfigError: The file has a `dataset` but violates the schema.
    """
    data = dataset_task_of_file(path)
    return None if data is None else validated(DatasetTaskConfig, data, str(path))


def dataset_task_of_file(path: Path) -> dict[str, Any] | None:
    """The content of a dataset task file, with an absolute path of its data file; None for any other file."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        return None
    try:
        data = read_yaml(path.expanduser())
    except (ConfigError, RuntimeError):  # unreadable: lm-eval's reader reports the reason
        return None
    if not isinstance(data, Mapping) or not isinstance(data.get("dataset"), str) or "task" in data:
        return None
    found = {"name": path.stem, **data}
    data_file = path.expanduser().parent / data["dataset"]
    if data_file.is_file():
        found["dataset"] = str(data_file.resolve())
    return found

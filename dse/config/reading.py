"""Read and validate study and search-space files. Relative paths are relative to the file's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dse.config.dataset_task import DatasetTaskConfig
from dse.config.evaluation import TaskConfig
from dse.config.search_space import SearchSpaceConfig
from dse.config.study import StudyConfig
from dse.config.task_file import dataset_task_of_file
from dse.errors import ConfigError
from dse.shipped_files import find_yaml
from dse.yaml_reading import read_yaml, validated

__all__ = ["load_search_space", "load_study", "parse_search_space", "parse_study"]


def load_search_space(path: Path) -> SearchSpaceConfig:
    """Read a search-space file, given by its path or by the name of a shipped one.

    Raises:
        ConfigError: The file is missing, malformed, or violates the schema.
    """
    return parse_search_space(read_yaml(find_yaml(path, "search_spaces")), str(path))


def parse_search_space(data: Any, origin: str = "search space") -> SearchSpaceConfig:
    """Validate a parsed search space; `origin` is its name in error messages.

    Raises:
        ConfigError: The data violate the schema.
    """
    return validated(SearchSpaceConfig, data, origin)


def load_study(path: Path) -> StudyConfig:
    """Read a study file, given by its path or by the name of a shipped one.

    Its paths (search space, tasks, calibration files) are relative to its folder.

    Raises:
        ConfigError: The file or one that it names is missing, malformed, or violates the schema.
    """
    found = find_yaml(path, "studies")
    return parse_study(read_yaml(found), base=found.parent, origin=str(path))


def parse_study(data: Any, *, base: Path | None = None, origin: str = "study") -> StudyConfig:
    """Validate a parsed study.

    Args:
        data: Parsed YAML.
        base: Folder that relative paths are relative to; None means the current directory.
        origin: Name of the study in error messages.

    Raises:
        ConfigError: The data violate the schema.
    """
    folder = (base or Path()).absolute()
    if isinstance(data, dict):
        data = dict(data)
        if isinstance(data.get("space"), str):
            data["space"] = _space_from_file(data["space"], folder).model_dump()
        if isinstance(data.get("tasks"), list):
            data["tasks"] = [_task_from_file(task, folder) for task in data["tasks"]]
        if isinstance(data.get("enqueue"), list):
            data["enqueue"] = [_point_from_file(entry, folder) for entry in data["enqueue"]]
    study = validated(StudyConfig, data, origin)
    return _with_absolute_paths(study, folder)


def _space_from_file(text: str, folder: Path) -> SearchSpaceConfig:
    path = find_yaml(Path(text), "search_spaces", base=folder)
    return load_search_space(Path(_absolute(folder, str(path))))


def _task_from_file(task: Any, folder: Path) -> Any:
    """Read a file that defines a dataset task; return any other task unchanged."""
    entry = {"task": task} if isinstance(task, str) else task
    named = entry.get("task") if isinstance(entry, dict) else None
    if not isinstance(named, str) or not named.endswith((".yaml", ".yml")):
        return task
    found = dataset_task_of_file(Path(_absolute(folder, named)))
    return task if found is None else {**found, **{key: value for key, value in entry.items() if key != "task"}}


def _point_from_file(entry: Any, folder: Path) -> Any:
    """Read a point from a JSON file, as written by `dse allocate --out`; return any other entry unchanged."""
    if not isinstance(entry, str):
        return entry
    path = Path(_absolute(folder, entry))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"`enqueue` must list points or readable JSON files, but {path}: {reason}") from error


def _with_absolute_paths(study: StudyConfig, folder: Path) -> StudyConfig:
    """The study with absolute paths, so that it can be read from any folder."""
    tasks = [_task_with_absolute_path(task, folder) for task in study.tasks]
    sources = [
        s.model_copy(update={"file": _absolute(folder, s.file)}) if s.file is not None else s
        for s in study.calibration.sources
    ]
    meter = study.measurement.meter
    if meter is not None and meter.startswith("replay:"):
        meter = f"replay:{_absolute(folder, meter.removeprefix('replay:'))}"
    return study.model_copy(
        update={
            "tasks": tasks,
            "measurement": study.measurement.model_copy(update={"meter": meter}),
            "calibration": study.calibration.model_copy(update={"sources": sources}),
            "model": study.model.model_copy(update={"ref": _model_ref(folder, study.model.ref)}),
        }
    )


def _task_with_absolute_path(task: TaskConfig | DatasetTaskConfig, folder: Path) -> TaskConfig | DatasetTaskConfig:
    if isinstance(task, DatasetTaskConfig):
        return task.model_copy(update={"dataset": _absolute(folder, task.dataset)}) if task.is_file else task
    is_file = task.task.endswith((".yaml", ".yml"))
    return task.model_copy(update={"task": _absolute(folder, task.task)}) if is_file else task


def _model_ref(folder: Path, ref: str) -> str:
    """The absolute path of a local model; a hub id or `demo:` reference is returned unchanged."""
    if ref.startswith("demo:"):
        return ref
    if ref.startswith((".", "~", "/")) or ref.endswith(".gguf"):
        return _absolute(folder, ref)
    # `models/mine` may be a folder or a hub id; an existing folder takes precedence, as in `from_pretrained`.
    return next((str(place.resolve()) for place in (folder / ref, Path(ref)) if _is_folder(place)), ref)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file system accepts
        return False


def _absolute(folder: Path, text: str) -> str:
    try:
        return str((folder / Path(text).expanduser()).resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, or `~user` for an unknown user
        raise ConfigError(f"a path must be valid on this machine, but got {text!r:.80}: {error}") from error

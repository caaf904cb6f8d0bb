"""Evaluation tasks as the user names them, and lm-eval task files, read as data: no code in them is run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dse.errors import TaskError, did_you_mean

__all__ = ["LOCAL_DATASETS", "TaskSource", "TaskSpec", "builtin_tasks", "read_task_file", "resolve_task"]

LOCAL_DATASETS = ("json", "csv", "text", "parquet", "arrow")
"""Values of `dataset_path` that read local files; every other value names a dataset on the Hugging Face hub."""

# Readers of `datasets` that unpickle, open databases or run code; a task file must not use them.
_UNSAFE_DATASETS = ("pandas", "sql", "spark", "generator", "webdataset", "eval")
_TASK_FOLDER = Path(__file__).resolve().parent.parent / "data" / "tasks"
_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class TaskSpec:
    """One evaluation task and its settings.

    Attributes:
        task: An lm-eval task name, a built-in name (`dse_grammar`, `dse_facts`, `dse_text`), or the path of an
            lm-eval YAML file (ends with .yaml or .yml).
        metric: The main metric; None takes the first available of acc, acc_norm, exact_match, f1, word_perplexity,
            perplexity and byte_perplexity, else the task's first metric.
        weight: Weight of this task in the mean accuracy and the mean perplexity, positive.
        limit: Number of documents, drawn by seed; for a group, over all its members together. None means all.
        num_fewshot: Examples before each document; None keeps the task's own number, or 0.
    """

    task: str
    metric: str | None = None
    weight: float = 1.0
    limit: int | None = None
    num_fewshot: int | None = None

    def __post_init__(self) -> None:
        if not self.task.strip():
            raise TaskError("a task must be a name or the path of a YAML file, but got an empty string")
        if not self.task.isprintable():
            raise TaskError(f"a task name must be printable, but got {self.task!r:.80}")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise TaskError(f"`weight > 0` must hold for task '{self.task}', but got weight={self.weight}")
        if self.limit is not None and self.limit < 1:
            raise TaskError(
                f"`limit >= 1` must hold for task '{self.task}', but got limit={self.limit}; omit it for all"
            )
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise TaskError(f"`num_fewshot >= 0` must hold for task '{self.task}', but got {self.num_fewshot}")

    @property
    def is_file(self) -> bool:
        """Whether `task` is the path of a YAML file."""
        return self.task.lower().endswith((".yaml", ".yml"))


@dataclass(frozen=True)
class TaskSource:
    """A resolved task: its name and, unless it comes from lm-eval's registry, its configuration.

    Attributes:
        name: Name of the task.
        config: lm-eval task configuration with absolute paths; None for a task of lm-eval's registry.
        path: The YAML file; None for a task of the registry.
    """

    name: str
    config: dict[str, Any] | None = None
    path: Path | None = None


def builtin_tasks() -> Mapping[str, Path]:
    """Names and files of the tasks shipped with the package."""
    return {path.stem: path for path in sorted(_TASK_FOLDER.glob("*.yaml"))}


def resolve_task(spec: TaskSpec) -> TaskSource:
    """Find a task and read its file, without lm-eval or a model.

    A name that is neither a file nor built in is looked up in lm-eval's registry later, by the evaluator.

    Raises:
        TaskError: The file or its data is missing or malformed, or a `dse_...` name is unknown.
    """
    if spec.is_file:
        return _source_of_file(_join(Path(), spec.task))
    builtin = builtin_tasks()
    if spec.task in builtin:
        return _source_of_file(builtin[spec.task])
    if spec.task.startswith("dse_"):
        raise TaskError(
            f"a built-in task must be one of {', '.join(builtin) or '(none installed)'}, but got '{spec.task}'"
            f"{did_you_mean(spec.task, builtin)}"
        )
    return TaskSource(spec.task)


def read_task_file(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read an lm-eval task file safely, with its `include`s merged in and the paths of its data files made absolute.

    Paths are relative to the file that names them, so an included file keeps its own data. `including` are the files
    whose `include`s led to this one.

    Raises:
        TaskError: The file is missing, is not YAML, holds a `!function` tag, or names data that does not exist.
    """
    path = path.resolve()
    if path in including:
        raise TaskError(f"task files must not include each other in a cycle, but '{path}' includes itself")
    config = _parse(path)
    _resolve_data(config, path)
    includes = config.pop("include", None) or []
    merged: dict[str, Any] = {}
    for include in [includes] if isinstance(includes, str) else _strings(includes, "include", path):
        included = read_task_file(_join(path.parent, include), (*including, path))
        included.pop("task_list", None)
        merged.update(included)
    return merged | config


def _source_of_file(path: Path) -> TaskSource:
    config = read_task_file(path)
    if "group" in config or "task_list" in config or isinstance(config.get("task"), list):
        raise TaskError(
            f"a task file must describe one task, but '{path}' describes a group; list its tasks one by one"
        )
    if "class" in config:
        raise TaskError(f"a task file must be data, but '{path}' names a Python class, which would run code")
    for key in ("task", "dataset_path"):
        if not (isinstance(config.get(key), str) and config[key].strip()):
            raise TaskError(f"a task file must set `{key}` to a string, but '{path}' has {key}={config.get(key)!r}")
    dataset = config["dataset_path"]
    if dataset in _UNSAFE_DATASETS:
        raise TaskError(
            f"`dataset_path` must be one of {', '.join(LOCAL_DATASETS)} or a hub dataset, but '{path}' has "
            f"'{dataset}', which can run code"
        )
    keywords = config.get("dataset_kwargs") or {}
    if dataset in LOCAL_DATASETS and not (keywords.get("data_files") or keywords.get("data_dir")):
        raise TaskError(
            f"`dataset_kwargs.data_files` must name the data of a '{dataset}' dataset, but '{path}' has none"
        )
    return TaskSource(config["task"], config, path.resolve())


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TaskError(f"a task file must exist, but '{path}' does not") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or an impossible file name
        raise TaskError(
            f"a task file must be readable UTF-8 text, but '{path}' is not: {_first_line(error)}"
        ) from error
    try:
        config = yaml.load(text, Loader=_TaskLoader)
        json.dumps(config, ensure_ascii=False, default=str).encode()  # fails on cycles and lone surrogates
    except yaml.YAMLError as error:
        raise TaskError(f"a task file must be YAML, but '{path}' is not: {_yaml_reason(error)}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        # Errors that PyYAML does not wrap: impossible dates, unhashable keys, unbounded nesting.
        raise TaskError(f"a task file must be YAML, but '{path}' is not: {_first_line(error)}") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        kind = type(config).__name__
        raise TaskError(f"a task file must be a mapping with string keys, but '{path}' holds a {kind}")
    return config


class _TaskLoader(yaml.SafeLoader):
    """SafeLoader whose error for lm-eval's `!function` tag explains the refusal."""


def _refuse_function(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    raise yaml.constructor.ConstructorError(
        None, None, f"`!function {node.value}` would run code; write the task as data, or install it as an lm-eval task"
    )


_TaskLoader.add_constructor("!function", _refuse_function)


def _resolve_data(config: dict[str, Any], path: Path) -> None:
    """Make `dataset_kwargs.data_files`, `data_dir` and a local `dataset_path` absolute, in place."""
    dataset = config.get("dataset_path")
    if isinstance(dataset, str) and "/" in dataset and (path.parent / dataset).is_dir():
        config["dataset_path"] = str((path.parent / dataset).resolve())
    keywords = config.get("dataset_kwargs")
    if keywords is None:
        return
    if not isinstance(keywords, dict) or not all(isinstance(key, str) for key in keywords):
        raise TaskError(f"`dataset_kwargs` must be a mapping, but '{path}' has {keywords!r:.80}")
    resolved = dict(keywords)
    if keywords.get("data_dir") is not None:
        resolved["data_dir"] = _absolute(keywords["data_dir"], path, is_file=False)
    files = keywords.get("data_files")
    if isinstance(files, dict):
        resolved["data_files"] = {split: _absolute_all(value, path) for split, value in files.items()}
    elif files is not None:
        resolved["data_files"] = _absolute_all(files, path)
    config["dataset_kwargs"] = resolved


def _absolute_all(files: Any, path: Path) -> str | list[str]:
    if isinstance(files, str):
        return _absolute(files, path)
    return [_absolute(file, path) for file in _strings(files, "dataset_kwargs.data_files", path)]


def _absolute(file: Any, path: Path, *, is_file: bool = True) -> str:
    if not isinstance(file, str) or not file.isprintable() or not file:
        raise TaskError(f"data files must be strings, but '{path}' has {file!r:.80}")
    if "://" in file:
        return file
    whole = _join(path.parent, file)
    if _GLOB_CHARACTERS & set(file):
        return str(whole.absolute())  # a pattern; `datasets` raises if nothing matches
    try:
        found = whole.is_file() if is_file else whole.is_dir()
    except (OSError, ValueError):  # an impossible file name
        found = False
    if not found:
        raise TaskError(f"a data file must exist, but '{whole}' does not; paths in '{path.name}' are relative to it")
    return str(whole.resolve())


def _join(folder: Path, text: str) -> Path:
    try:
        return folder / Path(text).expanduser()
    except RuntimeError as error:  # `~user` without a home folder
        raise TaskError(f"a path must exist, but '{text}' does not: {_first_line(error)}") from error


def _strings(values: Any, key: str, path: Path) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) and value.isprintable() for value in values):
        raise TaskError(f"`{key}` must be a string or a list of strings, but '{path}' has {values!r:.80}")
    return list(values)


def _yaml_reason(error: yaml.YAMLError) -> str:
    """PyYAML's reason in one line, with the line number."""
    problem = getattr(error, "problem", None) or _first_line(error)
    mark = getattr(error, "problem_mark", None)
    return f"{_first_line(problem)} (line {mark.line + 1})" if mark is not None else _first_line(problem)


def _first_line(message: object) -> str:
    return next(iter(str(message).splitlines()), "") or type(message).__name__


def check_task_names(names: Iterable[str]) -> None:
    """Refuse an empty list of tasks, and duplicate names, since results are stored by name.

    Raises:
        TaskError: There is no name, or one appears twice.
    """
    counts = Counter(names)
    if not counts:
        raise TaskError("an evaluation must have at least one task, but got none")
    for name, count in counts.items():
        if count > 1:
            raise TaskError(f"task names must be unique, but '{name}' appears twice; remove or rename one of them")

"""The schema of study files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from dse.config._section import Section
from dse.config.calibration import CalibrationConfig
from dse.config.dataset_task import DatasetTaskConfig, Head
from dse.config.evaluation import AnyTaskConfig, EvaluationConfig
from dse.config.fidelity import FidelityConfig
from dse.config.healing import HealingConfig
from dse.config.measurement import MeasurementConfig
from dse.config.old_names import warn_deprecated
from dse.config.search import SearchConfig, SearchParts, search_from_word
from dse.config.search_space import ConstraintsConfig, SearchSpaceConfig
from dse.config.workers import WorkersConfig
from dse.defaults import RENAMED_OBJECTIVES
from dse.design_point import DesignPoint

__all__ = ["BudgetConfig", "ModelConfig", "ObjectiveConfig", "SamplerConfig", "StudyConfig"]


_TASK_OBJECTIVES = ("accuracy", "perplexity", "choice_probability", "target_log_likelihood")


class ModelConfig(Section):
    """The model, its dtype and its device."""

    ref: str = Field(min_length=1, description="hub id, local folder, .gguf file, or demo:<name>")
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="auto: on a GPU the checkpoint's, else float32; the study's folder names which"
    )
    device: str = Field("auto", description="auto (cuda if available), cpu, cuda or cuda:<index>")
    trust_remote_code: bool = False


class ObjectiveConfig(Section):
    """One objective of the study."""

    name: str
    optional: bool = Field(False, description="drop it with a notice if it cannot be measured (energy without a meter)")

    @field_validator("name")
    @classmethod
    def _accept_old_name(cls, name: str) -> str:
        if name not in RENAMED_OBJECTIVES:
            return name
        new = RENAMED_OBJECTIVES[name]
        warn_deprecated(f"objective `{name}` is now `{new}`; the old name will be removed in the next release")
        return new


class SamplerConfig(Section):
    """The Optuna sampler."""

    name: Literal["tpe", "nsga2", "nsga3", "gp", "qmc", "random"] = "tpe"
    seed: int = Field(0, ge=0)


class BudgetConfig(Section):
    """The length of the search."""

    trials: int = Field(40, ge=1, description="evaluated points, including the dense model")


class StudyConfig(Section):
    """One study: model, search space, objectives, tasks, measurement and budget."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")
    model: ModelConfig
    space: SearchSpaceConfig
    objectives: list[ObjectiveConfig] = Field(min_length=1)
    tasks: list[AnyTaskConfig] = Field([])
    evaluation: EvaluationConfig = EvaluationConfig()
    measurement: MeasurementConfig = MeasurementConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    fidelity: FidelityConfig | None = Field(None, description="none, auto, or the rungs of multi-fidelity evaluation")
    constraints: ConstraintsConfig = Field(
        ConstraintsConfig(), description="constraints on every point, in addition to those of the space"
    )
    search: SearchConfig = Field(SearchConfig(), description="auto, off, or parts such as {refinement: false}")
    sampler: SamplerConfig = SamplerConfig()
    budget: BudgetConfig = BudgetConfig()
    residency: Literal["auto", "dense_and_candidate", "candidate", "sharded"] = Field(
        "auto",
        description="weights on the device: both sides of a trial, the side in use, or layers over all visible GPUs",
    )
    healing: HealingConfig | None = Field(
        None, description="true, or a section: train the front's factors at the end; none leaves every point as it is"
    )
    workers: WorkersConfig | None = Field(
        None, description="a number of workers, or a section; none evaluates in the process of `dse run`"
    )
    storage: str | None = Field(
        None,
        description="database for a team: postgresql+psycopg://USER@HOST:5432/DATABASE, its password in PGPASSWORD or"
        " ~/.pgpass; none stores the study in its folder",
    )
    enqueue: list[dict[str, Any]] = Field(
        [],
        description="points to evaluate first, in the space or outside it: compact or expanded form, or a JSON file",
    )

    @field_validator("model", mode="before")
    @classmethod
    def _model_from_string(cls, value: Any) -> Any:
        return {"ref": value} if isinstance(value, str) else value

    @field_validator("fidelity", mode="before")
    @classmethod
    def _fidelity_from_string(cls, value: Any) -> Any:
        if value == "none":
            return None
        if isinstance(value, str):
            if value != "auto":
                raise ValueError("must be none, auto, or rungs such as {proxy_tokens: 2048, shares: [0.1, 0.3]}")
            return {}
        return value

    @field_validator("storage")
    @classmethod
    def _storage_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        scheme, separator, rest = url.partition("://")
        if not separator or scheme != "postgresql+psycopg":
            raise ValueError("must look like postgresql+psycopg://USER@HOST:5432/DATABASE")
        if ":" in rest.rpartition("@")[0] or "password=" in rest.lower():
            raise ValueError("must not hold a password, since study files are shared; set PGPASSWORD or use ~/.pgpass")
        return url

    @field_validator("healing", mode="before")
    @classmethod
    def _healing_from_word(cls, value: Any) -> Any:
        return ({} if value else None) if isinstance(value, bool) else value

    @field_validator("workers", mode="before")
    @classmethod
    def _workers_from_number(cls, value: Any) -> Any:
        return {"count": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("search", mode="before")
    @classmethod
    def _search_from_word(cls, value: Any) -> Any:
        return search_from_word(value)

    @field_validator("objectives", mode="before")
    @classmethod
    def _objectives_from_strings(cls, value: Any) -> Any:
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks_from_strings(cls, value: Any) -> Any:
        return [{"task": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @field_validator("enqueue", mode="before")
    @classmethod
    def _points_from_python(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return [entry.to_json() if isinstance(entry, DesignPoint) else entry for entry in value]

    @field_validator("enqueue")
    @classmethod
    def _points_are_json(cls, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            is_json = json.loads(json.dumps(points, allow_nan=False)) == points
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"a design point must consist of JSON values, but: {error}") from error
        if not is_json:
            raise ValueError("a design point must consist of JSON values with strings as keys")
        return points

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.residency == "candidate" and self.measurement.mode == "cuda_graph":
            raise ValueError(
                "`residency: candidate` moves weights between measurements, but a CUDA graph needs them in one place;"
                " set `measurement.mode: eager`, or `residency: dense_and_candidate`"
            )
        names = [objective.name for objective in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError(f"an objective may be named once, but got {names}")
        tasks = [task.task_name if isinstance(task, DatasetTaskConfig) else task.task for task in self.tasks]
        if len(set(tasks)) != len(tasks):
            raise ValueError(f"a task may be named once, but got {tasks}")
        heads = {task.head if isinstance(task, DatasetTaskConfig) else "language model" for task in self.tasks}
        if len(heads) > 1:
            raise ValueError(
                f"all tasks must use the same model head, but they use {', '.join(sorted(heads))}; keep one"
            )
        without_task = [name for name in names if name in _TASK_OBJECTIVES]
        if not self.tasks and without_task:
            raise ValueError(f"`tasks` must name at least one task for the objective {' or '.join(without_task)}")
        if self.fidelity is not None and not set(names) & set(_TASK_OBJECTIVES):
            raise ValueError(
                f"`fidelity` needs one of {', '.join(_TASK_OBJECTIVES)} as an objective; add one or remove it"
            )
        unmeasured = [name for name in self.constrained_space.limits.measured if name not in names]
        if unmeasured:
            raise ValueError(
                f"a limit on {unmeasured[0]} needs {unmeasured[0]} as an objective; add it or remove the limit"
            )
        return self

    @property
    def constrained_space(self) -> SearchSpaceConfig:
        """The search space with the study's constraints applied."""
        return self.space.constrained(self.constraints)

    @property
    def search_parts(self) -> SearchParts:
        """The parts of the search that run in addition to the sampler."""
        return self.search.parts(self.sampler.name)

    @property
    def head(self) -> Head | None:
        """The model head of the dataset tasks; None if there are none."""
        return next((task.head for task in self.tasks if isinstance(task, DatasetTaskConfig)), None)

    def with_workers(self, workers: WorkersConfig | Mapping[str, Any] | int | None) -> StudyConfig:
        """The study with other workers: a number of them, or keys that override its own."""
        if workers is None:
            return self
        if isinstance(workers, int):
            workers = {"count": workers}
        if not isinstance(workers, WorkersConfig):
            own = {} if self.workers is None else self.workers.model_dump()
            workers = WorkersConfig(**{**own, **workers})
        return self.model_copy(update={"workers": workers})

    def to_yaml(self) -> str:
        """The resolved study as YAML, including every default."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

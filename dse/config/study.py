"""The schema of study files."""

from __future__ import annotations

import json
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from dse.config._section import Section
from dse.config.calibration import CalibrationConfig
from dse.config.dataset_task import DatasetTaskConfig, Head
from dse.config.evaluation import AnyTaskConfig, EvaluationConfig
from dse.config.fidelity import FidelityConfig
from dse.config.measurement import MeasurementConfig
from dse.config.search import SearchConfig, SearchParts, search_of_word
from dse.config.search_space import ConstraintsConfig, SearchSpaceConfig
from dse.design_point import DesignPoint

__all__ = ["BudgetConfig", "ModelConfig", "ObjectiveConfig", "SamplerConfig", "StudyConfig"]


_OF_TASKS = ("accuracy", "perplexity", "choice_probability", "target_log_likelihood")


class ModelConfig(Section):
    """Which model, and how it is held."""

    ref: str = Field(min_length=1, description="hub id, local folder, .gguf file, or demo:<name>")
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = Field("auto", description="auto (cuda where there is one), cpu, cuda or cuda:<index>")
    trust_remote_code: bool = False


class ObjectiveConfig(Section):
    """One objective of the study."""

    name: str
    optional: bool = Field(
        False, description="drop it with a notice where it cannot be measured (energy without a meter)"
    )


class SamplerConfig(Section):
    """Which Optuna sampler proposes points."""

    name: Literal["tpe", "nsga2", "nsga3", "gp", "qmc", "random"] = "tpe"
    seed: int = Field(0, ge=0)


class BudgetConfig(Section):
    """How long to search."""

    trials: int = Field(40, ge=1, description="evaluated points, the dense model included")


class StudyConfig(Section):
    """One study: model + space + objectives + tasks + measurement + budget."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")
    model: ModelConfig
    space: SearchSpaceConfig
    objectives: list[ObjectiveConfig] = Field(min_length=1)
    tasks: list[AnyTaskConfig] = Field([])
    evaluation: EvaluationConfig = EvaluationConfig()
    measurement: MeasurementConfig = MeasurementConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    fidelity: FidelityConfig | None = Field(None, description="none, auto, or the rungs of the fidelity ladder")
    constraints: ConstraintsConfig = Field(
        ConstraintsConfig(), description="what every point must keep, beside what the space says"
    )
    search: SearchConfig = Field(SearchConfig(), description="auto, off, or parts such as {refinement: false}")
    sampler: SamplerConfig = SamplerConfig()
    budget: BudgetConfig = BudgetConfig()
    enqueue: list[dict[str, Any]] = Field(
        [],
        description="own points to evaluate first, inside the space or beside it: compact, expanded, or a JSON file",
    )

    @field_validator("model", mode="before")
    @classmethod
    def _model_of_string(cls, value: Any) -> Any:
        return {"ref": value} if isinstance(value, str) else value

    @field_validator("fidelity", mode="before")
    @classmethod
    def _fidelity_of_string(cls, value: Any) -> Any:
        if value == "none":
            return None
        if isinstance(value, str):
            if value != "auto":
                raise ValueError("must be none, auto, or rungs such as {proxy_tokens: 2048, shares: [0.1, 0.3]}")
            return {}
        return value

    @field_validator("search", mode="before")
    @classmethod
    def _search_of_word(cls, value: Any) -> Any:
        return search_of_word(value)

    @field_validator("objectives", mode="before")
    @classmethod
    def _objectives_of_strings(cls, value: Any) -> Any:
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks_of_strings(cls, value: Any) -> Any:
        return [{"task": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @field_validator("enqueue", mode="before")
    @classmethod
    def _points_of_python(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return [entry.to_json() if isinstance(entry, DesignPoint) else entry for entry in value]

    @field_validator("enqueue")
    @classmethod
    def _points_are_json(cls, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            is_json = json.loads(json.dumps(points, allow_nan=False)) == points
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"a design point must be made of JSON values, but: {error}") from error
        if not is_json:
            raise ValueError("a design point must be made of JSON values with texts as keys")
        return points

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [objective.name for objective in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError(f"an objective may be named once, but got {names}")
        tasks = [task.task_name if isinstance(task, DatasetTaskConfig) else task.task for task in self.tasks]
        if len(set(tasks)) != len(tasks):
            raise ValueError(f"a task may be named once, but got {tasks}")
        heads = {task.head if isinstance(task, DatasetTaskConfig) else "a language model's" for task in self.tasks}
        if len(heads) > 1:
            raise ValueError(f"a model has one head, but the tasks ask for {', '.join(sorted(heads))}; keep to one")
        unserved = [name for name in names if name in _OF_TASKS]
        if not self.tasks and unserved:
            raise ValueError(f"`tasks` must name at least one task for the objective {' or '.join(unserved)}")
        if self.fidelity is not None and not set(names) & set(_OF_TASKS):
            raise ValueError(f"`fidelity` spares documents, so one of {', '.join(_OF_TASKS)} must be an objective")
        unmeasured = [name for name in self.constrained_space.limits.measured if name not in names]
        if unmeasured:
            raise ValueError(f"a limit on {unmeasured[0]} needs the objective of that name, which alone measures it")
        return self

    @property
    def constrained_space(self) -> SearchSpaceConfig:
        """The space under the study's own constraints."""
        return self.space.constrained(self.constraints)

    @property
    def search_parts(self) -> SearchParts:
        """What runs beside the sampler."""
        return self.search.parts(self.sampler.name)

    @property
    def head(self) -> Head | None:
        """The head that the tasks on data sets ask for; None where there is none, or lm-eval's tasks."""
        return next((task.head for task in self.tasks if isinstance(task, DatasetTaskConfig)), None)

    def to_yaml(self) -> str:
        """The resolved study as YAML, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

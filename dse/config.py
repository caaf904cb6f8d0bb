"""The YAML schema of study files and search spaces: unknown keys are refused, with the nearest known one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dse.design_point import METHOD_NAMES
from dse.errors import ConfigError, did_you_mean
from dse.yaml_reading import read_yaml, validated

__all__ = [
    "BudgetConfig",
    "CalibrationConfig",
    "CalibrationSource",
    "EvaluationConfig",
    "GroupConfig",
    "LayerRange",
    "LimitsConfig",
    "MeasurementConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "Range",
    "RankConfig",
    "SamplerConfig",
    "SearchSpaceConfig",
    "StudyConfig",
    "TaskConfig",
    "load_search_space",
    "load_study",
    "parse_search_space",
    "parse_study",
]


class _Section(BaseModel):
    """Frozen, and strict about keys: a misspelt option must not be an ignored one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """Which model, and how it is held."""

    ref: str = Field(min_length=1, description="hub id, local folder, .gguf file, or demo:<name>")
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = Field("auto", description="auto (cuda where there is one), cpu, cuda or cuda:<index>")
    trust_remote_code: bool = False


class Range(_Section):
    """A closed interval; either end may be left open."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"`min <= max` must hold, but got min={self.min} and max={self.max}")
        return self


class LimitsConfig(_Section):
    """Limits that follow from a point alone; a point outside costs no evaluation."""

    reduction: Range = Range()


class LayerRange(_Section):
    """All layers but the first and last few."""

    skip_first: int = Field(0, ge=0)
    skip_last: int = Field(0, ge=0)


class GroupConfig(_Section):
    """Which tensors share one choice: neighbouring layers, and roles."""

    layers: int = Field(1, ge=1, description="neighbouring layers that share a choice")
    roles: Literal["together", "separate"] | dict[str, list[str]] = Field(
        "together", description="together, separate, or named groups such as {attention: [query, key], mlp: [up]}"
    )

    @field_validator("roles", mode="before")
    @classmethod
    def _roles_have_a_form(cls, value: Any) -> Any:
        if not (value in ("together", "separate") or isinstance(value, Mapping)):
            raise ValueError("must be together, separate, or named groups such as {attention: [query, key], mlp: [up]}")
        return value


class RankConfig(_Section):
    """The rank levels of a group, beside leaving it dense."""

    absolute: list[Annotated[int, Field(ge=1)]] | None = None
    kept_fractions: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, description="share of a tensor's parameters that its factors keep"
    )
    multiple: int = Field(1, ge=1, description="ranks are rounded down to a multiple of this")

    @model_validator(mode="after")
    def _one_grid(self) -> Self:
        if (self.absolute is None) == (self.kept_fractions is None):
            raise ValueError("give exactly one of `absolute` and `kept_fractions`")
        if not (self.absolute or self.kept_fractions):
            raise ValueError("a rank grid needs at least one level")
        levels: list[Any] = [*(self.absolute or ()), *(self.kept_fractions or ())]
        if len(set(levels)) != len(levels):
            raise ValueError(f"a rank level may be listed once, but got {levels}")
        return self


class SearchSpaceConfig(_Section):
    """What may be decomposed, and how far."""

    name: str = Field(min_length=1)
    kind: Literal["levels", "subset"] = Field(
        "levels",
        description="levels: each group picks dense or a rank; subset: layers x roles x one rank (the paper's)",
    )
    methods: list[str] = Field(["whitened_svd"], min_length=1)
    layers: Literal["all"] | list[int] | LayerRange = "all"
    roles: Literal["all"] | list[str] = "all"
    groups: GroupConfig = GroupConfig()
    ranks: RankConfig
    limits: LimitsConfig = LimitsConfig()
    role_names: dict[str, str] = Field({}, description="module path suffix: role, for architectures dse does not know")

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: list[str]) -> list[str]:
        for method in methods:
            if method not in METHOD_NAMES:
                raise ValueError(
                    f"a method must be one of {', '.join(METHOD_NAMES)}, but got '{method}'"
                    f"{did_you_mean(method, METHOD_NAMES)}"
                )
        if len(set(methods)) != len(methods):
            raise ValueError(f"a method may be named once, but got {methods}")
        return methods

    @model_validator(mode="after")
    def _groups_are_used(self) -> Self:
        if self.kind == "subset" and self.groups != GroupConfig():
            raise ValueError("`groups` is for `kind: levels`; a subset chooses layers and roles each on their own")
        return self

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_have_a_form(cls, value: Any) -> Any:
        if not (value == "all" or isinstance(value, (list, Mapping, LayerRange))):
            raise ValueError("must be all, a list of layer indices, or {skip_first: 1, skip_last: 1}")
        if isinstance(value, list) and any(isinstance(layer, bool) for layer in value):
            raise ValueError(f"layers must be integers, but got {value}")
        return value

    @field_validator("roles", mode="before")
    @classmethod
    def _roles_have_a_form(cls, value: Any) -> Any:
        if not (value == "all" or isinstance(value, list)):
            raise ValueError("must be all, or a list of roles such as [query, up]")
        return value


class CalibrationSource(_Section):
    """One text of the calibration mix."""

    builtin: str | None = Field(None, description="a text shipped with dse, or python_docs")
    file: str | None = Field(None, description="a local UTF-8 text file")
    dataset: str | None = Field(None, description="a hub dataset")
    config: str | None = None
    split: str = "train"
    column: str = "text"
    weight: float = Field(1.0, gt=0, description="share of the tokens, relative to the other sources")

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        named = [key for key in ("builtin", "file", "dataset") if getattr(self, key) is not None]
        if len(named) != 1:
            raise ValueError("give exactly one of `builtin`, `file` and `dataset`")
        return self


class CalibrationConfig(_Section):
    """The text under whose activations calibrated methods minimise their error."""

    sources: list[CalibrationSource] = Field(
        [CalibrationSource(builtin="general", weight=1.0)],
        min_length=1,
    )
    tokens: int = Field(16384, ge=64)
    window: int = Field(512, ge=8, description="tokens per sequence")
    seed: int = Field(0, ge=0)


class ObjectiveConfig(_Section):
    """One objective of the study."""

    name: str
    optional: bool = Field(
        False, description="drop it with a notice where it cannot be measured (energy without a meter)"
    )


class TaskConfig(_Section):
    """One evaluation task: an lm-eval name, a builtin one, or a YAML file relative to the study file."""

    task: str = Field(min_length=1)
    metric: str | None = None
    weight: float = Field(1.0, gt=0)
    limit: int | None = Field(None, ge=1)
    num_fewshot: int | None = Field(None, ge=0)


class EvaluationConfig(_Section):
    """How tasks are run; the same for every trial."""

    limit: int | None = Field(None, ge=1, description="documents per task, drawn by seed; null means all")
    seed: int = Field(0, ge=0)
    batch_size: int = Field(16, ge=1)
    max_length: int | None = Field(None, ge=16)
    apply_chat_template: bool = False


class MeasurementConfig(_Section):
    """How latency and energy are measured."""

    prompt_tokens: int = Field(128, ge=1)
    new_tokens: int = Field(8, ge=1)
    batch_size: int = Field(1, ge=1)
    blocks: int = Field(2, ge=2, description="ABBA blocks: point, dense, dense, point")
    warmup_blocks: int = Field(1, ge=0)


class SamplerConfig(_Section):
    """Which Optuna sampler proposes points."""

    name: Literal["tpe", "nsga2", "nsga3", "gp", "qmc", "random"] = "tpe"
    seed: int = Field(0, ge=0)


class BudgetConfig(_Section):
    """How long to search."""

    trials: int = Field(40, ge=1, description="evaluated points, the dense model included")


class StudyConfig(_Section):
    """One study: model + space + objectives + tasks + measurement + budget."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")
    model: ModelConfig
    space: SearchSpaceConfig
    objectives: list[ObjectiveConfig] = Field(min_length=1)
    tasks: list[TaskConfig] = []
    evaluation: EvaluationConfig = EvaluationConfig()
    measurement: MeasurementConfig = MeasurementConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    sampler: SamplerConfig = SamplerConfig()
    budget: BudgetConfig = BudgetConfig()
    enqueue: list[dict[str, Any]] = Field([], description="design points to evaluate first, compact or expanded")

    @field_validator("model", mode="before")
    @classmethod
    def _model_of_string(cls, value: Any) -> Any:
        return {"ref": value} if isinstance(value, str) else value

    @field_validator("objectives", mode="before")
    @classmethod
    def _objectives_of_strings(cls, value: Any) -> Any:
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks_of_strings(cls, value: Any) -> Any:
        return [{"task": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

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
        tasks = [task.task for task in self.tasks]
        if len(set(tasks)) != len(tasks):
            raise ValueError(f"a task may be named once, but got {tasks}")
        if not self.tasks and {"accuracy", "perplexity"} & set(names):
            raise ValueError("`tasks` must name at least one task for the objective accuracy or perplexity")
        return self

    def to_yaml(self) -> str:
        """The resolved study as YAML, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def load_search_space(path: Path) -> SearchSpaceConfig:
    """Read a search-space file.

    Raises:
        ConfigError: The file is missing, malformed, or breaks the schema.
    """
    return parse_search_space(read_yaml(path), str(path))


def parse_search_space(data: Any, origin: str = "search space") -> SearchSpaceConfig:
    """Validate a parsed search space; `origin` names it in errors.

    Raises:
        ConfigError: The data break the schema.
    """
    return validated(SearchSpaceConfig, data, origin)


def load_study(path: Path) -> StudyConfig:
    """Read a study file; `space`, task files and calibration files are resolved against the file's own folder.

    Raises:
        ConfigError: The file or one it names is missing, malformed, or breaks the schema.
    """
    return parse_study(read_yaml(path), base=path.parent, origin=str(path))


def parse_study(data: Any, *, base: Path | None = None, origin: str = "study") -> StudyConfig:
    """Validate a parsed study; relative paths are resolved against `base`.

    Raises:
        ConfigError: The data break the schema.
    """
    folder = (base or Path()).absolute()
    if isinstance(data, dict):
        data = dict(data)
        if isinstance(data.get("space"), str):
            data["space"] = load_search_space(Path(_absolute(folder, data["space"]))).model_dump()
    study = validated(StudyConfig, data, origin)
    return _with_absolute_paths(study, folder)


def _with_absolute_paths(study: StudyConfig, folder: Path) -> StudyConfig:
    """Paths made absolute, so that the resolved study means the same wherever it is read again."""
    tasks = [
        t.model_copy(update={"task": _absolute(folder, t.task)}) if t.task.endswith((".yaml", ".yml")) else t
        for t in study.tasks
    ]
    sources = [
        s.model_copy(update={"file": _absolute(folder, s.file)}) if s.file is not None else s
        for s in study.calibration.sources
    ]
    return study.model_copy(
        update={
            "tasks": tasks,
            "calibration": study.calibration.model_copy(update={"sources": sources}),
            "model": study.model.model_copy(update={"ref": _model_ref(folder, study.model.ref)}),
        }
    )


def _model_ref(folder: Path, ref: str) -> str:
    """An absolute path where `ref` is a local model; a hub id and `demo:` stay as they are."""
    if ref.startswith("demo:"):
        return ref
    if ref.startswith((".", "~", "/")) or ref.endswith(".gguf"):
        return _absolute(folder, ref)
    # `models/mine` may be a folder or a hub id: it is a folder where there is one, as for `from_pretrained`.
    return next((str(place.resolve()) for place in (folder / ref, Path(ref)) if _is_folder(place)), ref)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file system takes
        return False


def _absolute(folder: Path, text: str) -> str:
    try:
        return str((folder / Path(text).expanduser()).resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a null byte; `~somebody` who has no home
        raise ConfigError(f"a path must be one this machine knows, but got {text!r:.80}: {error}") from error

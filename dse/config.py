"""The YAML schema of study files and search spaces: unknown keys are refused, with the nearest known one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dse.design_point import METHOD_NAMES
from dse.errors import ConfigError, did_you_mean

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
    "read_yaml",
]

_SectionT = TypeVar("_SectionT", bound=BaseModel)


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


class RankConfig(_Section):
    """The rank levels of a group, beside leaving it dense."""

    absolute: list[Annotated[int, Field(ge=1)]] | None = None
    kept_fractions: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, description="share of a tensor's parameters that its factors keep"
    )
    multiple: int = Field(1, ge=1, description="ranks from kept_fractions are rounded down to a multiple of this")

    @model_validator(mode="after")
    def _one_grid(self) -> Self:
        if (self.absolute is None) == (self.kept_fractions is None):
            raise ValueError("give exactly one of `absolute` and `kept_fractions`")
        if not (self.absolute or self.kept_fractions):
            raise ValueError("a rank grid needs at least one level")
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

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_of_mapping(cls, value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(layer, bool) for layer in value):
            raise ValueError(f"layers must be integers, but got {value}")
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


def read_yaml(path: Path) -> Any:
    """Safe-load one YAML file.

    Raises:
        ConfigError: The file cannot be read or is not valid YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} must be UTF-8 text, but {error.reason} at byte {error.start}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path} must be a readable YAML file, but: {reason}") from error
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{origin} must be valid YAML, but: {detail}") from error


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
    return _validate(SearchSpaceConfig, data, origin)


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
            data["space"] = load_search_space(folder / data["space"]).model_dump()
    study = _validate(StudyConfig, data, origin)
    return _with_absolute_paths(study, folder)


def _with_absolute_paths(study: StudyConfig, folder: Path) -> StudyConfig:
    def absolute(text: str) -> str:
        return str((folder / Path(text).expanduser()).resolve())

    tasks = [
        t.model_copy(update={"task": absolute(t.task)}) if t.task.endswith((".yaml", ".yml")) else t
        for t in study.tasks
    ]
    sources = [
        s.model_copy(update={"file": absolute(s.file)}) if s.file is not None else s for s in study.calibration.sources
    ]
    ref = study.model.ref
    if not ref.startswith("demo:") and ref.startswith((".", "~", "/")):
        ref = absolute(ref)
    return study.model_copy(
        update={
            "tasks": tasks,
            "calibration": study.calibration.model_copy(update={"sources": sources}),
            "model": study.model.model_copy(update={"ref": ref}),
        }
    )


def _validate(schema: type[_SectionT], data: Any, origin: str) -> _SectionT:
    if not isinstance(data, dict):
        raise ConfigError(f"{origin} must be a mapping of keys to values, but got {type(data).__name__}")
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(_explain(schema, entry) for entry in error.errors()[:5])) from error
    except RecursionError as error:
        raise ConfigError(f"{origin} is nested too deeply") from error


def _explain(schema: type[BaseModel], entry: Any) -> str:
    """One line for one pydantic error: where, what is wrong, what is known there."""
    location = [str(part) for part in entry["loc"]]
    where = ".".join(location) or "file"
    if entry["type"] == "extra_forbidden":
        known = _keys_at(schema, location[:-1])
        hint = did_you_mean(location[-1], known) or (f"; known keys: {', '.join(known)}" if known else "")
        return f"unknown key '{where}'{hint}"
    message = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "missing":
        return f"`{where}` is missing; write it"
    value = " ".join(repr(entry.get("input")).split())
    shown = "" if entry["type"] == "value_error" else f", but got {value if len(value) <= 60 else value[:57] + '...'}"
    return f"`{where}`: {message}{shown}"


def _keys_at(schema: type[BaseModel], location: list[str]) -> list[str]:
    """Known keys of the section that `location` leads to."""
    section: type[BaseModel] | None = schema
    for part in location:
        if section is None or part.isdigit():
            continue
        field = section.model_fields.get(part)
        if field is None:
            continue  # a member name of a union, not a key
        section = _section_in(field.annotation)
    return list(section.model_fields) if section is not None else []


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_in(argument)
        if found is not None:
            return found
    return None

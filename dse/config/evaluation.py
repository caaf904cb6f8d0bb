"""Study YAML: the sections `tasks` and `evaluation`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from dse.config._section import Section
from dse.config.dataset_task import DatasetTaskConfig

__all__ = ["AnyTaskConfig", "EvaluationConfig", "TaskConfig"]


class TaskConfig(Section):
    """One evaluation task: an lm-eval task name, a built-in name, or a YAML file relative to the study file."""

    task: str = Field(min_length=1)
    metric: str | None = None
    weight: float = Field(1.0, gt=0)
    limit: int | None = Field(None, ge=1)
    num_fewshot: int | None = Field(None, ge=0)


def _kind(value: Any) -> str:
    has_dataset = "dataset" in value if isinstance(value, Mapping) else isinstance(value, DatasetTaskConfig)
    return "DatasetTaskConfig" if has_dataset else "TaskConfig"


AnyTaskConfig = Annotated[
    Annotated[TaskConfig, Tag("TaskConfig")] | Annotated[DatasetTaskConfig, Tag("DatasetTaskConfig")],
    Discriminator(_kind),
]
"""A dataset task if it has a `dataset`, else an lm-eval task."""


class EvaluationConfig(Section):
    """How tasks are evaluated; the same for every trial."""

    limit: int | None = Field(None, ge=1, description="documents per task, drawn by seed; null means all")
    seed: int = Field(0, ge=0)
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="a batch has at most this many times 128 tokens; auto is 64 on a GPU and 16 elsewhere; halved"
        " whenever the device runs out of memory",
    )
    max_length: int | None = Field(None, ge=16)
    apply_chat_template: bool = False
    masked_scoring: Literal["within_word", "original"] = Field(
        "within_word", description="pseudo-log-likelihood of masked language models: which tokens are masked together"
    )
    divergence_tokens: int = Field(4096, ge=16, description="held-out tokens for the objective kl_divergence")
    compare_float32: bool | None = Field(
        None,
        description="with a half-precision model, also evaluate the dense model in float32 and report the difference;"
        " null does so up to two billion parameters",
    )

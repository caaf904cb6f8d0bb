"""Which tasks, and how they are run."""

from __future__ import annotations

from pydantic import Field

from dse.config._section import Section

__all__ = ["EvaluationConfig", "TaskConfig"]


class TaskConfig(Section):
    """One evaluation task: an lm-eval name, a builtin one, or a YAML file relative to the study file."""

    task: str = Field(min_length=1)
    metric: str | None = None
    weight: float = Field(1.0, gt=0)
    limit: int | None = Field(None, ge=1)
    num_fewshot: int | None = Field(None, ge=0)


class EvaluationConfig(Section):
    """How tasks are run; the same for every trial."""

    limit: int | None = Field(None, ge=1, description="documents per task, drawn by seed; null means all")
    seed: int = Field(0, ge=0)
    batch_size: int = Field(16, ge=1)
    max_length: int | None = Field(None, ge=16)
    apply_chat_template: bool = False

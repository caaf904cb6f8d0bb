"""Study YAML: a task on the rows of a dataset, for a classification, question-answering or embedding head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dse.config._section import Section
from dse.errors import did_you_mean

__all__ = ["HEAD_COLUMNS", "HEAD_METRICS", "LOCAL_SUFFIXES", "DatasetTaskConfig", "Head"]

Head = Literal["classification", "question_answering", "embedding"]

HEAD_COLUMNS: Mapping[Head, Mapping[str, bool]] = {
    "classification": {"text": True, "text_pair": False, "label": True},
    "question_answering": {"question": True, "context": True, "answers": True},
    "embedding": {"sentence1": True, "sentence2": True, "score": False},
}
"""Head to the columns that it reads, and whether they are required."""

HEAD_METRICS: Mapping[Head, tuple[str, ...]] = {
    "classification": ("accuracy",),
    "question_answering": ("f1", "exact_match"),
    "embedding": ("fidelity_spearman", "fidelity_cosine", "spearman"),
}
"""Head to its metrics, the default first."""

LOCAL_SUFFIXES: Mapping[str, str] = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""Suffix of a local file to the reader of `datasets` for it."""

_ONLY_FOR: Mapping[str, Head] = {"labels": "classification", "stride": "question_answering", "pooling": "embedding"}


class DatasetTaskConfig(Section):
    """One evaluation task on the rows of a dataset: a local file, a hub dataset, or a dataset of the package."""

    dataset: str = Field(min_length=1, description="local .jsonl, .json, .csv, .tsv or .parquet, hub id, or dse_<name>")
    config: str | None = Field(None, description="configuration of a hub dataset, such as sst2 of nyu-mll/glue")
    split: str | None = Field(None, description="split of a hub dataset, such as validation")
    revision: str | None = Field(None, description="branch, tag or commit of a hub dataset")
    head: Head
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", description="name of the task in tables and records"
    )
    columns: dict[str, str] = Field({}, description="name that the head reads: column of the dataset, if they differ")
    metric: str | None = None
    weight: float = Field(1.0, gt=0)
    limit: int | None = Field(None, ge=1)
    max_length: int | None = Field(None, ge=16, description="tokens per row, including special tokens")
    labels: dict[str, str] = Field({}, description="label of the dataset: label of the model, if they differ")
    stride: int | None = Field(None, ge=0, description="tokens shared by two windows of a long context")
    pooling: Literal["mean", "cls", "max", "last_token"] | None = None

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_as_text(cls, value: Any) -> Any:
        """Accept integers as labels: `{0: negative}`."""
        if not isinstance(value, Mapping):
            return value
        return {_text(key): _text(entry) for key, entry in value.items()}

    @model_validator(mode="after")
    def _check_head(self) -> Self:
        known = HEAD_COLUMNS[self.head]
        for column in self.columns:
            if column not in known:
                raise ValueError(
                    f"the columns of {self.head} tasks are {', '.join(known)}, but `columns` names '{column}'"
                    f"{did_you_mean(column, known)}"
                )
        metrics = HEAD_METRICS[self.head]
        if self.metric is not None and self.metric not in metrics:
            raise ValueError(
                f"the metric of {self.head} tasks must be one of {', '.join(metrics)}, but got '{self.metric}'"
                f"{did_you_mean(self.metric, metrics)}"
            )
        for key, head in _ONLY_FOR.items():
            if getattr(self, key) and self.head != head:
                raise ValueError(f"`{key}` is for {head} tasks, but this one has `head: {self.head}`; remove it")
        return self

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.is_hub:
            if self.split is None:
                raise ValueError(f"the hub dataset '{self.dataset}' needs a `split`, such as validation; add it")
            return self
        for key in ("config", "split", "revision"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"`{key}` is for hub datasets, but '{self.dataset}' is a file or in the package; remove it"
                )
        return self

    @property
    def is_file(self) -> bool:
        """Whether `dataset` is a local file."""
        return PurePath(self.dataset).suffix.lower() in LOCAL_SUFFIXES

    @property
    def is_hub(self) -> bool:
        """Whether `dataset` is a hub dataset; names with the prefix `dse_` are datasets of the package."""
        return not self.is_file and not self.dataset.startswith("dse_")

    @property
    def task_name(self) -> str:
        """Name of the task in tables and records."""
        if self.name is not None:
            return self.name
        parts = [PurePath(self.dataset).stem] if self.is_file else [self.dataset.rpartition("/")[2]]
        return "_".join([*parts, *([self.config] if self.config else [])])

    @property
    def chosen_metric(self) -> str:
        """The main metric."""
        return self.metric or HEAD_METRICS[self.head][0]

    def column(self, role: str) -> str:
        """The dataset's column for a name that the head reads."""
        return self.columns.get(role, role)


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

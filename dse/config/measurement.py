"""The `measurement` section of a study file."""

from __future__ import annotations

import itertools
import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dse.config._section import Section

__all__ = ["MeasurementConfig"]

_Axis = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]


class MeasurementConfig(Section):
    """How latency, energy and memory are measured.

    `prompt_tokens`, `new_tokens` and `batch_size` take a number or a list. Lists span a grid; its first cell provides
    the objectives.
    """

    engine: Literal["transformers", "vllm", "onnxruntime", "openvino"] = Field(
        "transformers", description="engine that runs the model when it is measured"
    )
    python: str | None = Field(
        None,
        description="Python interpreter of the engine; by default that of the environment variable"
        " `DSE_<ENGINE>_PYTHON`, else the study's own",
    )
    options: dict[str, Any] = Field({}, description="options of the engine, such as `{max_model_len: 512}` of vLLM")
    when: Literal["every_trial", "front"] = Field(
        "every_trial",
        description="measure every trial in the engine, or search with transformers and measure the front at the end",
    )
    requests: int | None = Field(
        None, ge=1, description="requests that an engine serves in one turn; by default one for each place in the batch"
    )
    engine_time_limit_s: float = Field(
        600.0, gt=0, description="an engine that takes longer to start or to answer is killed, and the trial fails"
    )
    prompt_tokens: _Axis = Field([128])
    new_tokens: _Axis = Field([16])
    batch_size: _Axis = Field([1], description="sequences at a time; for an engine, requests in flight (concurrency)")
    mode: Literal["auto", "eager", "compile", "cuda_graph"] = Field(
        "auto",
        description="execution mode of decode steps; auto: cuda_graph on a GPU if the model allows it, else eager",
    )
    only_if_faster: bool = Field(
        False, description="keep a tensor dense unless the device profile finds its decomposition faster"
    )
    predict_latency: bool = Field(
        False, description="measure only the dense model and predict all other latencies from the device profile"
    )
    blocks: int = Field(4, ge=2, description="minimum number of ABBA blocks: candidate, baseline, baseline, candidate")
    warmup_blocks: int = Field(1, ge=0, description="blocks that run first and never count")
    max_warmup_blocks: int = Field(6, ge=0, description="maximum number of blocks discarded until two agree")
    warmup_tolerance: float = Field(0.1, gt=0, lt=1, description="maximum relative difference of two blocks that agree")
    min_duration_s: float = Field(0.0, ge=0, description="minimum timed work per cell")
    max_duration_s: float = Field(20.0, gt=0, description="timed work after which no further block starts")
    precision: float | None = Field(
        0.02,
        gt=0,
        lt=1,
        description="blocks are added until half the interval of each ratio is this small",
    )
    meter: str | None = Field(
        None,
        description="auto, rapl, nvml[:index or UUID,...] or replay:<trace.csv>; if set, energy is always measured",
    )
    energy_windows: int = Field(
        3, ge=1, description="energy windows of candidate and baseline per phase; an odd number is made even"
    )
    energy_precision: float | None = Field(None, gt=0, lt=1, description="maximum relative error of an energy window")

    @field_validator("mode", mode="before")
    @classmethod
    def _fast_was_removed(cls, value: Any) -> Any:
        if value == "fast":
            raise ValueError("mode `fast` and its CPU kernel were removed; use `mode: eager` or `mode: compile`")
        return value

    @field_validator("prompt_tokens", "new_tokens", "batch_size", mode="before")
    @classmethod
    def _list_of_number(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @field_validator("prompt_tokens", "new_tokens", "batch_size")
    @classmethod
    def _each_once(cls, values: list[int]) -> list[int]:
        if len(set(values)) != len(values):
            raise ValueError(f"a size may be listed only once, but got {values}")
        return values

    @model_validator(mode="after")
    def _durations_are_ordered(self) -> Self:
        if self.min_duration_s > self.max_duration_s:
            raise ValueError(
                f"`min_duration_s <= max_duration_s` must hold, but got {self.min_duration_s} and {self.max_duration_s}"
            )
        return self

    @model_validator(mode="after")
    def _engine_is_consistent(self) -> Self:
        if self.when == "front" and not self.is_external:
            raise ValueError(
                "`when: front` needs a serving engine to measure the front in, but `engine` is transformers, which"
                " measures every trial; name vllm, onnxruntime or openvino"
            )
        try:
            json.dumps(self.options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`options` must consist of JSON values, but: {error}") from error
        return self

    @property
    def is_external(self) -> bool:
        """Whether the engine runs in a process of its own; transformers does only with an interpreter or options."""
        return self.engine != "transformers" or self.python is not None or bool(self.options)

    @property
    def cells(self) -> list[tuple[int, int, int]]:
        """The grid as (batch size, prompt tokens, new tokens); the first cell provides the objectives."""
        return list(itertools.product(self.batch_size, self.prompt_tokens, self.new_tokens))

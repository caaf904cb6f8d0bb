"""How latency, energy and memory are measured."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dse.config._section import Section

__all__ = ["MeasurementConfig"]

_Axis = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]


class MeasurementConfig(Section):
    """How latency, energy and memory are measured.

    `prompt_tokens`, `new_tokens` and `batch_size` take a number or a list; lists span a grid, whose first cell is the
    one that the objectives are read from.
    """

    prompt_tokens: _Axis = Field([128])
    new_tokens: _Axis = Field([16])
    batch_size: _Axis = Field([1])
    mode: Literal["eager", "compile", "cuda_graph", "fast"] = Field("eager", description="how a generation is run")
    only_if_faster: bool = Field(
        False, description="leave dense what the device profile does not call faster; needs mode fast"
    )
    predict_latency: bool = Field(
        False, description="measure the dense model alone and predict the others' latency from the device profile"
    )
    blocks: int = Field(4, ge=2, description="least number of ABBA blocks: point, dense, dense, point")
    warmup_blocks: int = Field(1, ge=0, description="blocks that never count")
    max_warmup_blocks: int = Field(6, ge=0, description="blocks discarded at most until two successive ones agree")
    warmup_tolerance: float = Field(0.1, gt=0, lt=1, description="blocks agree within this fraction")
    min_duration_s: float = Field(0.0, ge=0, description="least timed work a cell")
    max_duration_s: float = Field(20.0, gt=0, description="timed work after which no block is added for precision")
    precision: float | None = Field(
        0.02, gt=0, lt=1, description="blocks are added until half the interval of each ratio is within this fraction"
    )
    meter: str | None = Field(
        None,
        description="auto, rapl, nvml[:index or UUID,...] or replay:<trace.csv>; naming one always measures energy",
    )
    energy_windows: int = Field(3, ge=1, description="windows a phase, whose spread is reported")
    energy_precision: float | None = Field(None, gt=0, lt=1, description="relative error asked of a window")

    @field_validator("prompt_tokens", "new_tokens", "batch_size", mode="before")
    @classmethod
    def _list_of_number(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @field_validator("prompt_tokens", "new_tokens", "batch_size")
    @classmethod
    def _each_once(cls, values: list[int]) -> list[int]:
        if len(set(values)) != len(values):
            raise ValueError(f"a size may be listed once, but got {values}")
        return values

    @model_validator(mode="after")
    def _durations_are_ordered(self) -> Self:
        if self.min_duration_s > self.max_duration_s:
            raise ValueError(
                f"`min_duration_s <= max_duration_s` must hold, but got {self.min_duration_s} and {self.max_duration_s}"
            )
        return self

    @model_validator(mode="after")
    def _profile_is_of_the_fast_form(self) -> Self:
        for name in ("only_if_faster", "predict_latency"):
            if getattr(self, name) and self.mode != "fast":
                raise ValueError(f"`{name}` needs `mode: fast`, whose products the profile times, but got {self.mode}")
        return self

    @property
    def cells(self) -> list[tuple[int, int, int]]:
        """The grid as (batch size, prompt tokens, new tokens); the first is the objectives' cell."""
        return list(itertools.product(self.batch_size, self.prompt_tokens, self.new_tokens))

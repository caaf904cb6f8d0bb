"""How latency and energy are measured."""

from __future__ import annotations

from pydantic import Field

from dse.config._section import Section

__all__ = ["MeasurementConfig"]


class MeasurementConfig(Section):
    """How latency and energy are measured."""

    prompt_tokens: int = Field(128, ge=1)
    new_tokens: int = Field(8, ge=1)
    batch_size: int = Field(1, ge=1)
    blocks: int = Field(2, ge=2, description="ABBA blocks: point, dense, dense, point")
    warmup_blocks: int = Field(1, ge=0)

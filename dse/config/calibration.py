"""Study YAML: the section `calibration`, the text for calibrated methods."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from dse.config._section import Section
from dse.defaults import CALIBRATION_TOKENS

__all__ = ["CalibrationConfig", "CalibrationSource"]


class CalibrationSource(Section):
    """One text of the calibration mix."""

    builtin: str | None = Field(None, description="a text of the package, or python_docs")
    file: str | None = Field(None, description="a local UTF-8 text file")
    dataset: str | None = Field(None, description="a hub dataset")
    config: str | None = None
    split: str = "train"
    column: str = "text"
    weight: float = Field(1.0, gt=0, description="weight of the source's share of the tokens")

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        named = [key for key in ("builtin", "file", "dataset") if getattr(self, key) is not None]
        if len(named) != 1:
            raise ValueError("give exactly one of `builtin`, `file` and `dataset`")
        return self


class CalibrationConfig(Section):
    """The text whose activations calibrated methods use to minimise their error."""

    sources: list[CalibrationSource] = Field(
        [CalibrationSource(builtin="general", weight=1.0)],
        min_length=1,
    )
    tokens: int = Field(CALIBRATION_TOKENS, ge=64)
    window: int = Field(512, ge=8, description="tokens per sequence")
    seed: int = Field(0, ge=0)

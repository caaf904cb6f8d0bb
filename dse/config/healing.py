"""Study YAML: the section `healing`, a short training of the front at the end of the study."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dse.config._section import Section
from dse.config.calibration import CalibrationConfig

__all__ = ["HealingConfig"]


class HealingConfig(Section):
    """How the factors of points on the front are trained against the dense model."""

    tokens: int = Field(65_536, ge=1, description="tokens to train on; the text repeats if it is shorter")
    minutes: float | None = Field(15.0, gt=0, description="limit of one point's healing; none for no limit")
    batch_tokens: int = Field(512, ge=1, description="tokens of one step")
    learning_rate: float | Literal["auto"] = Field(
        "auto", description="peak of the cosine schedule; auto finds it on the first steps"
    )
    seed: int = Field(0, ge=0)
    text: CalibrationConfig | None = Field(
        None, description="training text; none takes up to `tokens` tokens of the sources of `calibration`"
    )
    other_text: str | None = Field(
        None, description="UTF-8 file of another source, which decides when to stop; none takes the package's own"
    )
    other_tokens: int = Field(4096, ge=64, description="tokens of that text")

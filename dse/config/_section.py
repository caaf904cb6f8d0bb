"""Base class of the sections of study and search-space files."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Section"]


class Section(BaseModel):
    """Frozen, and unknown keys are errors, so that a misspelt option is never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

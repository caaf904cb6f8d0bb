"""What every section of a study file has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Section"]


class Section(BaseModel):
    """Frozen, and strict about keys: a misspelt option must not be an ignored one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

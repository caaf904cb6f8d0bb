"""One finding of `dse doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Check"]


@dataclass(frozen=True)
class Check:
    """One finding: "ok", "missing" (something will not work) or "note" (worth knowing, nothing broken)."""

    name: str
    status: Literal["ok", "missing", "note"]
    detail: str
    remedy: str = ""

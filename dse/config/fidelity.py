"""The `fidelity` section: multi-fidelity evaluation, which stops unpromising trials early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from dse.config._section import Section
from dse.config.old_names import renamed, warn_deprecated

__all__ = ["FidelityConfig"]

_OLD_KEYS = {"least_gain": "min_gain", "second_look": "resume_stopped"}


class FidelityConfig(Section):
    """The rungs, and the expected gain below which a trial is stopped."""

    proxy_tokens: int = Field(
        256, ge=0, description="held-out tokens of the first rung (KL divergence from the dense model); 0 omits it"
    )
    shares: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.2, 0.5], description="shares of the documents at the rungs between the proxy and all documents, ascending"
    )
    min_gain: float = Field(
        0.005,
        ge=0,
        lt=1,
        description="a trial continues while its expected gain is at least this share of the front's hypervolume",
    )
    resume_stopped: float | None = Field(
        0.0015,
        ge=0,
        lt=1,
        description="at the end, stopped trials with at least this expected gain are resumed; null resumes none",
    )
    final_documents: int = Field(
        0, ge=0, description="documents per task, unseen by the search, on which the final front is evaluated again"
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = renamed(data, _OLD_KEYS, "fidelity")
        if "tell" in data:
            if data.pop("tell") != "estimate":
                raise ValueError("`tell` was removed: the sampler always gets a stopped trial's estimates; remove it")
            warn_deprecated("`fidelity.tell` was removed and `estimate` is always used; remove the key")
        return data

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if sorted(set(self.shares)) != self.shares:
            raise ValueError(f"`shares` must ascend, but got {self.shares}")
        return self

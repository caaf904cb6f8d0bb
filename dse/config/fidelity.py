"""The fidelity ladder: how far a trial is evaluated before it must show that it can join the front."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dse.config._section import Section

__all__ = ["FidelityConfig"]


class FidelityConfig(Section):
    """Rungs, and how much a trial must promise to climb on."""

    proxy_tokens: int = Field(
        256, ge=0, description="held-out tokens of the first rung, KL divergence to dense; 0 leaves it out"
    )
    shares: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.2, 0.5], description="shares of the documents between the proxy and all of them, ascending"
    )
    min_gain: float = Field(
        0.005,
        ge=0,
        lt=1,
        description="a trial climbs while it is expected to add at least this share to the front's hypervolume",
    )
    resume_stopped: float | None = Field(
        0.0015,
        ge=0,
        lt=1,
        description="at the end stopped trials climb on while one is expected to add this share; null leaves it out",
    )
    tell: Literal["estimate", "bound", "infeasible", "nothing"] = Field(
        "estimate", description="what the sampler hears of a stopped trial"
    )
    final_documents: int = Field(
        0, ge=0, description="documents per task, unseen by the search, on which the final front is evaluated again"
    )

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if sorted(set(self.shares)) != self.shares:
            raise ValueError(f"`shares` must ascend, but got {self.shares}")
        return self

"""The `search` section: parts of the search in addition to the sampler, each of which can be switched off."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pydantic import Field

from dse.config._section import Section

__all__ = ["SearchConfig", "SearchParts", "search_from_word"]


@dataclass(frozen=True)
class SearchParts:
    """The parts of the search that run in addition to the sampler and the user's points.

    Attributes:
        start_up: Without warm starts, evaluate uniform points and a spread over the reductions before the sampler.
        warm_starts: Measure a sensitivity profile, then evaluate allocations, uniform points and removals first.
        refinement: Propose modifications of front points, in competition with the sampler.
        refit: Refit the profile to the measured points and propose new allocations, in competition with the sampler.
    """

    start_up: bool
    warm_starts: bool
    refinement: bool
    refit: bool


_EVERYTHING = SearchParts(start_up=True, warm_starts=True, refinement=True, refit=True)
_NOTHING = SearchParts(start_up=False, warm_starts=False, refinement=False, refit=False)
# Evolutionary samplers recombine whole generations, so other proposers would dilute them. Random samplers are
# baselines.
_START_UP = SearchParts(start_up=True, warm_starts=False, refinement=False, refit=False)
_AUTOMATIC = {
    "tpe": _EVERYTHING,
    "gp": _EVERYTHING,
    "nsga2": _START_UP,
    "nsga3": _START_UP,
    "random": _NOTHING,
    "qmc": _NOTHING,
}


class SearchConfig(Section):
    """Parts of the search. The default of an omitted part depends on the sampler."""

    start_up: bool | None = Field(None, description="first evaluate uniform points and a spread over the reductions")
    warm_starts: bool | None = Field(None, description="first evaluate allocations over a sensitivity profile")
    refinement: bool | None = Field(None, description="modifications of front points compete with the sampler")
    refit: bool | None = Field(None, description="new allocations over the refitted profile compete with the sampler")
    profile_tokens: int = Field(512, ge=128, description="held-out tokens on which the sensitivity profile is measured")

    def parts(self, sampler: str) -> SearchParts:
        """The parts for this sampler: by default all for model-based samplers and none for random ones."""
        automatic = _AUTOMATIC[sampler]
        chosen = {field.name: getattr(self, field.name) for field in fields(SearchParts)}
        return SearchParts(
            **{name: getattr(automatic, name) if value is None else value for name, value in chosen.items()}
        )


def search_from_word(value: Any) -> Any:
    """Expand `auto` and `off` (which YAML reads as false) to the section that they mean."""
    if value == "auto" or value is True:
        return {}
    if value in ("off", "none") or value is False:
        return {field.name: False for field in fields(SearchParts)}
    if isinstance(value, str):
        raise ValueError("must be auto, off, or parts such as {refinement: false}")
    return value

"""How a study searches beside its sampler: each part can be switched off."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pydantic import Field

from dse.config._section import Section

__all__ = ["SearchConfig", "SearchParts", "search_of_word"]


@dataclass(frozen=True)
class SearchParts:
    """What the search consists of, beside the sampler and the user's own points.

    Attributes:
        start_up: Plain points and a spread over the reductions come before the sampler, where nothing better does.
        warm_starts: A sensitivity profile is measured, and allocations over it, uniform points and removals come first.
        refinement: Changes of front points compete with the sampler.
        refit: The divergences of the profile are refitted to the measured points, and new allocations compete, too.
    """

    start_up: bool
    warm_starts: bool
    refinement: bool
    refit: bool


_EVERYTHING = SearchParts(start_up=True, warm_starts=True, refinement=True, refit=True)
_NOTHING = SearchParts(start_up=False, warm_starts=False, refinement=False, refit=False)
# Evolution recombines whole generations, which other origins would thin out; random samplers are baselines.
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
    """Parts of the search; one that is left out follows from the sampler."""

    start_up: bool | None = Field(None, description="plain points and a spread over the reductions first")
    warm_starts: bool | None = Field(None, description="allocations over a sensitivity profile first")
    refinement: bool | None = Field(None, description="changes of front points compete with the sampler")
    refit: bool | None = Field(None, description="new allocations over refitted divergences compete with the sampler")
    profile_tokens: int = Field(512, ge=128, description="held-out tokens on which the profile measures divergence")

    def parts(self, sampler: str) -> SearchParts:
        """What runs beside this sampler: model-based ones get everything, random ones nothing, unless told."""
        automatic = _AUTOMATIC[sampler]
        chosen = {field.name: getattr(self, field.name) for field in fields(SearchParts)}
        return SearchParts(
            **{name: getattr(automatic, name) if value is None else value for name, value in chosen.items()}
        )


def search_of_word(value: Any) -> Any:
    """`auto` and `off` (which YAML reads as false) as the section that they stand for."""
    if value == "auto" or value is True:
        return {}
    if value in ("off", "none") or value is False:
        return {field.name: False for field in fields(SearchParts)}
    if isinstance(value, str):
        raise ValueError("must be auto, off, or parts such as {refinement: false}")
    return value

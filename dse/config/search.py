"""How a study searches beside its sampler: each part can be switched off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from dse.config._section import Section

__all__ = ["SearchConfig", "SearchParts", "search_of_word"]


@dataclass(frozen=True)
class SearchParts:
    """What the search consists of, beside the sampler and the user's own points.

    Attributes:
        start_up: Plain points and a spread over the reductions come before the sampler.
        refinement: Changes of front points compete with the sampler.
    """

    start_up: bool
    refinement: bool


_EVERYTHING = SearchParts(start_up=True, refinement=True)
_AUTOMATIC = {
    "tpe": _EVERYTHING,
    "gp": _EVERYTHING,
    # Evolution recombines whole generations, which other origins would thin out; random samplers are baselines.
    "nsga2": SearchParts(start_up=True, refinement=False),
    "nsga3": SearchParts(start_up=True, refinement=False),
    "random": SearchParts(start_up=False, refinement=False),
    "qmc": SearchParts(start_up=False, refinement=False),
}


class SearchConfig(Section):
    """Parts of the search; one that is left out follows from the sampler."""

    start_up: bool | None = Field(None, description="plain points and a spread over the reductions first")
    refinement: bool | None = Field(None, description="changes of front points compete with the sampler")

    def parts(self, sampler: str) -> SearchParts:
        """What runs beside this sampler: model-based ones get everything, random ones nothing, unless told."""
        chosen = {name: value for name, value in self.model_dump().items() if value is not None}
        automatic = _AUTOMATIC[sampler]
        return SearchParts(
            start_up=chosen.get("start_up", automatic.start_up),
            refinement=chosen.get("refinement", automatic.refinement),
        )


def search_of_word(value: Any) -> Any:
    """`auto` and `off` (which YAML reads as false) as the section that they stand for."""
    if value == "auto" or value is True:
        return {}
    if value in ("off", "none") or value is False:
        return dict.fromkeys(SearchConfig.model_fields, False)
    if isinstance(value, str):
        raise ValueError("must be auto, off, or parts such as {refinement: false}")
    return value

"""The schema of search-space files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dse.config._section import Section
from dse.design_point import METHOD_NAMES, PIVOTED
from dse.errors import ConfigError, did_you_mean

__all__ = ["ConstraintsConfig", "GroupConfig", "LayerRange", "LimitsConfig", "Range", "RankConfig", "SearchSpaceConfig"]


class Range(Section):
    """A closed interval; either end may be omitted."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"`min <= max` must hold, but got min={self.min} and max={self.max}")
        return self


class LimitsConfig(Section):
    """Limits on points. The first two are computed without an evaluation; the others need a measurement."""

    reduction: Range = Range()
    weight_bytes: Range = Range()
    prefill_latency_s: Range = Range()
    decode_latency_s: Range = Range()
    peak_memory_bytes: Range = Range()

    @property
    def measured(self) -> dict[str, Range]:
        """The limits in effect on measured quantities."""
        limits = {name: getattr(self, name) for name in ("prefill_latency_s", "decode_latency_s", "peak_memory_bytes")}
        return {name: limit for name, limit in limits.items() if limit != Range()}

    def within(self, other: LimitsConfig) -> LimitsConfig:
        """The intersection of two sets of limits.

        Raises:
            ConfigError: An intersection is empty.
        """
        return LimitsConfig(**{name: _both(name, getattr(self, name), getattr(other, name)) for name in _LIMITS})


def _both(name: str, first: Range, second: Range) -> Range:
    lows = [limit.min for limit in (first, second) if limit.min is not None]
    highs = [limit.max for limit in (first, second) if limit.max is not None]
    low, high = max(lows, default=None), min(highs, default=None)
    if low is not None and high is not None and low > high:
        raise ConfigError(
            f"`min <= max` must hold for the constraints on {name}, but together they require at least {low:g} and at"
            f" most {high:g}; loosen one of them in `constraints` or in the space's `limits`"
        )
    return Range(min=low, max=high)


_LIMITS = tuple(LimitsConfig.model_fields)


class ConstraintsConfig(LimitsConfig):
    """Constraints on every point of a study, in addition to those of its search space."""

    keep_layers: list[Annotated[int, Field(ge=0)]] = Field([], description="layers that stay dense in every point")
    keep_roles: list[str] = Field([], description="roles that stay dense in every point")

    @property
    def limits(self) -> LimitsConfig:
        """The limits without the layers and roles."""
        return LimitsConfig(**{name: getattr(self, name) for name in _LIMITS})


class LayerRange(Section):
    """All layers except the first and last few."""

    skip_first: int = Field(0, ge=0)
    skip_last: int = Field(0, ge=0)


class GroupConfig(Section):
    """Groups of tensors that share one choice, by neighbouring layers and by roles."""

    layers: int = Field(1, ge=1, description="neighbouring layers that share a choice")
    roles: Literal["together", "separate"] | dict[str, list[str]] = Field(
        "together", description="together, separate, or named groups such as {attention: [query, key], mlp: [up]}"
    )

    @field_validator("roles", mode="before")
    @classmethod
    def _roles_have_a_form(cls, value: Any) -> Any:
        if not (value in ("together", "separate") or isinstance(value, Mapping)):
            raise ValueError("must be together, separate, or named groups such as {attention: [query, key], mlp: [up]}")
        return value


class RankConfig(Section):
    """The rank levels of a group, in addition to leaving it dense."""

    absolute: list[Annotated[int, Field(ge=1)]] | None = None
    kept_fractions: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, description="parameters of the factors divided by those of the tensor"
    )
    multiple: Annotated[int, Field(ge=1)] | Literal["device"] = Field(
        1,
        description="round ranks down to a multiple of this; device: the one that is fastest on the study's device",
    )

    @property
    def settled_multiple(self) -> int:
        """The rank multiple as a number.

        Raises:
            ConfigError: The multiple is `device`, and the device has not been timed yet.
        """
        if self.multiple == "device":
            raise ConfigError(
                "`ranks.multiple` must be a number here, but got 'device', which only `dse run` resolves; run"
                " `dse profile-device --space` and write the number that it prints"
            )
        return self.multiple

    @model_validator(mode="after")
    def _one_grid(self) -> Self:
        if (self.absolute is None) == (self.kept_fractions is None):
            raise ValueError("give exactly one of `absolute` and `kept_fractions`")
        if not (self.absolute or self.kept_fractions):
            raise ValueError("a rank grid needs at least one level")
        levels: list[Any] = [*(self.absolute or ()), *(self.kept_fractions or ())]
        if len(set(levels)) != len(levels):
            raise ValueError(f"a rank level may be listed once, but got {levels}")
        return self


class SearchSpaceConfig(Section):
    """The parts that may be decomposed or removed, and the ranks they may have."""

    name: str = Field(min_length=1)
    kind: Literal["levels", "subset", "depth_profile"] = Field(
        "levels",
        description="levels: each group is dense or has a rank; subset: layers x roles x one rank (as in the paper);"
        " depth_profile: a budget and a smooth profile over depth, from which an allocation computes a point",
    )
    methods: list[str] = Field(["whitened_svd"], min_length=1)
    forms: list[Literal["plain", "pivoted"]] = Field(
        ["plain"],
        min_length=1,
        description="plain: two factors; pivoted: independent rows or columns, with fewer parameters",
    )
    layers: Literal["all"] | list[int] | LayerRange = "all"
    roles: Literal["all"] | list[str] = "all"
    groups: GroupConfig = GroupConfig()
    ranks: RankConfig
    stacks: bool = Field(
        False, description="decompose query, key and value (gate and up) of a layer as one stacked matrix if possible"
    )
    removal: bool = Field(False, description="allow the removal of whole attention and MLP blocks")
    widths: bool = Field(
        False, description="allow MLPs that keep some of their intermediate channels, at the same kept fractions"
    )
    knots: int = Field(
        5, ge=2, le=20, description="depth_profile: number of support points of the curve over the layers"
    )
    limits: LimitsConfig = LimitsConfig()
    keep_layers: list[Annotated[int, Field(ge=0)]] = Field([], description="layers that stay dense in every point")
    keep_roles: list[str] = Field([], description="roles that stay dense in every point")
    role_names: dict[str, str] = Field(
        {}, description="module path suffix -> role, for architectures that dse does not know"
    )

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: list[str]) -> list[str]:
        for method in methods:
            if method not in METHOD_NAMES:
                raise ValueError(
                    f"a method must be one of {', '.join(METHOD_NAMES)}, but got '{method}'"
                    f"{did_you_mean(method, METHOD_NAMES)}"
                )
        if len(set(methods)) != len(methods):
            raise ValueError(f"a method may be named once, but got {methods}")
        return methods

    @property
    def factor_forms(self) -> tuple[str, ...]:
        """The forms as in `TensorChoice.form`."""
        return tuple("" if form == "plain" else form for form in self.forms)

    @model_validator(mode="after")
    def _forms_fit(self) -> Self:
        if len(set(self.forms)) != len(self.forms):
            raise ValueError(f"a form may be named once, but got {self.forms}")
        if PIVOTED not in self.forms:
            return self
        if "tucker" in self.methods:
            raise ValueError(
                "`forms: [pivoted]` needs methods with two factors, but got 'tucker', which keeps a core; use"
                " 'tucker_merged'"
            )
        if self.stacks or self.kind == "subset":
            raise ValueError(
                "`forms: [pivoted]` needs single matrices at ranks of their own, so it is not for `stacks` or `kind:"
                " subset`; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _groups_are_used(self) -> Self:
        if self.kind != "levels" and self.groups != GroupConfig():
            raise ValueError("`groups` is for `kind: levels`; the other kinds define their own groups")
        if self.kind == "subset" and (self.stacks or self.removal or self.widths):
            raise ValueError(
                "`stacks`, `removal` and `widths` are not for `kind: subset`, which has one rank for all its tensors"
            )
        if self.widths and self.ranks.kept_fractions is None:
            raise ValueError("`widths` needs `ranks.kept_fractions`, since an absolute rank says nothing about a width")
        if self.kind == "depth_profile" and self.stacks:
            raise ValueError("`stacks` is for `kind: levels`; a depth profile decomposes single tensors")
        if self.kind != "depth_profile" and self.knots != 5:
            raise ValueError("`knots` is for `kind: depth_profile`")
        return self

    def at_multiple(self, multiple: int) -> SearchSpaceConfig:
        """This space with the given rank multiple."""
        return self.model_copy(update={"ranks": self.ranks.model_copy(update={"multiple": multiple})})

    def constrained(self, constraints: ConstraintsConfig) -> SearchSpaceConfig:
        """This space with further constraints.

        Raises:
            ConfigError: They conflict with those of the space.
        """
        changes = {
            "limits": self.limits.within(constraints.limits),
            "keep_layers": sorted({*self.keep_layers, *constraints.keep_layers}),
            "keep_roles": list(dict.fromkeys([*self.keep_roles, *constraints.keep_roles])),
        }
        return self.model_copy(update=changes)

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_have_a_form(cls, value: Any) -> Any:
        if not (value == "all" or isinstance(value, (list, Mapping, LayerRange))):
            raise ValueError("must be all, a list of layer indices, or {skip_first: 1, skip_last: 1}")
        if isinstance(value, list) and any(isinstance(layer, bool) for layer in value):
            raise ValueError(f"layers must be integers, but got {value}")
        return value

    @field_validator("roles", mode="before")
    @classmethod
    def _roles_have_a_form(cls, value: Any) -> Any:
        if not (value == "all" or isinstance(value, list)):
            raise ValueError("must be all, or a list of roles such as [query, up]")
        return value

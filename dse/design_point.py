"""Design points: which tensors are decomposed, by which method and rank, and which blocks are removed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dse.errors import PointError, did_you_mean
from dse.topology import Topology

__all__ = ["METHOD_NAMES", "PIVOTED", "REMOVED", "WIDTH", "DesignPoint", "TensorChoice"]

METHOD_NAMES: tuple[str, ...] = ("tucker", "tucker_merged", "svd", "whitened_svd", "fisher_svd", "fisher_svd_refit")
"""Names of the decomposition methods; `dse.decomposition` maps each to its function."""

REMOVED = "removed"
"""The method name of a removed block, whose rank is 0."""

WIDTH = "width"
"""The method name of an MLP with fewer intermediate channels; its rank is the number of channels that are kept."""

PIVOTED = "pivoted"
"""The form of factors that stores a matrix of rank r in r(m + n) - r^2 numbers; see `dse.decomposition`."""

_CHOICE_KEYS = ("method", "rank", "expert_rank", "form")
_COMPACT_KEYS = (*_CHOICE_KEYS, "layers", "roles")


@dataclass(frozen=True, order=True)
class TensorChoice:
    """Method and rank of one tensor, or the removal of a block.

    Attributes:
        method: One of `METHOD_NAMES`, `width` for an MLP, or `removed` for an attention or MLP block.
        rank: Rank of the factors, from 1 to the tensor's break-even rank (`dse.cost.break_even_rank`). For `width` the
            number of channels kept. 0 for a removed block only.
        expert_rank: Rank of the expert mode of a fused expert tensor. 0 keeps the mode at full rank, and is the only
            value for other tensors.
        form: `pivoted` stores independent columns or rows and how the others follow from them; "" is two factors.
    """

    method: str
    rank: int
    expert_rank: int = 0
    form: str = ""

    def __post_init__(self) -> None:
        known = (*METHOD_NAMES, WIDTH, REMOVED)
        if self.method not in known:
            raise PointError(
                f"`method` must be one of {', '.join(known)}, but got '{self.method}'"
                f"{did_you_mean(str(self.method), known)}"
            )
        is_integer = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        if self.is_removal:
            if not is_integer or self.rank != 0:
                raise PointError(f"`rank = 0` must hold for method '{REMOVED}', but got rank={self.rank!r}")
        elif not is_integer or self.rank < 1:
            hint = f'; {{"method": "{REMOVED}", "rank": 0}} removes a block' if is_integer and self.rank == 0 else ""
            raise PointError(f"`rank >= 1` must hold and be an integer, but got rank={self.rank!r}{hint}")
        self._check_expert_rank()
        self._check_form()

    def _check_form(self) -> None:
        if self.form not in ("", PIVOTED):
            raise PointError(f"`form` must be '{PIVOTED}' or be left out, but got {self.form!r}")
        if self.form and (self.method == "tucker" or not self.has_factors):
            raise PointError(
                f"`form: {PIVOTED}` applies to methods with two factors, but got method '{self.method}'; remove it"
            )

    def _check_expert_rank(self) -> None:
        kept = self.expert_rank
        if not isinstance(kept, int) or isinstance(kept, bool) or kept < 0:
            raise PointError(f"`expert_rank >= 0` must hold and be an integer, but got expert_rank={kept!r}")
        if kept and self.method != "tucker":
            raise PointError(
                f"`expert_rank` applies to method 'tucker' on fused expert tensors only, but got expert_rank={kept}"
                f" with method '{self.method}'; remove it"
            )

    @classmethod
    def removal(cls) -> TensorChoice:
        """The choice that removes a block."""
        return cls(REMOVED, 0)

    @property
    def is_removal(self) -> bool:
        """Whether the block is removed rather than decomposed."""
        return self.method == REMOVED

    @property
    def is_width(self) -> bool:
        """Whether an MLP keeps some of its channels, rather than a tensor being decomposed."""
        return self.method == WIDTH

    @property
    def has_factors(self) -> bool:
        """Whether a tensor, stack or fused expert tensor is replaced by factors."""
        return not self.is_removal and not self.is_width

    @property
    def is_pivoted(self) -> bool:
        """Whether a matrix is stored by its independent columns or rows."""
        return self.form == PIVOTED

    @property
    def title(self) -> str:
        """Form and method in words, such as `svd` or `pivoted svd`."""
        return f"{self.form} {self.method}" if self.form else self.method

    def to_json(self) -> dict[str, Any]:
        """`{"method", "rank"}`, and `expert_rank` and `form` where they are not the default."""
        entry: dict[str, Any] = {"method": self.method, "rank": self.rank}
        entry |= {"expert_rank": self.expert_rank} if self.expert_rank else {}
        return entry | ({"form": self.form} if self.form else {})

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> TensorChoice:
        """Read the output of `to_json`.

        Raises:
            PointError: A key is missing or a value is not allowed.
        """
        for key in ("method", "rank"):
            if key not in entry:
                raise PointError(
                    f"a point needs '{key}', but got {_short(dict(entry))}; add it, or use the expanded form"
                )
        if not isinstance(entry["method"], str):
            raise PointError(f"`method` must be a name, but got {_short(entry['method'])}")
        return cls(entry["method"], entry["rank"], entry.get("expert_rank", 0), entry.get("form", ""))


@dataclass(frozen=True)
class DesignPoint:
    """One configuration of the design space. Tensors that it does not name stay dense.

    Attributes:
        choices: (name, choice) pairs of decomposed tensors and removed blocks. They are sorted by name, so that equal
            points compare and hash equal.
    """

    choices: tuple[tuple[str, TensorChoice], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.choices]
        if len(set(names)) != len(names):
            raise PointError(f"a tensor may be named once in a point, but got {sorted(names)}")
        object.__setattr__(self, "choices", tuple(sorted(self.choices)))

    @classmethod
    def dense(cls) -> DesignPoint:
        """The point that changes nothing."""
        return cls()

    @classmethod
    def of(cls, choices: Mapping[str, TensorChoice]) -> DesignPoint:
        """Build a point from a mapping of names to choices."""
        return cls(tuple(choices.items()))

    @classmethod
    def uniform(
        cls, topology: Topology, method: str, rank: int, layers: list[int] | str = "all", roles: list[str] | str = "all"
    ) -> DesignPoint:
        """Apply one method and rank to these roles of these layers (the compact form).

        With method `removed` and rank 0 the roles are those of blocks: `attention`, `mlp`, or "all" for both. With
        method `width` the role is `mlp`.

        Raises:
            PointError: A layer, role, method or rank is not valid.
        """
        return cls._uniform(topology, TensorChoice(method, rank), layers, roles)

    @classmethod
    def _uniform(
        cls, topology: Topology, choice: TensorChoice, layers: list[int] | str, roles: list[str] | str
    ) -> DesignPoint:
        if choice.is_removal and roles == "all":
            roles = ["attention", "mlp"]
        if choice.is_width and roles == "all":
            roles = ["mlp"]
        return cls(tuple((name, choice) for name in topology.select(layers, roles)))

    @classmethod
    def from_json(cls, content: str | Mapping[str, Any], topology: Topology) -> DesignPoint:
        """Read a point in compact or expanded form.

        Args:
            content: JSON text or its parsed mapping: `{"method", "rank", "layers", "roles"}` or `{"tensors": {...}}`.
            topology: The model's topology, over which the compact form is expanded.

        Raises:
            PointError: The content has neither form, or names a part that the model does not have.
        """
        data = _parse_json(content) if isinstance(content, str) else content
        if not isinstance(data, Mapping):
            raise PointError(f"a design point must be a JSON object, but got {_short(data)}")
        if "tensors" in data:
            return cls._from_expanded(data, topology)
        return cls._from_compact(data, topology)

    @classmethod
    def from_stored(cls, data: Mapping[str, Any]) -> DesignPoint:
        """Read the mapping written by `to_json`, without a topology to check the names against.

        Raises:
            KeyError: The mapping is not in the expanded form.
            PointError: A choice is damaged.
        """
        return cls.of({name: TensorChoice.from_json(choice) for name, choice in data["tensors"].items()})

    @classmethod
    def read(cls, source: str, topology: Topology) -> DesignPoint:
        """Read a point from JSON text, a JSON file, or the word `dense`.

        Raises:
            PointError: `source` is none of these, or its content is not a point of this model.
        """
        text = source.strip()
        if text == "dense":
            return cls.dense()
        if not text.startswith(("{", "[", '"')):
            path = Path(text)
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise PointError(
                    f"a point must be JSON text, the word 'dense' or a readable JSON file, but got {_short(source)}"
                    f" ({getattr(error, 'strerror', None) or error})"
                ) from error
        return cls.from_json(text, topology)

    @classmethod
    def _from_expanded(cls, data: Mapping[str, Any], topology: Topology) -> DesignPoint:
        _refuse_unknown(data, ("tensors",))
        tensors = data["tensors"]
        if not isinstance(tensors, Mapping):
            raise PointError(f"`tensors` must map tensor names to choices, but got {_short(tensors)}")
        choices = {}
        for name, entry in tensors.items():
            part = topology.part(str(name))
            if not isinstance(entry, Mapping):
                raise PointError(
                    f'the choice for \'{name}\' must be like {{"method": "svd", "rank": 64}}, but got {_short(entry)}'
                )
            _refuse_unknown(entry, _CHOICE_KEYS)
            choices[part.name] = TensorChoice.from_json(entry)
        return cls.of(choices)

    @classmethod
    def _from_compact(cls, data: Mapping[str, Any], topology: Topology) -> DesignPoint:
        _refuse_unknown(data, _COMPACT_KEYS)
        if not data:
            return cls.dense()
        layers, roles = data.get("layers", "all"), data.get("roles", "all")
        if not isinstance(layers, str) and not _is_list_of(layers, int):
            raise PointError(f"`layers` must be 'all' or a list of layer indices, but got {_short(layers)}")
        if not isinstance(roles, str) and not _is_list_of(roles, str):
            raise PointError(f"`roles` must be 'all' or a list of roles, but got {_short(roles)}")
        return cls._uniform(topology, TensorChoice.from_json(data), layers, roles)

    @cached_property
    def by_name(self) -> Mapping[str, TensorChoice]:
        """Name of a tensor or block -> choice."""
        return dict(self.choices)

    @cached_property
    def removed(self) -> tuple[str, ...]:
        """Names of the blocks that are removed."""
        return tuple(name for name, choice in self.choices if choice.is_removal)

    @cached_property
    def widths(self) -> Mapping[str, int]:
        """Name of each MLP with a reduced width -> channels kept."""
        return {name: choice.rank for name, choice in self.choices if choice.is_width}

    @cached_property
    def decomposed(self) -> tuple[tuple[str, TensorChoice], ...]:
        """The (name, choice) pairs that replace a tensor, stack or fused expert tensor by factors."""
        return tuple(pair for pair in self.choices if pair[1].has_factors)

    @property
    def is_dense(self) -> bool:
        """Whether the point leaves the model unchanged."""
        return not self.choices

    @cached_property
    def id(self) -> str:
        """Twelve hexadecimal digits that identify the choices."""
        return hashlib.sha256(self.canonical_json.encode()).hexdigest()[:12]

    @cached_property
    def canonical_json(self) -> str:
        """The expanded form on one line, keys sorted."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    def to_json(self) -> dict[str, Any]:
        """The expanded form: `{"tensors": {name: {"method", "rank"}}}`."""
        return {"tensors": {name: choice.to_json() for name, choice in self.choices}}

    def compact(self, topology: Topology) -> dict[str, Any] | None:
        """The compact form; None if the point is not one choice over layers x roles."""
        methods = {choice for _, choice in self.choices}
        parts = [topology.part(name) for name, _ in self.choices]
        if len(methods) != 1 or any(part.layer is None for part in parts):
            return None
        choice = next(iter(methods))
        layers = sorted({part.layer for part in parts if part.layer is not None})
        roles = [role for role in topology.part_roles if any(part.role == role for part in parts)]
        if set(topology.select(layers, roles)) != set(self.by_name):
            return None
        all_roles = roles == list(topology.roles)
        return {**choice.to_json(), "layers": layers, "roles": "all" if all_roles else roles}

    def __len__(self) -> int:
        return len(self.choices)

    def __iter__(self) -> Iterator[tuple[str, TensorChoice]]:
        return iter(self.choices)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PointError(f"a design point must be valid JSON, but got {_short(text)} ({error})") from error


def _refuse_unknown(data: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in data:
        if key not in known:
            raise PointError(
                f"the keys of a point are {', '.join(known)}, but got '{_short(key)}'{did_you_mean(str(key), known)}"
            )


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."

"""Groups of a `levels` space: matrices that share one level, and the blocks and MLPs that consist of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dse.config import RankConfig
from dse.cost import factor_parameters
from dse.design_point import WIDTH, TensorChoice
from dse.expert_tensor import ExpertTensor
from dse.model_parts import Decomposable, Matrix, Mlp, RemovableBlock
from dse.search.spaces.rank_levels import choice_at, level_count, width_levels
from dse.topology import Topology

__all__ = ["Form", "Group", "matrices_of", "stacked_roles", "whole_blocks", "whole_mlps"]

Form = Mapping[str, TensorChoice]
"""Names of a group's matrices or MLPs to their choices at one level."""


@dataclass(frozen=True)
class Group:
    """Matrices that share one level.

    Attributes:
        name: Dimension name, for example `layers.4-7.attention`.
        label: Name of the role group; "" if all roles share a level.
        matrices: Tensors, stacks and fused expert tensors; the latter use method `tucker` in every case.
        forms: Method to the choices at each level above dense, those with most parameters first. Methods may have
            different numbers of levels.
        mlps: The MLPs that consist of these matrices; some levels reduce their width. Empty without such levels.
        blocks: The blocks that consist of these matrices; the last level removes them. Empty without such a level.
    """

    name: str
    label: str
    matrices: tuple[Decomposable, ...]
    forms: Mapping[str, tuple[Form, ...]]
    mlps: tuple[Mlp, ...] = ()
    blocks: tuple[RemovableBlock, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        label: str,
        matrices: tuple[Decomposable, ...],
        methods: Iterable[str],
        factor_forms: Sequence[str],
        grid: RankConfig,
        mlps: tuple[Mlp, ...],
        blocks: tuple[RemovableBlock, ...],
    ) -> Group:
        """A group with the levels of a rank grid under each method; levels with the same choices are one level."""
        parts = {part.name: part for part in matrices} | {mlp.name: mlp for mlp in mlps}
        forms = {}
        for method in methods:
            found: list[Form] = [
                {m.name: choice_at(grid, index, m, method, form) for m in matrices}
                for form in factor_forms
                for index in range(level_count(grid))
            ]
            found += _width_forms(mlps, grid)
            distinct = [form for index, form in enumerate(found) if form not in found[:index]]
            if mlps or len(factor_forms) > 1:
                distinct.sort(key=lambda form: _saved(parts, form))
            forms[method] = tuple(distinct)
        return cls(name, label, matrices, forms, mlps, blocks)

    def choices(self, method: str, level: int) -> Form:
        """Name to choice at a level from 1 upwards; beyond the method's last level, the last one."""
        if self.removes(level):
            return {block.name: TensorChoice.removal() for block in self.blocks}
        levels = self.forms[method]
        return levels[min(level, len(levels)) - 1]

    @property
    def names(self) -> frozenset[str]:
        """Names of all parts that the group's levels change."""
        return frozenset(part.name for part in (*self.matrices, *self.mlps, *self.blocks))

    @property
    def is_experts(self) -> bool:
        """Whether the group has only fused expert tensors, so that its choices do not depend on the method."""
        return all(isinstance(matrix, ExpertTensor) for matrix in self.matrices)

    def removes(self, level: int) -> bool:
        """Whether this level removes the blocks."""
        return bool(self.blocks) and level == self.level_count - 1

    def saved(self, method: str, level: int) -> int:
        """Number of parameters removed at a level."""
        if not level:
            return 0
        if self.removes(level):
            return sum(block.parameters for block in self.blocks)
        parts = {part.name: part for part in self.matrices} | {mlp.name: mlp for mlp in self.mlps}
        return _saved(parts, self.choices(method, level))

    def levels(self, method: str) -> tuple[int, ...]:
        """The distinct levels above dense under a method."""
        return (*range(1, 1 + len(self.forms[method])), *((self.level_count - 1,) if self.blocks else ()))

    def deepest_level(self, method: str) -> int:
        """The level above dense that removes most parameters; the first of several."""
        return max(self.levels(method), key=lambda level: self.saved(method, level))

    @property
    def level_count(self) -> int:
        """Number of levels over all methods: dense, ranks, widths, and removal."""
        return 1 + max(len(levels) for levels in self.forms.values()) + bool(self.blocks)


def _width_forms(mlps: tuple[Mlp, ...], grid: RankConfig) -> list[Form]:
    """The MLPs at each width of the grid; an MLP with fewer distinct widths keeps its smallest one."""
    levels = [width_levels(grid, mlp) for mlp in mlps]
    if not levels or not all(levels):
        return []
    return [
        {mlp.name: TensorChoice(WIDTH, own[min(index, len(own) - 1)]) for mlp, own in zip(mlps, levels, strict=True)}
        for index in range(max(map(len, levels)))
    ]


def _saved(parts: Mapping[str, Decomposable | Mlp], form: Form) -> int:
    """Number of parameters that the choices of a level remove."""
    saved = 0
    for name, choice in form.items():
        part = parts[name]
        if isinstance(part, Mlp):
            saved += part.parameters_per_channel * (part.channels - choice.rank)
        else:
            saved += part.parameters - factor_parameters(part, choice)
    return saved


def stacked_roles(topology: Topology, roles: Iterable[str]) -> tuple[str, ...]:
    """The roles, with the members of each complete stack replaced by the stack."""
    members = {stack.role: {member.role for member in stack.members} for stack in topology.stacks}
    named = tuple(roles)
    for role, parts in members.items():
        if parts <= set(named):
            named = tuple(dict.fromkeys(role if other in parts else other for other in named))
    return named


def matrices_of(
    topology: Topology, layers: Iterable[int], roles: Iterable[str], *, stacks: bool
) -> tuple[Decomposable, ...]:
    """The matrices with these roles in these layers, in topology order, followed by the fused expert tensors.

    Args:
        layers: 0-based layer indices.
        stacks: Whether a stack replaces its members if the roles name the stack or all of its members. Layers without
            the stack yield the members.
    """
    inside, wanted = set(layers), set(roles)
    experts = tuple(t for t in topology.experts if t.layer in inside and t.role in wanted)
    return (*_matrices(topology, inside, wanted, stacks=stacks), *experts)


def _matrices(topology: Topology, inside: set[int], wanted: set[str], *, stacks: bool) -> tuple[Matrix, ...]:
    if not stacks:
        return tuple(t for t in topology.tensors if t.layer in inside and t.role in wanted)
    members = {stack.role: {member.role for member in stack.members} for stack in topology.stacks}
    wanted |= {part for role in wanted & members.keys() for part in members[role]}
    chosen = [s for s in topology.stacks if s.layer in inside and members[s.role] <= wanted]
    covered = {member.name for stack in chosen for member in stack.members}
    names = {stack.name for stack in chosen}
    names |= {t.name for t in topology.tensors if t.layer in inside and t.role in wanted and t.name not in covered}
    return tuple(matrix for matrix in topology.matrices if matrix.name in names)


def whole_blocks(
    topology: Topology, matrices: Iterable[Decomposable], *, with_experts: bool = False
) -> tuple[RemovableBlock, ...]:
    """The removable blocks that consist of these matrices; none if a matrix belongs to no such block.

    Args:
        with_experts: Whether the space contains fused expert tensors. If so, those of a block must be in the group too;
            otherwise they are removed with the block's matrices.
    """
    tensors = {tensor for matrix in matrices for tensor in topology.tensors_of(matrix.name)}
    own = {block.name: (*block.tensors, *(block.experts if with_experts else ())) for block in topology.blocks}
    blocks = tuple(block for block in topology.blocks if own[block.name] and tensors.issuperset(own[block.name]))
    return blocks if tensors <= {tensor for block in blocks for tensor in topology.tensors_of(block.name)} else ()


def whole_mlps(topology: Topology, matrices: Iterable[Decomposable]) -> tuple[Mlp, ...]:
    """The MLPs with independent channels that consist of these matrices; none if a matrix belongs to no such MLP."""
    tensors = {tensor for matrix in matrices for tensor in topology.tensors_of(matrix.name)}
    members = {mlp.name: {tensor.name for tensor in mlp.tensors} for mlp in topology.mlps}
    mlps = tuple(mlp for mlp in topology.mlps if tensors >= members[mlp.name])
    return mlps if tensors <= {tensor for mlp in mlps for tensor in members[mlp.name]} else ()

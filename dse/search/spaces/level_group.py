"""Groups of a `levels` space: matrices that share one level, and the blocks that consist of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dse.design_point import TensorChoice
from dse.expert_tensor import ExpertTensor
from dse.search.spaces.rank_levels import method_for, saved_parameters
from dse.topology import Decomposable, Matrix, RemovableBlock, Topology

__all__ = ["Group", "matrices_of", "stacked_roles", "whole_blocks"]


@dataclass(frozen=True)
class Group:
    """Matrices that share one level.

    Attributes:
        name: Dimension name, for example `layers.4-7.attention`.
        label: Name of the role group; "" if all roles share a level.
        matrices: Tensors, stacks and fused expert tensors; the latter use method `tucker` in every case.
        ranks: Method to the ranks of the matrices at each level above dense. Methods may have different numbers of
            levels.
        blocks: The blocks that consist of these matrices; the last level removes them. Empty without such a level.
    """

    name: str
    label: str
    matrices: tuple[Decomposable, ...]
    ranks: Mapping[str, tuple[tuple[int, ...], ...]]
    blocks: tuple[RemovableBlock, ...] = ()

    def choices(self, method: str, level: int) -> dict[str, TensorChoice]:
        """Name to choice at a level from 1 upwards; beyond the method's last level, the last one."""
        if self.removes(level):
            return {block.name: TensorChoice.removal() for block in self.blocks}
        levels = self.ranks[method]
        ranks = levels[min(level, len(levels)) - 1]
        pairs = zip(self.matrices, ranks, strict=True)
        return {matrix.name: TensorChoice(method_for(matrix, method), rank) for matrix, rank in pairs}

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
        return saved_parameters(self.matrices, self.choices(method, level).values())

    def levels(self, method: str) -> tuple[int, ...]:
        """The distinct levels above dense under a method."""
        return (*range(1, 1 + len(self.ranks[method])), *((self.level_count - 1,) if self.blocks else ()))

    def deepest_level(self, method: str) -> int:
        """The level above dense that removes most parameters; the first of several."""
        return max(self.levels(method), key=lambda level: self.saved(method, level))

    @property
    def level_count(self) -> int:
        """Number of levels over all methods: dense, ranks, and removal."""
        return 1 + max(len(levels) for levels in self.ranks.values()) + bool(self.blocks)


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

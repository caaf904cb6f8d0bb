"""Groups of a `levels` space: matrices that share one choice, and the blocks that they are the whole of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dse.design_point import TensorChoice
from dse.expert_tensor import ExpertTensor
from dse.search.spaces.rank_grid import method_for, saved_parameters
from dse.topology import Decomposable, Matrix, RemovableBlock, Topology

__all__ = ["Group", "matrices_of", "stacked_roles", "whole_blocks"]


@dataclass(frozen=True)
class Group:
    """Matrices that share one choice.

    Attributes:
        name: Dimension name, for example `layers.4-7.attention`.
        label: Name of its role group, "" where roles choose together.
        matrices: Its tensors, stacks and fused expert tensors; the last take method `tucker` whatever the others take.
        ranks: Method to level (0 is the first level above dense) to the rank of each matrix; as many levels per method.
        blocks: Blocks that the matrices are the whole of, which its last level removes; empty for no such level.
    """

    name: str
    label: str
    matrices: tuple[Decomposable, ...]
    ranks: Mapping[str, tuple[tuple[int, ...], ...]]
    blocks: tuple[RemovableBlock, ...] = ()

    def choices(self, method: str, level: int) -> dict[str, TensorChoice]:
        """Name to choice at a level from 1 upwards; a level that the method does not have is its deepest one."""
        if self.removes(level):
            return {block.name: TensorChoice.removal() for block in self.blocks}
        levels = self.ranks[method]
        ranks = levels[min(level, len(levels)) - 1]
        pairs = zip(self.matrices, ranks, strict=True)
        return {matrix.name: TensorChoice(method_for(matrix, method), rank) for matrix, rank in pairs}

    @property
    def is_experts(self) -> bool:
        """Whether it holds fused expert tensors alone, so that its choices are the same under every method."""
        return all(isinstance(matrix, ExpertTensor) for matrix in self.matrices)

    def removes(self, level: int) -> bool:
        """Whether this level removes its blocks."""
        return bool(self.blocks) and level == self.level_count - 1

    def saved(self, method: str, level: int) -> int:
        """Parameters removed at a level; 0 at level 0."""
        if not level:
            return 0
        if self.removes(level):
            return sum(block.parameters for block in self.blocks)
        return saved_parameters(self.matrices, self.choices(method, level).values())

    def levels(self, method: str) -> tuple[int, ...]:
        """Levels above dense that differ under this method."""
        return (*range(1, 1 + len(self.ranks[method])), *((self.level_count - 1,) if self.blocks else ()))

    @property
    def level_count(self) -> int:
        """Levels of the method that has most: dense, ranks, and the removal."""
        return 1 + max(len(levels) for levels in self.ranks.values()) + bool(self.blocks)


def stacked_roles(topology: Topology, roles: Iterable[str]) -> tuple[str, ...]:
    """The roles with those that make up a stack replaced by the stack's."""
    members = {stack.role: {member.role for member in stack.members} for stack in topology.stacks}
    named = tuple(roles)
    for role, parts in members.items():
        if parts <= set(named):
            named = tuple(dict.fromkeys(role if other in parts else other for other in named))
    return named


def matrices_of(
    topology: Topology, layers: Iterable[int], roles: Iterable[str], *, stacks: bool
) -> tuple[Decomposable, ...]:
    """The matrices with these roles in these layers, in topology order, and behind them the fused expert tensors.

    Args:
        topology: Of the model.
        layers: 0-based layer indices.
        roles: Role names.
        stacks: Whether a stack takes the place of its members where the roles name it, or all of them. A layer that has
            no such stack gives the members.
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
    """The removable blocks that these matrices are the whole of; none if some belong to no such block.

    Args:
        topology: Of the model.
        matrices: Of one group.
        with_experts: Whether some group of the space holds fused expert tensors: then they too must be in this one.
            Otherwise they go with a block whose matrices are all here.
    """
    tensors = {tensor for matrix in matrices for tensor in topology.tensors_of(matrix.name)}
    own = {block.name: (*block.tensors, *(block.experts if with_experts else ())) for block in topology.blocks}
    blocks = tuple(block for block in topology.blocks if own[block.name] and tensors.issuperset(own[block.name]))
    return blocks if tensors <= {tensor for block in blocks for tensor in topology.tensors_of(block.name)} else ()

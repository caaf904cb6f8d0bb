"""Which tensors of a layer read the same input, found by running the module around them without its matrices."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dse.models.skeleton import run_skeleton, skeleton_of
from dse.topology import DecomposableTensor, TensorStack

__all__ = ["STACK_ROLES", "find_stacks"]

STACK_ROLES = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}
"""Stack to its members' roles, in the order of their rows; fused models have a tensor of the stack's name."""

_PROBE_TOKENS = 3


def find_stacks(model: nn.Module, tensors: Iterable[DecomposableTensor]) -> tuple[TensorStack, ...]:
    """The stacks of every layer whose members are separate linear modules that are handed the very same tensor.

    Args:
        model: The model, on any device, the meta device included.
        tensors: The decomposable tensors inside its layers.
    """
    by_layer: dict[int, dict[str, DecomposableTensor]] = {}
    for tensor in tensors:
        if tensor.layer is not None:
            by_layer.setdefault(tensor.layer, {})[tensor.role] = tensor
    return tuple(
        TensorStack(f"layers.{layer}.{role}", layer, role, tuple(by_role[r] for r in members))
        for layer, by_role in by_layer.items()
        for role, members in STACK_ROLES.items()
        if role not in by_role
        and all(r in by_role for r in members)
        and _read_the_same(model, [by_role[r] for r in members])
    )


def _read_the_same(model: nn.Module, members: list[DecomposableTensor]) -> bool:
    parents = {member.module.rpartition(".")[0] for member in members}
    if len(parents) > 1 or any(member.kind != "linear" for member in members):
        return False
    parent = model.get_submodule(parents.pop())
    names = [member.module.rpartition(".")[2] for member in members]
    stubs = {
        name: _Reader(_out_features(child))
        for name, child in parent.named_children()
        if any(p.ndim >= 2 for p in child.parameters())
    }
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _PROBE_TOKENS, members[0].in_features, generator=generator)
    # Attention asks for positions that it is not given, but only behind its first products: what they read is known.
    run_skeleton(skeleton_of(parent, stubs, generator), hidden)
    seen = [stubs[name].seen for name in names]
    return all(len(tensors) == 1 and tensors[0] is seen[0][0] for tensors in seen)


def _out_features(module: nn.Module) -> int:
    return next(p.shape[0] for p in module.parameters() if p.ndim >= 2)


class _Reader(nn.Module):
    """Stands in for a linear module: remembers what it read, and gives zeros of the right shape."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.seen: list[Tensor] = []

    def forward(self, value: Tensor) -> Tensor:
        self.seen.append(value)
        return value.new_zeros(*value.shape[:-1], self.out_features)

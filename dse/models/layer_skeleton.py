"""Run a part of a layer without its matrices, and find the tensors that read the same input this way."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dse.model_parts import DecomposableTensor, RemovableBlock, TensorStack

__all__ = ["STACK_ROLES", "find_stacks", "run_skeleton", "skeleton_of"]

STACK_ROLES = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}
"""Stack role to its members' roles, in the order of their rows. Fused models have a tensor of the stack's role."""

_PROBE_TOKENS = 3


_READS_WIDTH = re.compile(r"hidden_states\.(size\(-1\)|size\(2\)|shape\[-1\]|shape\[2\])")
"""Code of a block that depends on the width of its input, which a factor in front of the block changes."""


def find_stacks(
    model: nn.Module, tensors: Iterable[DecomposableTensor], blocks: Iterable[RemovableBlock] = ()
) -> tuple[TensorStack, ...]:
    """The stacks of every layer whose members are separate linear modules that receive the same tensor.

    Args:
        model: The model, on any device, including meta.
        tensors: The decomposable tensors inside its layers.
        blocks: The removable blocks; they name the norm in front of each block.
    """
    norms = {block.module: block.input_norm for block in blocks}
    by_layer: dict[int, dict[str, DecomposableTensor]] = {}
    for tensor in tensors:
        if tensor.layer is not None:
            by_layer.setdefault(tensor.layer, {})[tensor.role] = tensor
    stacks = []
    for layer, by_role in by_layer.items():
        for role, names in STACK_ROLES.items():
            if role in by_role or not all(name in by_role for name in names):
                continue
            members = tuple(by_role[name] for name in names)
            reads = _reads(model, members)
            if reads is not None:
                norm = norms.get(members[0].module.rpartition(".")[0], "") if reads == "input alone" else ""
                stacks.append(TensorStack(f"layers.{layer}.{role}", layer, role, members, norm))
    return tuple(stacks)


def _reads(model: nn.Module, members: Sequence[DecomposableTensor]) -> str | None:
    """`input alone` if the members are the only readers of their block's input; `same` if they read one tensor.

    None if they do not read the same tensor.
    """
    parents = {member.module.rpartition(".")[0] for member in members}
    if len(parents) > 1 or any(member.kind != "linear" for member in members):
        return None
    parent = model.get_submodule(parents.pop())
    names = [member.module.rpartition(".")[2] for member in members]
    seen, hidden, others = _run_with_readers(parent, names, members[0].in_features)
    if not all(len(tensors) == 1 and tensors[0] is seen[0][0] for tensors in seen):
        return None
    # A factor in front of the block changes the width of its input. The block must not notice.
    narrow, given, _ = _run_with_readers(parent, names, members[0].in_features // 2 + 1)
    is_alone = seen[0][0] is hidden and not any(tensor is hidden for tensor in others)
    is_narrow = all(len(tensors) == 1 and tensors[0] is given for tensors in narrow)
    return "input alone" if is_alone and is_narrow and not _READS_WIDTH.search(_source_of(parent)) else "same"


def _source_of(module: nn.Module) -> str:
    try:
        return inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return "hidden_states.size(-1)"  # unknown code may depend on the width


def _run_with_readers(
    parent: nn.Module, names: Sequence[str], width: int
) -> tuple[list[list[Tensor]], Tensor, list[Tensor]]:
    """Run a block on a random input of this width.

    Returns:
        The tensors that each named child received, the input, and those that other children with matrices received.
    """
    stubs = {
        name: _Reader(_out_features(child))
        for name, child in parent.named_children()
        if any(p.ndim >= 2 for p in child.parameters())
    }
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _PROBE_TOKENS, width, generator=generator)
    # Attention fails for lack of positions, but only after its first products, whose inputs are recorded by then.
    run_skeleton(skeleton_of(parent, stubs, generator), hidden)
    others = [tensor for name, stub in stubs.items() if name not in names for tensor in stub.seen]
    return [stubs[name].seen for name in names], hidden, others


def _out_features(module: nn.Module) -> int:
    return next(p.shape[0] for p in module.parameters() if p.ndim >= 2)


class _Reader(nn.Module):
    """Replaces a linear module: records its inputs and returns zeros of the right shape."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.seen: list[Tensor] = []

    def forward(self, value: Tensor) -> Tensor:
        self.seen.append(value)
        return value.new_zeros(*value.shape[:-1], self.out_features)


def skeleton_of(layer: nn.Module, stubs: Mapping[str, nn.Module], generator: torch.Generator) -> nn.Module:
    """A copy of a module on the CPU in which stubs replace the children that hold matrices; the rest gets random
    weights.

    Args:
        layer: The module, on any device, including meta; it is not changed.
        stubs: Child name to stub, for every child that holds matrices.
        generator: Generator of the random weights.
    """
    skeleton = copy.copy(layer)
    vars(skeleton).pop("forward", None)  # set by libraries that place layers on devices
    others = {name: child for name, child in layer.named_children() if name not in stubs}
    copies = {name: copy.deepcopy(child).to_empty(device="cpu").float().eval() for name, child in others.items()}
    skeleton._modules = {name: stubs.get(name) or copies.get(name) for name in layer._modules}
    skeleton._parameters = {
        name: None if p is None else nn.Parameter(torch.empty(p.shape), requires_grad=False)
        for name, p in layer._parameters.items()
    }
    skeleton.training = False
    with torch.no_grad():
        for parameter in skeleton.parameters():
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return skeleton


def run_skeleton(skeleton: nn.Module, hidden: Tensor) -> object | None:
    """The skeleton's output; None if it does not run with these stubs. The stubs need no mask, position or cache."""
    forward = type(skeleton).forward
    needed = [
        p.name
        for p in list(inspect.signature(forward).parameters.values())[2:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    try:
        with torch.no_grad():
            output: object = forward(skeleton, hidden, **dict.fromkeys(needed))
    except Exception:  # noqa: BLE001 - any error means that the layer does not accept blocks of this form
        return None
    return output

"""MLPs whose intermediate channels are independent of each other, verified by running the MLP without its matrices.

A channel can be dropped if its activation depends on its own rows of the input matrices alone. This is verified, not
looked up by family: the matrices are replaced by stubs that return random values, the values of half of the channels
are changed, and the other half of what the output matrix reads must stay the same bit for bit. A model that interleaves
gate and up, or normalises over channels, fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dse.model_parts import DecomposableTensor, Mlp
from dse.models.layer_skeleton import run_skeleton, skeleton_of
from dse.models.removed_modules import RemovedBlock

__all__ = ["find_mlps"]

_INPUT_ROLES = ("gate", "up", "gate_up", "intermediate")
_OUTPUT_ROLES = ("down", "output")
_RETURNED_ITEMS = (2, 1, 3)
_PROBE_TOKENS = 3


def find_mlps(model: nn.Module, tensors: Iterable[DecomposableTensor]) -> tuple[Mlp, ...]:
    """The MLPs of all layers whose width can be reduced, ordered by layer.

    Args:
        model: The model, on any device, including meta.
        tensors: The decomposable tensors inside its layers.
    """
    by_layer: dict[int, list[DecomposableTensor]] = {}
    for tensor in tensors:
        if tensor.layer is not None and tensor.role in (*_INPUT_ROLES, *_OUTPUT_ROLES):
            by_layer.setdefault(tensor.layer, []).append(tensor)
    mlps = []
    for layer, of_layer in by_layer.items():
        inputs = tuple(tensor for tensor in of_layer if tensor.role in _INPUT_ROLES)
        outputs = [tensor for tensor in of_layer if tensor.role in _OUTPUT_ROLES]
        if not inputs or len(outputs) != 1:
            continue
        mlp = Mlp(f"layers.{layer}.mlp", layer, inputs, outputs[0])
        if all(tensor.out_features % mlp.channels == 0 for tensor in inputs) and _has_independent_channels(model, mlp):
            mlps.append(mlp)
    return tuple(mlps)


def _has_independent_channels(model: nn.Module, mlp: Mlp) -> bool:
    parents = [tensor.module.split(".")[:-1] for tensor in mlp.tensors]
    common = itertools.takewhile(lambda steps: len(set(steps)) == 1, zip(*parents, strict=False))
    path = ".".join(steps[0] for steps in common)
    parent = model.get_submodule(path)
    names = {tensor.module.removeprefix(f"{path}."): tensor for tensor in mlp.tensors}
    generator = torch.Generator().manual_seed(0)
    values = {t.name: torch.randn(1, _PROBE_TOKENS, t.out_features, generator=generator) for t in mlp.inputs}
    changed = torch.rand(mlp.channels, generator=generator) < 0.5
    others = {
        name: value + changed.repeat(value.shape[-1] // mlp.channels) * torch.randn(value.shape, generator=generator)
        for name, value in values.items()
    }
    hidden = torch.randn(1, _PROBE_TOKENS, mlp.inputs[0].in_features, generator=generator)
    before, after = (_read_channels(parent, names, given, hidden) for given in (values, others))
    if before is None or after is None or before.shape[-1] != mlp.channels:
        return False
    is_same = (before == after).reshape(-1, mlp.channels).all(0)
    return bool(is_same[~changed].all()) and not bool(is_same[changed].all())


def _read_channels(
    parent: nn.Module, names: Mapping[str, DecomposableTensor], values: Mapping[str, Tensor], hidden: Tensor
) -> Tensor | None:
    """What the output matrix reads if the input matrices return `values`; None if the module does not run."""
    other_count = len(_other_children(parent, names))
    for forms in itertools.product(_RETURNED_ITEMS, repeat=other_count):
        reader = _Reader()
        stubs = {
            path: _Given(values[tensor.name]) if tensor.name in values else reader.of(tensor)
            for path, tensor in names.items()
        }
        removed = dict(zip(_other_children(parent, names), forms, strict=True))
        # A module may fail behind its output matrix, for lack of the residual that it adds.
        run_skeleton(_stubbed(parent, stubs, removed), hidden)
        if len(reader.seen) == 1:
            return reader.seen[0]
    return None


def _other_children(parent: nn.Module, names: Iterable[str]) -> Sequence[str]:
    """Children with matrices that hold none of the MLP's: attention, if the MLP lies directly in its layer."""
    heads = {name.partition(".")[0] for name in names}
    return [
        n for n, child in parent.named_children() if n not in heads and any(p.ndim >= 2 for p in child.parameters())
    ]


def _stubbed(parent: nn.Module, stubs: Mapping[str, nn.Module], removed: Mapping[str, int]) -> nn.Module:
    """A copy of the module with stubs for the MLP's matrices and removed blocks for other children with matrices."""
    replaced: dict[str, nn.Module] = {name: RemovedBlock(items) for name, items in removed.items()}
    for name, child in parent.named_children():
        inside = {path.removeprefix(f"{name}."): stub for path, stub in stubs.items() if path.startswith(f"{name}.")}
        if name in stubs:
            replaced[name] = stubs[name]
        elif inside:
            replaced[name] = _stubbed(child, inside, {})
    return skeleton_of(parent, replaced, torch.Generator().manual_seed(0))


class _Given(nn.Module):
    """Replaces an input matrix: returns given values."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _hidden: Tensor) -> Tensor:
        return self.value


class _Reader(nn.Module):
    """Replaces the output matrix: records what it reads and returns zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.out_features = 0

    def of(self, tensor: DecomposableTensor) -> _Reader:
        """Return zeros of this tensor's width."""
        self.out_features = tensor.out_features
        return self

    def forward(self, channels: Tensor) -> Tensor:
        self.seen.append(channels)
        return channels.new_zeros(*channels.shape[:-1], self.out_features)

"""How far points are from each other: by the parameters that they save, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from dse.cost import factor_parameters
from dse.design_point import DesignPoint
from dse.topology import RemovableBlock, Topology

__all__ = ["nearest_method", "saved_by_tensor", "saved_of"]


def saved_by_tensor(topology: Topology, point: DesignPoint) -> dict[str, float]:
    """Tensor name to the parameters that it does without; a stack's saving is shared out by its members' sizes."""
    saved: dict[str, float] = {}
    for name, choice in point:
        part = topology.part(name)
        share = 1.0 if isinstance(part, RemovableBlock) else 1.0 - factor_parameters(part, choice) / part.parameters
        saved |= {tensor: share * topology.decomposable(tensor).parameters for tensor in topology.tensors_of(name)}
    return saved


def saved_of(topology: Topology, saved: Mapping[str, float], names: Iterable[str]) -> float:
    """What the tensors of these parts save in sum, each counted once."""
    tensors = {tensor for name in names for tensor in topology.tensors_of(name)}
    return sum(saved.get(tensor, 0.0) for tensor in tensors)


def nearest_method(point: DesignPoint, methods: Sequence[str]) -> int:
    """Index of the method that decomposes most tensors of the point, among these; the first where none does."""
    counts = Counter(choice.method for _, choice in point if choice.method in methods)
    return methods.index(counts.most_common(1)[0][0]) if counts else 0

"""What the products of a model cost on this device, dense and decomposed, summed over what shares an input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dse.cost import has_core
from dse.design_point import DesignPoint, TensorChoice
from dse.measurement.device_profile.product_timings import ProductShape, ProductTimings
from dse.models import LoadedModel
from dse.runtime.matrices import modules_by_input
from dse.topology import Topology

__all__ = ["ModelProfile", "PassTime", "Phase", "SharedInput", "shared_inputs"]


@dataclass(frozen=True)
class Phase:
    """Work that a point is timed for.

    Attributes:
        name: `prefill` or `decode`.
        rows: Tokens that the matrices of the layers multiply at once.
        head_rows: Tokens that the output head multiplies: one for each sequence.
    """

    name: str
    rows: int
    head_rows: int

    @classmethod
    def of(cls, name: str, batch_size: int, prompt_tokens: int) -> Phase:
        """The phase of a generation."""
        return cls(name, batch_size * (prompt_tokens if name == "prefill" else 1), batch_size)


@dataclass(frozen=True)
class SharedInput:
    """Tensors that are given the very same input, and other matrices given it too.

    Attributes:
        tensors: Names of decomposable tensors.
        in_features: Size of the input.
        other_rows: Rows of matrices that no point decomposes, such as the output head.
        is_head: Whether the output head is among them.
    """

    tensors: tuple[str, ...]
    in_features: int
    other_rows: int = 0
    is_head: bool = False


def shared_inputs(loaded: LoadedModel) -> tuple[SharedInput, ...]:
    """The groups of a dense model, found by watching one pass."""
    device = next(loaded.model.parameters()).device
    names = {tensor.module: tensor.name for tensor in loaded.topology.tensors}
    head = loaded.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head_path = next((path for path, module in loaded.model.named_modules() if module is head), None)
    groups = []
    for group in modules_by_input(loaded.model, torch.ones(1, 2, dtype=torch.long, device=device)):
        known = tuple(names[matrix.path] for matrix in group if matrix.path in names)
        others = sum(matrix.chain[0].shape[0] for matrix in group if matrix.path not in names)
        is_head = any(matrix.path == head_path for matrix in group)
        groups.append(SharedInput(known, group[0].in_features, others, is_head))
    return tuple(groups)


@dataclass(frozen=True)
class PassTime:
    """A measured pass of the dense model, by what takes its time.

    Attributes:
        products_s: Of all products, timed one by one with cold weights.
        scale: 1, or less where the products would take longer alone than the whole pass did: they are scaled to it, so
            that no prediction falls below what is left of them.
        beside_a_block_s: What each block is taken to need beside its products: attention, norms and starting kernels,
            spread evenly over the blocks.
    """

    products_s: float
    scale: float
    beside_a_block_s: float


class ModelProfile:
    """Seconds of a model's products on one device, by point.

    Args:
        topology: Of the model.
        groups: Its matrices by shared input.
        timings: Of products; measured where they are missing.
    """

    def __init__(self, topology: Topology, groups: Sequence[SharedInput], timings: ProductTimings) -> None:
        self.topology = topology
        self.timings = timings
        self._groups = groups
        self._known_s: dict[tuple[str, TensorChoice | None, Phase], float] = {}
        self._group_of = {name: group for group in groups for name in group.tensors}

    def group_of(self, name: str) -> SharedInput | None:
        """The group of a part that a point may name; None for blocks, and for tensors that no pass reaches once."""
        return next((self._group_of.get(tensor) for tensor in self.topology.tensors_of(name)), None)

    def groups_of(self, tensors: Iterable[str]) -> list[SharedInput] | None:
        """The groups of these tensors, each once; None where one belongs to none."""
        found = [self._group_of.get(name) for name in tensors]
        return None if None in found else [group for group in dict.fromkeys(found) if group is not None]

    def shapes_of_groups(self, groups: Iterable[SharedInput], point: DesignPoint, phase: Phase) -> list[ProductShape]:
        """The products of these groups in one pass of a point."""
        parts = _parts_by_tensor(self.topology, point)
        return [shape for group in groups for shape in self._group_shapes(group, parts, phase)]

    def shapes(self, point: DesignPoint, phase: Phase) -> list[ProductShape]:
        """Every product of one pass, in its fast form."""
        return self.shapes_of_groups(self._groups, point, phase)

    def seconds(self, point: DesignPoint, phase: Phase) -> float:
        """Seconds of all products of one pass: what a device needs beside them is not in it."""
        return sum(self.timings.best_seconds(shape) for shape in self.shapes(point, phase))

    def predicted_seconds(self, point: DesignPoint, phase: Phase, dense_s: float) -> float:
        """Seconds of one pass of a point: the dense model's as measured, less what the point's products take less.

        A removed block takes its share of what the products do not explain with it (`PassTime`).
        """
        taken = self.pass_time(phase, dense_s)
        saved_s = taken.scale * (taken.products_s - self.seconds(point, phase))
        return dense_s - saved_s - sum(choice.is_removal for _, choice in point) * taken.beside_a_block_s

    def pass_time(self, phase: Phase, dense_s: float) -> PassTime:
        """What a pass of the dense model, which took so long, is made of."""
        products_s = self.seconds(DesignPoint.dense(), phase)
        scale = min(1.0, dense_s / products_s) if products_s > 0 else 1.0
        # One more share for what lies outside the layers: embedding, last norm, choice of the token.
        return PassTime(products_s, scale, (dense_s - scale * products_s) / (len(self.topology.blocks) + 1))

    def group_seconds(self, name: str, choice: TensorChoice | None, phase: Phase) -> float:
        """Seconds of all products that share the input of this part, which is decomposed so, or dense for None.

        What else shares the input is dense. The part's own time cannot be told apart: it is part of a larger product.
        """
        key = (name, choice, phase)
        if key not in self._known_s:
            self._known_s[key] = sum(map(self.timings.best_seconds, self.shapes_of(name, choice, phase)))
        return self._known_s[key]

    def is_faster(self, name: str, choice: TensorChoice, phase: Phase) -> bool:
        """Whether decomposing this part alone saves time; removed blocks do, and experts, not timed, are taken to."""
        if choice.is_removal or name in self.topology.experts_by_name:
            return True
        return self.group_seconds(name, choice, phase) < self.group_seconds(name, None, phase)

    def only_faster(self, point: DesignPoint, phases: Iterable[Phase]) -> DesignPoint:
        """The point without the choices that are not faster in all of these phases."""
        phases = tuple(phases)
        kept = {name: choice for name, choice in point if all(self.is_faster(name, choice, p) for p in phases)}
        return point if len(kept) == len(point) else DesignPoint.of(kept)

    def missing(self, shapes: Iterable[ProductShape]) -> list[ProductShape]:
        """Those of these shapes that are not timed yet, each once."""
        return [shape for shape in dict.fromkeys(shapes) if not self.timings.is_known(shape)]

    def shapes_of(self, name: str, choice: TensorChoice | None, phase: Phase) -> list[ProductShape]:
        """The products that `group_seconds` adds up."""
        group = self.group_of(name)
        parts = {} if choice is None else _parts_by_tensor(self.topology, DesignPoint.of({name: choice}))
        return [] if group is None else self._group_shapes(group, parts, phase)

    def _group_shapes(self, group: SharedInput, parts: Mapping[str, _Part], phase: Phase) -> list[ProductShape]:
        rows = phase.head_rows if group.is_head else phase.rows
        first = group.other_rows
        rest: list[ProductShape] = []
        seen: set[str] = set()
        for tensor in group.tensors:
            part = parts.get(tensor)
            if part is None:
                first += self.topology[tensor].out_features
            elif part.name not in seen and not part.choice.is_removal:
                rank = part.choice.rank
                first += rank
                if has_core(part.choice.method):
                    rest.append(ProductShape(rows, rank, rank))
                rest.append(ProductShape(rows, part.out_features, rank))
            if part is not None:
                seen.add(part.name)
        return [ProductShape(rows, first, group.in_features), *rest] if first else []


@dataclass(frozen=True)
class _Part:
    name: str
    choice: TensorChoice
    out_features: int


def _parts_by_tensor(topology: Topology, point: DesignPoint) -> dict[str, _Part]:
    parts = {}
    for name, choice in point:
        members = topology.tensors_of(name)
        matrices = [topology[member] for member in members if member in topology.by_name]  # experts are not timed
        part = _Part(name, choice, sum(matrix.out_features for matrix in matrices))
        parts.update(dict.fromkeys(members, part))
    return parts


def model_profile(loaded: LoadedModel, timings: ProductTimings) -> ModelProfile:
    """The profile of a loaded model, which must be dense."""
    return ModelProfile(loaded.topology, shared_inputs(loaded), timings)

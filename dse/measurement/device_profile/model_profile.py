"""Time of a model's matrix products on this device, dense and decomposed, and the latency predicted from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dse.cost import has_core, pivots_columns
from dse.design_point import DesignPoint, TensorChoice
from dse.measurement.device_profile.product_timings import ProductShape, ProductTimings
from dse.models import LoadedModel
from dse.topology import Topology

__all__ = ["ModelMatrix", "ModelProfile", "PassTime", "Phase", "model_matrices", "profile_model"]


@dataclass(frozen=True)
class Phase:
    """Work that a design point is timed for.

    Attributes:
        name: `prefill` or `decode`.
        rows: Tokens that the layers' matrices multiply at once.
        head_rows: Tokens that the output head multiplies: the last one of each sequence.
    """

    name: str
    rows: int
    head_rows: int

    @classmethod
    def of(cls, name: str, batch_size: int, prompt_tokens: int) -> Phase:
        """The prefill or decode phase of a generation."""
        return cls(name, batch_size * (prompt_tokens if name == "prefill" else 1), batch_size)


@dataclass(frozen=True)
class ModelMatrix:
    """A matrix that one forward pass of the dense model multiplies exactly once.

    Attributes:
        tensor: Name of the decomposable tensor; None if no design point can change the matrix.
        is_transposed: Whether it is stored as (in_features, out_features), as in GPT-2's `Conv1D`.
        is_head: Whether it is the output head.
    """

    tensor: str | None
    out_features: int
    in_features: int
    is_transposed: bool = False
    is_head: bool = False


@torch.inference_mode()
def model_matrices(loaded: LoadedModel) -> tuple[ModelMatrix, ...]:
    """The matrices of a dense model in the order they are multiplied, recorded during one forward pass.

    Recording works for any architecture. A module that is called more than once per pass is left out, and so are
    fused expert tensors.
    """
    model = loaded.model
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = {tensor.module: tensor.name for tensor in loaded.topology.tensors}
    modules = {path: module for path, module in model.named_modules() if _is_matrix(module)}
    calls: Counter[str] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda _module, _inputs, path=path: calls.update([path]))
        for path, module in modules.items()
    ]
    try:
        model(input_ids=torch.ones(1, 2, dtype=torch.long, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(
        _matrix_of(modules[path], names.get(path), is_head=modules[path] is head)
        for path, count in calls.items()
        if count == 1
    )


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_linear = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    return is_linear and isinstance(weight, Tensor) and weight.ndim == 2


def _matrix_of(module: nn.Module, name: str | None, *, is_head: bool) -> ModelMatrix:
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - narrows the type
    is_transposed = type(module).__name__ == "Conv1D"
    out_features, in_features = weight.shape[::-1] if is_transposed else weight.shape
    return ModelMatrix(name, out_features, in_features, is_transposed, is_head)


@dataclass(frozen=True)
class PassTime:
    """How the measured time of one dense forward pass splits up.

    Attributes:
        products_s: Sum over all products, each timed alone with cold weights.
        scale: 1, or less if the products take longer alone than the whole pass. They are then scaled down to the pass,
            so that no prediction falls below the time of the remaining products.
        beside_a_block_s: Time of a block besides its products (attention, norms, kernel launches), spread evenly over
            the blocks.
    """

    products_s: float
    scale: float
    beside_a_block_s: float


class ModelProfile:
    """Seconds of a model's products on one device, for any design point.

    Products are those that the unmodified modules run: one for a dense matrix, two for its factors, three with a core.
    Pivoted factors reorder inputs or outputs as well.
    The members of a stack share the product with the right factor (and the core). An MLP of reduced width runs smaller
    dense products.

    Args:
        topology: Topology of the model.
        matrices: Its matrices; see `model_matrices`.
        timings: Timings of products; missing ones are measured on demand.
    """

    def __init__(self, topology: Topology, matrices: Sequence[ModelMatrix], timings: ProductTimings) -> None:
        self.topology = topology
        self.timings = timings
        self._matrices = tuple(matrices)
        self._by_tensor = {matrix.tensor: matrix for matrix in matrices if matrix.tensor is not None}
        self._known_s: dict[tuple[str, TensorChoice | None, Phase], float] = {}

    def covers(self, tensors: Iterable[str]) -> bool:
        """Whether each of these tensors is a matrix that a forward pass multiplies exactly once."""
        return all(name in self._by_tensor for name in tensors)

    def shapes(self, point: DesignPoint, phase: Phase, tensors: Iterable[str] | None = None) -> list[ProductShape]:
        """The products of one forward pass.

        Args:
            point: The design point.
            phase: Prefill or decode.
            tensors: Only the products of these tensors; by default all products, those of undecomposable matrices
                included.
        """
        if tensors is None:
            matrices = self._matrices
        else:
            matrices = tuple(self._by_tensor[name] for name in tensors if name in self._by_tensor)
        choices = {tensor: (name, choice) for name, choice in point for tensor in self.topology.tensors_of(name)}
        found: list[ProductShape] = []
        seen: set[str] = set()
        for matrix in matrices:
            rows = phase.head_rows if matrix.is_head else phase.rows
            if matrix.tensor is None or matrix.tensor not in choices:
                found.append(ProductShape(rows, matrix.out_features, matrix.in_features, matrix.is_transposed))
                continue
            name, choice = choices[matrix.tensor]
            if choice.is_removal:
                continue
            if choice.is_width:
                found.append(self._narrow(matrix, name, choice.rank, rows))
                continue
            if choice.is_pivoted:
                found += self._pivoted(matrix, self.topology.matrix(name).role, choice.rank, rows)
                continue
            if name not in seen:  # once for all members of a stack
                seen.add(name)
                found.append(ProductShape(rows, choice.rank, matrix.in_features))
                if has_core(choice.method):
                    found.append(ProductShape(rows, choice.rank, choice.rank))
            found.append(ProductShape(rows, matrix.out_features, choice.rank))
        return found

    def _pivoted(self, matrix: ModelMatrix, role: str, rank: int, rows: int) -> list[ProductShape]:
        """The products of independent columns, or rows, and of their combinations."""
        if pivots_columns(role):
            width = matrix.in_features
            combined = ProductShape(rows, rank, width - rank, reordered=width)
            return [combined, ProductShape(rows, matrix.out_features, rank)]
        width = matrix.out_features
        combined = ProductShape(rows, width - rank, rank, reordered=width)
        return [ProductShape(rows, rank, matrix.in_features), combined]

    def _narrow(self, matrix: ModelMatrix, mlp: str, kept: int, rows: int) -> ProductShape:
        """The product of one matrix of an MLP that keeps some of its channels."""
        whole = self.topology.mlp(mlp)
        if matrix.tensor == whole.output.name:
            return ProductShape(rows, matrix.out_features, kept)
        return ProductShape(rows, matrix.out_features // whole.channels * kept, matrix.in_features)

    def seconds(self, point: DesignPoint, phase: Phase, tensors: Iterable[str] | None = None) -> float:
        """Seconds of all products of one forward pass, without attention, norms and kernel launches; see `shapes`."""
        return sum(map(self.timings.seconds, self.shapes(point, phase, tensors)))

    def part_shapes(self, name: str, choice: TensorChoice | None, phase: Phase) -> list[ProductShape]:
        """The products of one tensor, stack, MLP or block, changed by `choice`, or dense for None."""
        point = DesignPoint.dense() if choice is None else DesignPoint.of({name: choice})
        return self.shapes(point, phase, self.topology.tensors_of(name))

    def part_seconds(self, name: str, choice: TensorChoice | None, phase: Phase) -> float:
        """Seconds of the products of `part_shapes`."""
        key = (name, choice, phase)
        if key not in self._known_s:
            self._known_s[key] = sum(map(self.timings.seconds, self.part_shapes(name, choice, phase)))
        return self._known_s[key]

    def is_faster(self, name: str, choice: TensorChoice, phase: Phase) -> bool:
        """Whether this decomposition alone saves time. Removed blocks do; experts are not timed and count as faster."""
        if choice.is_removal or name in self.topology.experts_by_name:
            return True
        return self.part_seconds(name, choice, phase) < self.part_seconds(name, None, phase)

    def only_faster(self, point: DesignPoint, phases: Iterable[Phase]) -> DesignPoint:
        """The point without the choices that are not faster than dense in all of these phases."""
        phases = tuple(phases)
        kept = {name: choice for name, choice in point if all(self.is_faster(name, choice, p) for p in phases)}
        return point if len(kept) == len(point) else DesignPoint.of(kept)

    def predicted_seconds(self, point: DesignPoint, phase: Phase, dense_s: float) -> float:
        """Predicted seconds of one forward pass: the dense model's measured time minus what the products save.

        A removed block also saves its share of the time that the products do not explain (`PassTime`).

        Args:
            point: The design point.
            phase: Prefill or decode.
            dense_s: Measured seconds of one pass of the dense model.
        """
        split = self.pass_time(phase, dense_s)
        saved_s = split.scale * (split.products_s - self.seconds(point, phase))
        return dense_s - saved_s - sum(choice.is_removal for _, choice in point) * split.beside_a_block_s

    def pass_time(self, phase: Phase, dense_s: float) -> PassTime:
        """Split the measured `dense_s` of one dense pass into products and the rest."""
        products_s = self.seconds(DesignPoint.dense(), phase)
        scale = min(1.0, dense_s / products_s) if products_s > 0 else 1.0
        # One more share for the work outside the blocks: embedding, last norm, choice of the next token.
        return PassTime(products_s, scale, (dense_s - scale * products_s) / (len(self.topology.blocks) + 1))

    def missing(self, shapes: Iterable[ProductShape]) -> list[ProductShape]:
        """The shapes without a timing, each once."""
        return [shape for shape in dict.fromkeys(shapes) if not self.timings.has_timing(shape)]


def profile_model(loaded: LoadedModel, timings: ProductTimings) -> ModelProfile:
    """The profile of a loaded model, which must be dense."""
    return ModelProfile(loaded.topology, model_matrices(loaded), timings)

"""The topology of a model: its parts by name, layer and role, and the sizes that costs are computed from (no torch).

`dse.models` builds a `Topology` from a Hugging Face model; `dse.cost`, the search spaces and surgery read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from dse.errors import PointError, did_you_mean
from dse.expert_tensor import ExpertTensor
from dse.model_parts import Decomposable, DecomposableTensor, Matrix, Mlp, RemovableBlock, TensorStack

__all__ = ["ATTENTION_ROLES", "Topology"]

ATTENTION_ROLES = ("query", "key", "value", "query_key_value", "attention_output")
"""Roles of the tensors in an attention block; all other roles in a layer belong to its MLP."""

_BLOCK_ROLES = ("attention", "mlp")


@dataclass(frozen=True)
class Topology:
    """The decomposable parts of a model and the sizes that the cost arithmetic needs.

    Attributes:
        architecture: Hugging Face class name, for example `LlamaForCausalLM`.
        model_type: Hugging Face model type, for example `llama`.
        layer_count: Number of repeated blocks.
        tensors: Decomposable tensors, ordered by layer, then by forward pass.
        parameters_dense: All parameters of the model; tied parameters count once.
        buffers_bytes: Bytes of persistent buffers.
        bytes_per_parameter: Bytes per weight in the dtype of the model (4 for float32).
        head_parameters: Entries of the output head's matrix (0 without a head); a tied head counts too.
        attention_width: Sum over query heads of the head size, per layer (for attention FLOPs).
        key_value_width: Sum over key/value heads of the head size, per layer (for KV-cache bytes).
        is_decoder: Whether the model generates tokens left to right.
        other_matmul_parameters: Entries of the matrices that multiply every token but are not decomposable.
        unmapped: Paths of linear modules inside the layers that have no role; they stay dense.
        blocks: Blocks that can be removed, ordered by layer, attention before MLP.
        stacks: Tensors of a layer that can be decomposed as one matrix, ordered by layer.
        blocks_refused: Name of a block that cannot be removed -> reason.
        experts: Fused tensors of routed experts that can be decomposed, ordered by layer; `other_matmul_parameters`
            includes their entries per token.
        experts_refused: Name of a fused expert tensor that cannot be decomposed -> reason.
        mlps: MLPs whose width can be reduced, ordered by layer.
    """

    architecture: str
    model_type: str
    layer_count: int
    tensors: tuple[DecomposableTensor, ...]
    parameters_dense: int
    buffers_bytes: int = 0
    bytes_per_parameter: float = 4.0
    head_parameters: int = 0
    attention_width: int = 0
    key_value_width: int = 0
    is_decoder: bool = True
    other_matmul_parameters: int = 0
    unmapped: tuple[str, ...] = field(default=())
    blocks: tuple[RemovableBlock, ...] = field(default=())
    blocks_refused: Mapping[str, str] = field(default_factory=dict)
    stacks: tuple[TensorStack, ...] = field(default=())
    experts: tuple[ExpertTensor, ...] = field(default=())
    experts_refused: Mapping[str, str] = field(default_factory=dict)
    mlps: tuple[Mlp, ...] = field(default=())

    @cached_property
    def blocks_by_name(self) -> Mapping[str, RemovableBlock]:
        """Canonical name to removable block."""
        return {block.name: block for block in self.blocks}

    @cached_property
    def stacks_by_name(self) -> Mapping[str, TensorStack]:
        """Canonical name to stack."""
        return {stack.name: stack for stack in self.stacks}

    @cached_property
    def mlps_by_name(self) -> Mapping[str, Mlp]:
        """Canonical name to MLP whose width can be reduced."""
        return {mlp.name: mlp for mlp in self.mlps}

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Tensors in topology order, each stack before its first member."""
        first = {stack.members[0].name: stack for stack in self.stacks}
        return tuple(m for t in self.tensors for m in ((first[t.name], t) if t.name in first else (t,)))

    @cached_property
    def experts_by_name(self) -> Mapping[str, ExpertTensor]:
        """Canonical name to fused expert tensor."""
        return {tensor.name: tensor for tensor in self.experts}

    def matrix(self, name: str) -> Matrix:
        """The tensor or stack called `name`.

        Raises:
            PointError: No matrix has that name.
        """
        if name in self.experts_by_name:
            raise PointError(
                f"a matrix must be named here, but '{name}' is a fused expert tensor of shape"
                f" {' x '.join(map(str, self.experts_by_name[name].shape))}; only method 'tucker' can decompose it"
            )
        return self.stacks_by_name[name] if name in self.stacks_by_name else self[name]

    def decomposable(self, name: str) -> Decomposable:
        """The tensor, stack or fused expert tensor called `name`.

        Raises:
            PointError: No decomposable part has that name, or the experts cannot be decomposed (with the reason).
        """
        if name in self.experts_refused:
            raise PointError(
                f"'{name}' must be a fused expert tensor that dse can decompose, but {self.experts_refused[name]};"
                " remove it from the point"
            )
        return self.experts_by_name[name] if name in self.experts_by_name else self.matrix(name)

    def mlp(self, name: str) -> Mlp:
        """The MLP called `name`, whose width can be reduced.

        Raises:
            PointError: No such MLP has that name.
        """
        if name in self.mlps_by_name:
            return self.mlps_by_name[name]
        known = ", ".join(list(self.mlps_by_name)[:3])
        raise PointError(
            f"method 'width' reduces the channels of an MLP, but '{name}' is none of this model's"
            f" {len(self.mlps)} MLPs with independent channels{f' ({known}, ...)' if known else ''}"
        )

    def part(self, name: str) -> Decomposable | RemovableBlock | Mlp:
        """The part called `name`: a tensor, a stack, a fused expert tensor, a removable block or an MLP.

        A removable MLP block may also be an MLP whose width can be reduced; then this returns the block.

        Raises:
            PointError: No part has that name, or the block cannot be removed (with the reason).
        """
        if name in self.blocks_by_name:
            return self.blocks_by_name[name]
        if name in self.mlps_by_name:
            return self.mlps_by_name[name]
        if name in self.blocks_refused:
            raise PointError(
                f"'{name}' must be a block that the model can skip exactly, but {self.blocks_refused[name]}"
            )
        return self.decomposable(name)

    def tensors_of(self, name: str) -> tuple[str, ...]:
        """Names of the tensors of a part: the tensor itself, the members of a stack, or the tensors inside a block."""
        part = self.part(name)
        if isinstance(part, RemovableBlock):
            return (*part.tensors, *part.experts)
        if isinstance(part, Mlp):
            return tuple(tensor.name for tensor in part.tensors)
        return tuple(member.name for member in part.members) if isinstance(part, TensorStack) else (part.name,)

    def passed_layers(self, removed: Iterable[str]) -> tuple[int, ...]:
        """Layers whose attention and MLP are both among the removed blocks, so that the whole layer is bypassed."""
        layers = [self.blocks_by_name[name].layer for name in removed]
        return tuple(sorted({layer for layer in layers if layers.count(layer) == len(_BLOCK_ROLES)}))

    @cached_property
    def by_name(self) -> Mapping[str, DecomposableTensor]:
        """Canonical name to tensor."""
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """Roles inside the layers, in order of first appearance."""
        return tuple(dict.fromkeys(tensor.role for tensor in self.tensors if tensor.layer is not None))

    @cached_property
    def part_roles(self) -> tuple[str, ...]:
        """Roles of all parts inside the layers: tensors, stacks, fused experts and removable blocks."""
        parts: tuple[Decomposable | RemovableBlock | Mlp, ...] = (
            *self.stacks,
            *self.experts,
            *self.blocks,
            *self.mlps,
        )
        more = [part.role for part in parts]
        return tuple(dict.fromkeys((*self.roles, *more)))

    def __getitem__(self, name: str) -> DecomposableTensor:
        """Return the tensor called `name`.

        Raises:
            PointError: No tensor has that name.
        """
        try:
            return self.by_name[name]
        except KeyError:
            raise PointError(
                f"a tensor must be one of the model's {len(self.tensors)} decomposable tensors, but got '{name}'"
                f"{did_you_mean(name, self.by_name) or '; see `dse space` for their names'}"
            ) from None

    def select(self, layers: Iterable[int] | str = "all", roles: Iterable[str] | str = "all") -> tuple[str, ...]:
        """Names of the parts in these layers with these roles: tensors first, then stacks, fused experts and blocks.

        Args:
            layers: 0-based layer indices, or "all".
            roles: Role names, or "all" for every single tensor inside the layers. Stacks, fused experts and the
                removable blocks `attention` and `mlp` must be named explicitly.

        Raises:
            PointError: A layer or role does not exist in this model.
        """
        wanted_layers = set(range(self.layer_count)) if isinstance(layers, str) else set(layers)
        wanted_roles = set(self.roles) if isinstance(roles, str) else set(roles)
        if isinstance(layers, str) and layers != "all":
            raise PointError(f"`layers` must be 'all' or a list of layer indices, but got '{layers}'")
        if isinstance(roles, str) and roles != "all":
            raise PointError(f"`roles` must be 'all' or a list of roles, but got '{roles}'; write [{roles}]")
        for layer in sorted(wanted_layers):
            if not 0 <= layer < self.layer_count:
                raise PointError(
                    f"`0 <= layer < {self.layer_count}` must hold for {self.architecture}, but got layer={layer}"
                )
        for role in sorted(wanted_roles - set(self.part_roles)):
            self._refuse_role_with_reason(role)
            raise PointError(
                f"a role must be one of {', '.join(self.part_roles)} for {self.architecture}, but got '{role}'"
                f"{did_you_mean(role, self.part_roles)}"
            )
        parts: tuple[Decomposable | RemovableBlock | Mlp, ...] = (
            *self.tensors,
            *self.stacks,
            *self.experts,
            *self.blocks,
            *self.mlps,
        )
        names = (p.name for p in parts if p.layer in wanted_layers and p.role in wanted_roles)
        return tuple(dict.fromkeys(names))

    def _refuse_role_with_reason(self, role: str) -> None:
        """Raise the recorded reason if parts of this role exist but cannot be used."""
        for name in (*self.blocks_refused, *self.experts_refused):
            if name.endswith(f".{role}"):
                self.part(name)

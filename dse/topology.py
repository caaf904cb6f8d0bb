"""What a model is made of, as far as decomposition is concerned: values only, no torch.

`dse.models` builds a `Topology` from a Hugging Face model; `dse.cost`, search spaces and surgery read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from dse.errors import PointError, did_you_mean

__all__ = ["ATTENTION_ROLES", "DecomposableTensor", "Matrix", "RemovableBlock", "TensorStack", "Topology"]

ATTENTION_ROLES = ("query", "key", "value", "query_key_value", "attention_output")
"""Roles of an attention block's tensors; every other role in a layer belongs to its MLP."""

_BLOCK_ROLES = ("attention", "mlp")


@dataclass(frozen=True)
class DecomposableTensor:
    """One weight matrix that may be replaced by low-rank factors.

    Attributes:
        name: Canonical name, `layers.<layer>.<role>`, or `<role>` where the tensor lies outside the layers.
        module: Path of its module in the Hugging Face model, for example `model.layers.3.self_attn.q_proj`.
        layer: 0-based index of the layer; None outside the layers.
        role: What the tensor does: query, key, value, attention_output, gate, up, down, ...
        out_features: Rows of the weight as (out_features, in_features).
        in_features: Columns of the weight as (out_features, in_features).
        has_bias: Whether its module adds a bias (kept as it is by every decomposition).
        kind: `linear` (weight stored (out, in)) or `conv1d` (GPT-2's, weight stored (in, out)).
    """

    name: str
    module: str
    layer: int | None
    role: str
    out_features: int
    in_features: int
    has_bias: bool = False
    kind: str = "linear"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.out_features, self.in_features)

    @property
    def parameters(self) -> int:
        """Entries of the weight, without bias."""
        return self.out_features * self.in_features

    @property
    def modules(self) -> tuple[str, ...]:
        """Path of its one module, in the form in which a stack lists several."""
        return (self.module,)


@dataclass(frozen=True)
class TensorStack:
    """Tensors of a layer that read the same input, decomposed as one matrix with their rows stacked.

    One right factor (rank x in_features) serves all of them, and is multiplied with the input once; the left factor of
    a member is its slice of rows. A model whose projections are fused has the same thing as a tensor, by the same name.
    That the members read the very same input was verified when the topology was made (`dse.models.stacks`).

    Attributes:
        name: Canonical name, `layers.<layer>.query_key_value` or `layers.<layer>.gate_up`.
        layer: 0-based index of the layer.
        role: `query_key_value` or `gate_up`.
        members: Its tensors, in the order in which their rows are stacked.
    """

    name: str
    layer: int
    role: str
    members: tuple[DecomposableTensor, ...]

    @property
    def out_features(self) -> int:
        """Rows of all members."""
        return sum(member.out_features for member in self.members)

    @property
    def in_features(self) -> int:
        """Columns, the same for all members."""
        return self.members[0].in_features

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the stacked matrix."""
        return (self.out_features, self.in_features)

    @property
    def parameters(self) -> int:
        """Entries of the members' weights, without biases."""
        return self.out_features * self.in_features

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the members' modules; each reads the same input."""
        return tuple(member.module for member in self.members)

    @property
    def rows(self) -> tuple[slice, ...]:
        """Rows of each member in the stacked matrix."""
        ends = [sum(member.out_features for member in self.members[: i + 1]) for i in range(len(self.members))]
        return tuple(slice(end - member.out_features, end) for end, member in zip(ends, self.members, strict=True))


Matrix = DecomposableTensor | TensorStack
"""What a method can decompose: one tensor or a stack; either has a name, layer, role, shape and parameters."""


@dataclass(frozen=True)
class RemovableBlock:
    """An attention or MLP block that the residual stream can pass by: a point removes it as a whole, at rank 0.

    That the layer without it computes exactly what it would compute if the block gave zeros was verified when the
    topology was made (`dse.models.blocks`).

    Attributes:
        name: Canonical name, `layers.<layer>.attention` or `layers.<layer>.mlp`.
        module: Path of its module in the Hugging Face model, for example `model.layers.3.self_attn`.
        layer: 0-based index of the layer.
        role: `attention` or `mlp`.
        layer_module: Path of the layer, for example `model.layers.3`.
        tensors: Names of the decomposable tensors inside, which go with it.
        norms: Paths of the norms in front of it and behind it that nothing else reads; they go with it.
        parameters: All parameters that go with it: matrices, biases, norms.
        matmul_parameters: Entries of its matrices that multiply one token (of routed experts only those chosen).
        buffers_bytes: Bytes of its persistent buffers.
        returned_items: What its module returns: 1 for a tensor, n for a tuple of n whose first is the output.
        rest_parameters: Parameters of the layer outside its removable blocks (a norm that both read, for example);
            they go when the layer's attention and MLP are both removed and the whole layer is passed by.
        layer_returned_items: What the layer returns, as `returned_items`.
        attention_width: Sum over query heads of the head size; 0 for an MLP.
        key_value_width: Sum over key/value heads of the head size; 0 for an MLP.
        cache_module: Path of the module that holds the index into the KV cache; "" for an MLP and in encoders.
        cache_kind: Kind of its KV cache (`full_attention`, `sliding_attention`); caches are laid out by kind.
    """

    name: str
    module: str
    layer: int
    role: str
    layer_module: str
    tensors: tuple[str, ...]
    norms: tuple[str, ...]
    parameters: int
    matmul_parameters: int
    buffers_bytes: int = 0
    returned_items: int = 1
    rest_parameters: int = 0
    layer_returned_items: int = 1
    attention_width: int = 0
    key_value_width: int = 0
    cache_module: str = ""
    cache_kind: str = ""


@dataclass(frozen=True)
class Topology:
    """The decomposable tensors of a model and the sizes that cost arithmetic needs.

    Attributes:
        architecture: Hugging Face class name, for example `LlamaForCausalLM`.
        model_type: Hugging Face model type, for example `llama`.
        layer_count: Number of repeated blocks.
        tensors: Decomposable tensors in order of layers, then of the forward pass.
        parameters_dense: All parameters of the model, shared (tied) ones counted once.
        buffers_bytes: Bytes of persistent buffers.
        bytes_per_parameter: Of the dtype the weights are held in (4 for float32).
        head_parameters: Entries of the output head's matrix (0 without one); tied heads still multiply.
        attention_width: Sum over query heads of the head size, per layer (for attention FLOPs).
        key_value_width: Sum over key/value heads of the head size, per layer (for KV-cache bytes).
        is_decoder: Whether the model generates tokens left to right.
        other_matmul_parameters: Entries of matrices that multiply every token but are not decomposable.
        unmapped: Paths of linear modules inside the layers that no role names; they are left alone.
        blocks: Blocks that may be removed, in order of layers, attention before MLP; empty where the residual stream
            cannot pass them by.
        stacks: Tensors of a layer that may be decomposed as one matrix, in order of layers.
        blocks_refused: Why a block that one would expect may not be removed, by its name.
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

    @cached_property
    def blocks_by_name(self) -> Mapping[str, RemovableBlock]:
        """Canonical name to removable block."""
        return {block.name: block for block in self.blocks}

    @cached_property
    def stacks_by_name(self) -> Mapping[str, TensorStack]:
        """Canonical name to stack."""
        return {stack.name: stack for stack in self.stacks}

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Tensors in topology order, each stack before the first of its members."""
        first = {stack.members[0].name: stack for stack in self.stacks}
        return tuple(m for t in self.tensors for m in ((first[t.name], t) if t.name in first else (t,)))

    def matrix(self, name: str) -> Matrix:
        """The tensor or stack called `name`.

        Raises:
            PointError: Nothing that can be decomposed has that name.
        """
        return self.stacks_by_name[name] if name in self.stacks_by_name else self[name]

    def part(self, name: str) -> Matrix | RemovableBlock:
        """Whatever a point may name: a tensor, a stack or a removable block.

        Raises:
            PointError: Nothing has that name, or the block cannot be removed (with the reason).
        """
        if name in self.blocks_by_name:
            return self.blocks_by_name[name]
        if name in self.blocks_refused:
            raise PointError(f"'{name}' must be passed by exactly to be removed, but {self.blocks_refused[name]}")
        return self.matrix(name)

    def tensors_of(self, name: str) -> tuple[str, ...]:
        """Names of the tensors that a part of this name takes up: itself, its members, or those inside the block."""
        part = self.part(name)
        if isinstance(part, RemovableBlock):
            return part.tensors
        return tuple(member.name for member in part.members) if isinstance(part, TensorStack) else (part.name,)

    def passed_layers(self, removed: Iterable[str]) -> tuple[int, ...]:
        """Layers of which the attention and the MLP are both among these removed blocks: nothing of them is left."""
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
        """Roles of everything inside the layers that a point may name: tensors, then stacks, then removable blocks."""
        more = (*(stack.role for stack in self.stacks), *(block.role for block in self.blocks))
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
        """Names of the parts in these layers with these roles: tensors in topology order, then stacks, then blocks.

        Args:
            layers: 0-based layer indices, or "all".
            roles: Role names, or "all" (every tensor inside the layers); stacks and the removable blocks `attention`
                and `mlp` only where they are named.

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
            self._refuse_block_role(role)
            raise PointError(
                f"a role must be one of {', '.join(self.part_roles)} for {self.architecture}, but got '{role}'"
                f"{did_you_mean(role, self.part_roles)}"
            )
        parts: tuple[Matrix | RemovableBlock, ...] = (*self.tensors, *self.stacks, *self.blocks)
        return tuple(p.name for p in parts if p.layer in wanted_layers and p.role in wanted_roles)

    def _refuse_block_role(self, role: str) -> None:
        for name, reason in self.blocks_refused.items():
            if name.endswith(f".{role}"):
                raise PointError(f"'{name}' must be passed by exactly to be removed, but {reason}")

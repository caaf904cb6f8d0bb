"""The parts of a model that can be decomposed or removed, and their sizes (no torch).

`dse.models` builds a `Topology` from a Hugging Face model; `dse.cost`, the search spaces and surgery read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from dse.errors import PointError, did_you_mean
from dse.expert_tensor import ExpertTensor

__all__ = [
    "ATTENTION_ROLES",
    "Decomposable",
    "DecomposableTensor",
    "Matrix",
    "Mlp",
    "RemovableBlock",
    "TensorStack",
    "Topology",
]

ATTENTION_ROLES = ("query", "key", "value", "query_key_value", "attention_output")
"""Roles of the tensors in an attention block; all other roles in a layer belong to its MLP."""

_BLOCK_ROLES = ("attention", "mlp")


@dataclass(frozen=True)
class DecomposableTensor:
    """One weight matrix that may be replaced by low-rank factors.

    Attributes:
        name: Canonical name, `layers.<layer>.<role>`, or `<role>` for a tensor outside the layers.
        module: Path of its module in the Hugging Face model, for example `model.layers.3.self_attn.q_proj`.
        layer: 0-based index of the layer; None for a tensor outside the layers.
        role: The function of the tensor: query, key, value, attention_output, gate, up, down, ...
        out_features: Rows of the weight as (out_features, in_features).
        in_features: Columns of the weight as (out_features, in_features).
        has_bias: Whether its module has a bias; every decomposition keeps the bias unchanged.
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
        """Entries of the weight, without the bias."""
        return self.out_features * self.in_features

    @property
    def modules(self) -> tuple[str, ...]:
        """Path of its module, as a tuple for uniformity with stacks."""
        return (self.module,)


@dataclass(frozen=True)
class TensorStack:
    """Tensors of a layer that read the same input, stacked row-wise and decomposed as one matrix.

    The members share one right factor (rank x in_features), which is applied to the input once. The left factor of a
    member is its slice of rows. In a model with fused projections, the fused tensor has the same name as the stack.
    `dse.models.layer_skeleton` verifies that the members read the same input when it builds the topology.

    Attributes:
        name: Canonical name, `layers.<layer>.query_key_value` or `layers.<layer>.gate_up`.
        layer: 0-based index of the layer.
        role: `query_key_value` or `gate_up`.
        members: Its tensors, in stacking order.
        norm: Path of the norm whose output only the members read; "" if there is none. The shared right factor can then
            be applied together with the norm.
    """

    name: str
    layer: int
    role: str
    members: tuple[DecomposableTensor, ...]
    norm: str = ""

    @property
    def out_features(self) -> int:
        """Rows of all members."""
        return sum(member.out_features for member in self.members)

    @property
    def in_features(self) -> int:
        """Columns, equal for all members."""
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
"""A part that every method can decompose: one tensor or a stack."""

Decomposable = Matrix | ExpertTensor
"""A part that at least one method can decompose: a matrix, or the fused weight of all experts of a layer."""


@dataclass(frozen=True)
class RemovableBlock:
    """An attention or MLP block that a point can remove, so that the residual stream bypasses it.

    When it builds the topology, `dse.models.removable_blocks` verifies that the layer without the block computes the
    same output as with a block that returns zeros.

    Attributes:
        name: Canonical name, `layers.<layer>.attention` or `layers.<layer>.mlp`.
        module: Path of its module in the Hugging Face model, for example `model.layers.3.self_attn`.
        layer: 0-based index of the layer.
        role: `attention` or `mlp`.
        layer_module: Path of the layer, for example `model.layers.3`.
        tensors: Names of the decomposable tensors inside, which are removed with it.
        norms: Paths of the norms before and after it that nothing else uses; they are removed with it.
        parameters: All parameters removed with it: matrices, biases, norms.
        matmul_parameters: Entries of its matrices that multiply one token (of routed experts, the chosen ones only).
        buffers_bytes: Bytes of its persistent buffers.
        returned_items: Number of values its module returns: 1 for a tensor, n for a tuple that starts with the output.
        rest_parameters: Parameters of the layer outside its removable blocks (a norm shared by both, for example); they
            are removed when the layer's attention and MLP are both removed and the whole layer is bypassed.
        layer_returned_items: Number of values the layer returns, counted as in `returned_items`.
        attention_width: Sum over query heads of the head size; 0 for an MLP.
        key_value_width: Sum over key/value heads of the head size; 0 for an MLP.
        cache_module: Path of the module that holds the KV-cache index; "" for an MLP and in encoders.
        cache_kind: Kind of its KV cache (`full_attention`, `sliding_attention`); the cache is laid out by kind.
        experts: Names of the fused expert tensors inside, which are removed with it.
        input_norm: Path of the norm whose output the block reads, if only the block reads it; "" otherwise.
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
    experts: tuple[str, ...] = ()
    input_norm: str = ""


@dataclass(frozen=True)
class Mlp:
    """An MLP whose intermediate channels can be dropped one by one, so that its matrices get smaller.

    Each channel of the intermediate activations depends on its own rows of the input matrices alone, and meets its own
    column of the output matrix. `dse.models.mlp_channels` verifies this when it builds the topology.

    Attributes:
        name: Canonical name, `layers.<layer>.mlp`.
        layer: 0-based index of the layer.
        inputs: Tensors whose rows produce the channels: gate and up, the fused gate_up, or the intermediate matrix.
        output: Tensor whose columns read the channels: down, or an encoder's output matrix.
    """

    name: str
    layer: int
    inputs: tuple[DecomposableTensor, ...]
    output: DecomposableTensor
    role: str = "mlp"

    @property
    def channels(self) -> int:
        """Intermediate channels of the dense MLP."""
        return self.output.in_features

    @property
    def tensors(self) -> tuple[DecomposableTensor, ...]:
        """All its matrices, the output last."""
        return (*self.inputs, self.output)

    @property
    def shape(self) -> tuple[int, int]:
        """(channels, in_features): the shape of the matrix that produces the channels."""
        return (self.channels, self.inputs[0].in_features)

    @property
    def entries_per_channel(self) -> int:
        """Matrix entries that go with one channel."""
        return sum(tensor.parameters for tensor in self.tensors) // self.channels

    @property
    def parameters_per_channel(self) -> int:
        """Parameters that go with one channel: matrix entries and the biases of its rows."""
        biases = sum(tensor.out_features for tensor in self.inputs if tensor.has_bias)
        return self.entries_per_channel + biases // self.channels

    @property
    def parameters(self) -> int:
        """Parameters of all channels; the bias of the output is not among them."""
        return self.parameters_per_channel * self.channels


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

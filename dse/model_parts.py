"""The parts of a model that can be decomposed, narrowed or removed, and their sizes (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from dse.expert_tensor import ExpertTensor

__all__ = ["Decomposable", "DecomposableTensor", "Matrix", "Mlp", "RemovableBlock", "TensorStack"]


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

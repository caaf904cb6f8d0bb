"""What a model is made of, as far as decomposition is concerned: values only, no torch.

`dse.models` builds a `Topology` from a Hugging Face model; `dse.cost`, search spaces and surgery read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from dse.errors import PointError, did_you_mean

__all__ = ["DecomposableTensor", "Topology"]


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

    @cached_property
    def by_name(self) -> Mapping[str, DecomposableTensor]:
        """Canonical name to tensor."""
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """Roles inside the layers, in order of first appearance."""
        return tuple(dict.fromkeys(tensor.role for tensor in self.tensors if tensor.layer is not None))

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
        """Names of the tensors in these layers with these roles, in topology order.

        Args:
            layers: 0-based layer indices, or "all".
            roles: Role names, or "all" (those inside the layers).

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
        for role in sorted(wanted_roles - set(self.roles)):
            raise PointError(
                f"a role must be one of {', '.join(self.roles)} for {self.architecture}, but got '{role}'"
                f"{did_you_mean(role, self.roles)}"
            )
        return tuple(t.name for t in self.tensors if t.layer in wanted_layers and t.role in wanted_roles)

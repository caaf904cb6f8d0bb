"""The dense form of an export: factors multiplied out, for runtimes without low-rank layers.

The architecture has one width for all its MLPs. If a point reduces every one of them, the form has the largest width
that is left, and narrower MLPs are filled up with zeros; otherwise all of them are filled up to the dense width. A
channel with zeros in the output matrix contributes nothing.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from dse.decomposition import TuckerExperts
from dse.decomposition.factors import applied_factors, expert_factors_of
from dse.design_point import DesignPoint
from dse.export.weights import MAX_SHARD_SIZE
from dse.model_parts import Mlp
from dse.topology import Topology

__all__ = ["dense_form_parameters", "dense_form_width", "merged_state", "write_dense_form"]

_WIDTH_SETTINGS = ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim")
"""Names that configs give to the number of channels of an MLP; GPT-2's may be None, for four times the hidden size."""


def dense_form_width(config: PreTrainedConfig, topology: Topology, point: DesignPoint) -> int | None:
    """Channels of every MLP in the dense form of a point; None for those of the dense model."""
    if not point.widths or {*point.widths, *point.removed} < {mlp.name for mlp in topology.mlps}:
        return None
    setting = _width_setting(config)
    is_setting = all(getattr(config, setting, 0) in (mlp.channels, None) for mlp in topology.mlps)
    return max(point.widths.values()) if is_setting and len(topology.mlps) == topology.layer_count else None


def dense_form_parameters(config: PreTrainedConfig, topology: Topology, point: DesignPoint) -> int:
    """Parameters of the dense form of a point."""
    width = dense_form_width(config, topology, point)
    saved = 0 if width is None else sum(m.parameters_per_channel * (m.channels - width) for m in topology.mlps)
    return topology.parameters_dense - saved


def _width_setting(config: PreTrainedConfig) -> str:
    """The name of the setting; "" if the config has none."""
    return next((name for name in _WIDTH_SETTINGS if hasattr(config, name)), "")


def merged_state(model: PreTrainedModel, topology: Topology, point: DesignPoint) -> dict[str, Tensor]:
    """The weights of `model` by name, with the low-rank modules of `point` multiplied out, and MLPs of one width.

    The architecture has a place for every block, so removed blocks are filled with zeros. They then return zero, which
    is bit for bit the same as no block.

    Args:
        model: The model with the low-rank modules of the point; it is not changed.
        topology: Its topology.
        point: The applied point.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    width = dense_form_width(model.config, topology, point)
    for name in point.widths:
        state |= _filled_up(state, topology.mlp(name), width)
    for name, _ in point.decomposed:
        if name in topology.experts_by_name:
            continue
        factors = applied_factors(model, topology, name)
        for member in topology.tensors_of(name):
            tensor = topology[member]
            path, own = tensor.module, factors[tensor.module]
            for part in ("left", "right", "core", "owned.right", "owned.core", "pivots", "combinations"):
                state.pop(f"{path}.{part}.weight", None)
            for bias in ("left.bias", "pivots.bias", "row_bias"):
                if f"{path}.{bias}" in state:
                    state[f"{path}.bias"] = state.pop(f"{path}.{bias}")
            # Double precision, so that each entry is rounded once, to the weight's own dtype.
            weight = own.to("cpu", torch.float64).product().to(own.left.dtype)
            state[f"{path}.weight"] = (weight.T if tensor.kind == "conv1d" else weight).contiguous()
        norm = topology.stacks_by_name[name].norm if name in topology.stacks_by_name else ""
        if norm:
            inside = [key.removeprefix(f"{norm}.") for key in state if key.startswith(f"{norm}.")]
            parts = {key: state.pop(f"{norm}.{key}") for key in inside}
            of_norm = {key: tensor for key, tensor in parts.items() if key.startswith("norm.")}
            state |= {f"{norm}.{key.removeprefix('norm.')}": tensor for key, tensor in of_norm.items()}
    for path in dict.fromkeys(topology.experts_by_name[n].module for n, _ in point if n in topology.experts_by_name):
        state |= _merged_experts(state, topology, path, model.get_submodule(path))
    if point.removed:
        dense = _shell(model, width).state_dict()
        state |= {name: torch.zeros(t.shape, dtype=model.dtype) for name, t in dense.items() if name not in state}
    return state


def _filled_up(state: dict[str, Tensor], mlp: Mlp, width: int | None) -> dict[str, Tensor]:
    """The weights of an MLP of reduced width under their dense names, with zeros up to `width` or all channels."""
    width = mlp.channels if width is None else width
    found = {}
    for tensor in mlp.inputs:
        parts = tensor.out_features // mlp.channels  # a fused gate and up has two
        rows = state[f"{tensor.module}.weight"].reshape(parts, -1, tensor.in_features)
        empty = rows.new_zeros(parts, width - rows.shape[1], rows.shape[2])
        weight = torch.cat((rows, empty), 1).flatten(0, 1)
        found[f"{tensor.module}.weight"] = (weight.T if tensor.kind == "conv1d" else weight).contiguous()
        if (bias := state.get(f"{tensor.module}.bias")) is not None:
            found[f"{tensor.module}.bias"] = torch.cat((bias.reshape(parts, -1), empty[:, :, 0]), 1).flatten()
    columns = state[f"{mlp.output.module}.weight"]
    weight = torch.cat((columns, columns.new_zeros(columns.shape[0], width - columns.shape[1])), 1)
    found[f"{mlp.output.module}.weight"] = (weight.T if mlp.output.kind == "conv1d" else weight).contiguous()
    return found


def _merged_experts(state: dict[str, Tensor], topology: Topology, path: str, module: nn.Module) -> dict[str, Tensor]:
    """The fused weights of a layer's experts under their dense names; deletes their factors from `state`."""
    assert isinstance(module, TuckerExperts)  # noqa: S101 - inserted by surgery
    for name in [name for name in state if name.startswith((f"{path}.gate_up.", f"{path}.down."))]:
        del state[name]
    found = {}
    parts = {"expert_gate_up": module.gate_up, "expert_down": module.down}
    for tensor in (tensor for tensor in topology.experts if tensor.module == path):
        factors = expert_factors_of(parts[tensor.role])
        if factors.ranks == tensor.shape:
            weight = factors.core  # still dense
        else:
            weight = factors.to("cpu", torch.float64).product().to(factors.core.dtype)
        found[f"{path}.{tensor.parameter}"] = weight.contiguous()
    return found


def _shell(model: PreTrainedModel, width: int | None) -> PreTrainedModel:
    """The architecture on the meta device, with MLPs of this width, ready to take weights over."""
    config = copy.deepcopy(model.config)
    if width is not None:
        setattr(config, _width_setting(config), width)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain floats, whatever file they came from
    with torch.device("meta"):
        shell: PreTrainedModel = type(model)(config)
    return shell


def write_dense_form(model: PreTrainedModel, state: dict[str, Tensor], folder: Path, width: int | None = None) -> None:
    """Write config.json and weights as the architecture's own `save_pretrained` does, with the hub's shard names.

    Args:
        model: A model of the architecture; it is not changed.
        state: Its dense weights by name, from `merged_state`.
        folder: An existing folder.
        width: Channels of its MLPs, from `dense_form_width`.
    """
    # Save from a shell, not from the resident model: `save_pretrained` writes to the model's config, and would revert
    # the conversions of the source file, for example to the tensor names of a GGUF.
    shell = _shell(model, width)
    shell.load_state_dict(state, strict=True, assign=True)
    if shell.can_generate():
        shell.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # the model's own is written separately
    shell.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)

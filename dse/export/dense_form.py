"""The dense form of an export: factors multiplied out, for runtimes without low-rank layers."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from dse.decomposition import TuckerExperts
from dse.decomposition.factors import applied_factors, expert_factors_of
from dse.design_point import DesignPoint
from dse.export.weights import MAX_SHARD_SIZE
from dse.topology import Topology

__all__ = ["merged_state", "write_dense_form"]


def merged_state(model: PreTrainedModel, topology: Topology, point: DesignPoint) -> dict[str, Tensor]:
    """The weights of `model` by name, with the low-rank modules of `point` multiplied out.

    The architecture has a place for every block, so removed blocks are filled with zeros. They then return zero, which
    is bit for bit the same as no block.

    Args:
        model: The model with the low-rank modules of the point; it is not changed.
        topology: Its topology.
        point: The applied point.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, choice in point:
        if choice.is_removal or name in topology.experts_by_name:
            continue
        factors = applied_factors(model, topology, name)
        for member in topology.tensors_of(name):
            tensor = topology[member]
            path, own = tensor.module, factors[tensor.module]
            for part in ("left", "right", "core", "owned.right", "owned.core"):
                state.pop(f"{path}.{part}.weight", None)
            if f"{path}.left.bias" in state:
                state[f"{path}.bias"] = state.pop(f"{path}.left.bias")
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
        dense = _shell(model).state_dict()
        state |= {name: torch.zeros(t.shape, dtype=model.dtype) for name, t in dense.items() if name not in state}
    return state


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


def _shell(model: PreTrainedModel) -> PreTrainedModel:
    """The architecture on the meta device, ready to take weights over."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain floats, whatever file they came from
    with torch.device("meta"):
        shell: PreTrainedModel = type(model)(config)
    return shell


def write_dense_form(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    """Write config.json and weights as the architecture's own `save_pretrained` does, with the hub's shard names.

    Args:
        model: A model of the architecture; it is not changed.
        state: Its dense weights by name, from `merged_state`.
        folder: An existing folder.
    """
    # Save from a shell, not from the resident model: `save_pretrained` writes to the model's config, and would revert
    # the conversions of the source file, for example to the tensor names of a GGUF.
    shell = _shell(model)
    shell.load_state_dict(state, strict=True, assign=True)
    if shell.can_generate():
        shell.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # the model's own is written separately
    shell.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)

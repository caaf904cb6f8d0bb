"""The topology of a Hugging Face model: its repeated block, the matrices in it by role, and the sizes for cost
arithmetic.

Only modules whose class is exactly `torch.nn.Linear` or transformers' `Conv1D` are decomposable matrices: a subclass
may compute something else, and replacing it would change the model. Fused tensors of routed experts are decomposable if
their layout is verified (`dse.models.fused_experts`). All other matrices are counted (`dse.models.sizes`), so that
FLOPs stay correct.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeGuard

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dse.errors import ModelError, UnknownArchitectureError, did_you_mean
from dse.model_parts import DecomposableTensor
from dse.models.fused_experts import find_experts
from dse.models.layer_skeleton import find_stacks
from dse.models.mlp_channels import find_mlps
from dse.models.passed_layer import PassedLayer
from dse.models.removable_blocks import find_blocks
from dse.models.roles import ROLE_ORDER, check_role_names, role_of, suffix_match
from dse.models.sizes import (
    attention_widths,
    is_causal,
    other_in_layers,
    other_outside_layers,
    output_head,
    persistent_buffer_bytes,
    repeated_paths,
)
from dse.topology import Topology

__all__ = ["topology_of"]

_LISTED = 8  # modules named in an error message


def topology_of(model: PreTrainedModel, role_names: Mapping[str, str] | None = None) -> Topology:
    """Find the decomposable tensors of `model`.

    Args:
        model: Any Hugging Face text model, on any device; the meta device is enough, since only shapes are read.
        role_names: Module-path suffix to role, for modules that the built-in rules do not cover, for example
            `{"mixer.in_proj": "input"}`, or outside the layers `{"lm_head": "head"}`.

    Returns:
        The topology. Tensors are in order of layers, then of the forward pass, then those outside the layers.

    Raises:
        UnknownArchitectureError: There is no repeated block, or no role for its linear modules, or one role fits two
            modules of a layer.
        ModelError: `role_names` matches nothing in this model, or a tied weight, or a module that is not linear.
    """
    names = dict(role_names or {})
    check_role_names(names)
    block_path, blocks = _repeated_block(model)
    modules = dict(model.named_modules())
    tied = _tied_parameters(model)
    _refuse_role_names_without_effect(modules, names)
    inside = [t for i, block in enumerate(blocks) for t in _layer_tensors(i, f"{block_path}.{i}", block, names, tied)]
    outside = list(_outside_tensors(modules, names, tied))
    experts, experts_refused = find_experts(model, block_path, blocks, tied, {tensor.name for tensor in inside})
    # An export of dse may have no dense matrix left. It can be evaluated and measured, but not decomposed again.
    if not inside and not outside and not experts and not str(model.config.model_type).startswith("lowrank-"):
        raise _unknown_architecture(model, block_path, blocks)
    other, unmapped = other_in_layers(model, block_path, blocks, {t.module for t in inside})
    head = output_head(model)
    parameters = list(model.parameters())
    parameter_count = sum(p.numel() for p in parameters)
    attention_width, key_value_width = attention_widths(model, inside, len(blocks))
    is_decoder = is_causal(model, blocks[0])
    removable, refused = find_blocks(model, block_path, blocks, inside, tied, is_decoder=is_decoder, experts=experts)
    expert_modules = {tensor.module for tensor in experts}
    return Topology(
        architecture=type(model).__name__,
        model_type=str(model.config.model_type),
        layer_count=len(blocks),
        tensors=(*inside, *outside),
        parameters_dense=parameter_count,
        buffers_bytes=persistent_buffer_bytes(model),
        bytes_per_parameter=sum(p.numel() * p.element_size() for p in parameters) / parameter_count,
        head_parameters=head.weight.numel() if isinstance(head, nn.Linear) else 0,
        attention_width=attention_width,
        key_value_width=key_value_width,
        is_decoder=is_decoder,
        other_matmul_parameters=other + other_outside_layers(model, modules, head),
        unmapped=tuple(path for path in unmapped if path not in expert_modules),
        blocks=removable,
        blocks_refused=refused,
        stacks=find_stacks(model, inside, removable),
        experts=experts,
        experts_refused=experts_refused,
        mlps=find_mlps(model, inside),
    )


def _repeated_block(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of layers: the module list with the most parameters whose members all hold matrices."""
    found = [
        (sum(p.numel() for p in module.parameters()), path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(_has_matrix(child) for child in module)
        and all(_has_matrix(child) or _is_passed(child) for child in module)
    ]
    if not found:
        raise UnknownArchitectureError(
            f"a model must repeat one block of layers (a torch ModuleList of modules with matrices), but"
            f" {type(model).__name__} has none; it cannot be decomposed layer by layer"
        )
    _, path, blocks = max(found, key=lambda entry: entry[0])
    expected = getattr(model.config.get_text_config(), "num_hidden_layers", len(blocks))
    if getattr(model.config, "removed", None):  # an export of dse, whose config counts the remaining attention blocks
        expected = len(blocks)
    if len({id(block) for block in blocks}) < len(blocks) or expected != len(blocks):
        raise UnknownArchitectureError(
            f"every layer must have weights of its own, but {type(model).__name__} runs {expected} layers over"
            f" {len({id(block) for block in blocks})} blocks at '{path}'; models that share layers are not supported"
        )
    return path, blocks


def _is_passed(module: nn.Module) -> bool:
    """Whether the module replaces a layer without any block left, as in an export of dse."""
    return type(module).__name__ == PassedLayer.__name__


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _linear_modules(module: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    return {path: m for path, m in module.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def _tied_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that have more than one name."""
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {identity for identity, count in names.items() if count > 1}


def _is_replaceable(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    return type(module) in (nn.Linear, Conv1D)


def _tensor(name: str, path: str, layer: int | None, role: str, module: nn.Linear | Conv1D) -> DecomposableTensor:
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return DecomposableTensor(name, path, layer, role, out_features, in_features, True, "conv1d")
    out_features, in_features = module.weight.shape
    return DecomposableTensor(name, path, layer, role, out_features, in_features, module.bias is not None, "linear")


def _layer_tensors(
    layer: int, layer_path: str, block: nn.Module, names: Mapping[str, str], tied: set[int]
) -> list[DecomposableTensor]:
    """The decomposable tensors of one layer, in order of the forward pass."""
    by_role: dict[str, DecomposableTensor] = {}
    for path, module in block.named_modules():
        if not _is_replaceable(module) or (role := role_of(path, names)) is None:
            continue
        if id(module.weight) in tied:
            if suffix_match(path, names) is not None:
                raise _tied_error(f"{layer_path}.{path}", role)
            continue
        if role in by_role:
            raise UnknownArchitectureError(
                f"a role must name one matrix of a layer, but '{role}' fits both '{by_role[role].module}' and"
                f" '{layer_path}.{path}'; give them different roles in the search-space file, for example `role_names:"
                f" {{{path}: {path.replace('.', '_').lower()}}}`"
            )
        by_role[role] = _tensor(f"layers.{layer}.{role}", f"{layer_path}.{path}", layer, role, module)
    # User-defined roles come last, in the order in which the model registers them.
    ordered = [*(role for role in ROLE_ORDER if role in by_role), *(role for role in by_role if role not in ROLE_ORDER)]
    return [by_role[role] for role in ordered]


def _outside_tensors(
    modules: Mapping[str, nn.Module], names: Mapping[str, str], tied: set[int]
) -> Iterator[DecomposableTensor]:
    """Tensors outside the layers, which are decomposable only if the user gives them a role."""
    repeated, taken = repeated_paths(modules), dict[str, str]()
    for path, module in modules.items():
        suffix = None if path.startswith(repeated) else suffix_match(path, names)
        if suffix is None or not any(True for _ in module.parameters(recurse=False)):
            continue
        role = names[suffix]
        if not _is_replaceable(module):
            raise ModelError(
                f"a role must name a linear module, but `role_names` gives '{role}' to '{path}', which is of type"
                f" {type(module).__name__}; leave it out"
            )
        if id(module.weight) in tied:
            raise _tied_error(path, role)
        if role in taken:
            raise ModelError(
                f"a role must name one matrix outside the layers, but '{role}' fits both '{taken[role]}' and"
                f" '{path}'; use a longer path suffix in `role_names`"
            )
        taken[role] = path
        yield _tensor(role, path, None, role, module)


def _tied_error(path: str, role: str) -> ModelError:
    return ModelError(
        f"a tied weight cannot be decomposed, but `role_names` gives the role '{role}' to '{path}', which shares its"
        f" matrix with another module (usually the embedding): factors would untie them and add parameters; leave it"
        f" out"
    )


def _refuse_role_names_without_effect(modules: Mapping[str, nn.Module], names: Mapping[str, str]) -> None:
    linear = [path for path, module in modules.items() if _is_replaceable(module)]
    for suffix in names:
        if not any(path == suffix or path.endswith("." + suffix) for path in modules):
            ends = {".".join(path.split(".")[-n:]) for path in linear for n in (1, 2, 3)}
            raise ModelError(
                f"a key of `role_names` must be the suffix of a module path in this model, but no path ends in"
                f" '{suffix}'{did_you_mean(suffix, sorted(ends))}"
            )


def _unknown_architecture(model: nn.Module, block_path: str, blocks: nn.ModuleList) -> UnknownArchitectureError:
    found: dict[str, str] = {}
    for block in blocks:
        for path, module in _linear_modules(block).items():
            if not _is_replaceable(module):
                continue
            pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
            found.setdefault(pattern, " x ".join(str(size) for size in module.weight.shape))
    if not found:
        kinds = sorted({type(module).__name__ for module in _linear_modules(blocks).values()})
        return UnknownArchitectureError(
            f"a decomposable module must be exactly a torch Linear or transformers' Conv1D, but the layers of"
            f" {type(model).__name__} ('{block_path}') hold {', '.join(kinds)} only, which may compute something else;"
            f" this architecture is not supported"
        )
    listed = ", ".join(f"{path} ({shape})" for path, shape in list(found.items())[:_LISTED])
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    example = next(iter(found))
    return UnknownArchitectureError(
        f"the linear modules of a layer must have roles, but no rule names those of {type(model).__name__}: each of"
        f" its {len(blocks)} layers ('{block_path}') holds {listed}{more}; name them in the search-space file, for"
        f" example `role_names: {{{example}: {re.sub('[^a-z0-9]+', '_', example.split('.')[-1].lower())}}}`"
    )

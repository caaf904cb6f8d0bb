"""Fused tensors of routed experts: layers that store them in the one supported layout, verified by running the module.

Transformers keeps the routed experts of most families in one module with two parameters, `gate_up_proj` of shape
(experts, 2 * intermediate, hidden) and `down_proj` of shape (experts, hidden, intermediate). Some families transpose
them, add biases or interleave gate and up. The layout is verified, not looked up by family: the module's own forward
pass is run once on small random weights and must equal sum_e w_e D_e gate(G_e x) over a token's chosen experts.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from dse.expert_tensor import EXPERT_ROLES, ExpertTensor
from dse.models.sizes import experts_per_token

__all__ = ["find_experts"]

_EXPERTS = re.compile(r"(^|\.)experts$")
_PARAMETERS = ("gate_up_proj", "down_proj")  # of EXPERT_ROLES
_FLAGS = (
    ("is_transposed", True, "store their weights transposed"),
    ("has_bias", True, "add biases"),
    ("has_gate", False, "have no gate"),
    ("is_concatenated", False, "interleave gate and up"),
    ("has_post_expert_norm", True, "normalise each expert's output"),
)
_HIDDEN, _INTERMEDIATE, _TOKENS = 16, 8, 5


def find_experts(
    model: PreTrainedModel, block_path: str, layers: nn.ModuleList, tied: set[int], taken: Iterable[str]
) -> tuple[tuple[ExpertTensor, ...], dict[str, str]]:
    """The fused expert tensors of every layer, and the reasons why others are not supported.

    Args:
        model: The model, on any device, including meta.
        block_path: Path of the list of layers.
        layers: The layers.
        tied: Ids of parameters that have more than one name.
        taken: Names already used by user-defined roles.

    Returns:
        Tensors in order of layers, `gate_up_proj` first; and the names of unsupported tensors to the reason.
    """
    found: list[ExpertTensor] = []
    refused: dict[str, str] = {}
    for i, layer in enumerate(layers):
        names = [f"layers.{i}.{role}" for role in EXPERT_ROLES]
        modules = {path: m for path, m in layer.named_modules() if _EXPERTS.search(path) and _is_fused(m)}
        if not modules or set(names) & set(taken):
            continue
        path, module = next(iter(modules.items()))
        reason = _problem(module, tied) if len(modules) == 1 else f"the layer holds {len(modules)} sets of experts"
        if reason:
            refused |= dict.fromkeys(names, reason)
            continue
        for name, role, parameter in zip(names, EXPERT_ROLES, _PARAMETERS, strict=True):
            experts, out_features, in_features = module.get_parameter(parameter).shape
            chosen = experts_per_token(model, experts)
            where = f"{block_path}.{i}.{path}"
            found.append(ExpertTensor(name, where, parameter, i, role, experts, out_features, in_features, chosen))
    return tuple(found), refused


def _is_fused(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters(recurse=False))


def _problem(module: nn.Module, tied: set[int]) -> str:
    """The reason why the module's tensors cannot be decomposed; "" if they can."""
    kind = type(module).__name__
    for flag, unsupported, difference in _FLAGS:
        if getattr(module, flag, not unsupported) is unsupported:
            return f"the experts of {kind} {difference}"
    parameters = dict(module.named_parameters())
    if set(parameters) != set(_PARAMETERS) or any(p.ndim != 3 for p in parameters.values()):
        held = ", ".join(f"{name} ({' x '.join(map(str, p.shape))})" for name, p in parameters.items())
        return f"the experts of {kind} are not a pair of 3-D gate_up_proj and down_proj, but {held}"
    if any(id(parameter) in tied for parameter in parameters.values()):
        return f"{kind} shares its weights with another part of the model"
    (experts, twice, hidden), down = parameters["gate_up_proj"].shape, tuple(parameters["down_proj"].shape)
    gate = getattr(module, "_apply_gate", None)
    if down != (experts, hidden, twice // 2) or gate is None or not _computes_as_expected(module, experts):
        return (
            f"{kind} does not compute the sum over a token's experts of weight * down @ gate(gate_up @ token) with"
            f" gate_up_proj of (experts, 2 * intermediate, hidden) and down_proj of (experts, hidden, intermediate)"
        )
    return ""


def _computes_as_expected(module: nn.Module, experts: int) -> bool:
    """Whether the module's forward pass computes the expected sum, on small random weights."""
    generator = torch.Generator().manual_seed(0)
    small = copy.copy(module)
    vars(small).pop("forward", None)  # set by libraries that place modules on devices
    sizes = ((experts, 2 * _INTERMEDIATE, _HIDDEN), (experts, _HIDDEN, _INTERMEDIATE))
    weights = [torch.randn(size, generator=generator) for size in sizes]
    small._parameters = {n: nn.Parameter(w, requires_grad=False) for n, w in zip(_PARAMETERS, weights, strict=True)}
    tokens = torch.randn(_TOKENS, _HIDDEN, generator=generator)
    chosen = torch.rand(_TOKENS, experts, generator=generator).topk(min(2, experts)).indices
    shares = torch.rand(chosen.shape, generator=generator)
    # Unwrapping skips transformers' switch between implementations and gives the architecture's own, on any device.
    forward = inspect.unwrap(type(module).forward)
    try:
        with torch.no_grad():
            output = forward(small, tokens, chosen, shares)
            gate: Callable[[Tensor], Tensor] = small._apply_gate  # type: ignore[assignment]  # a method, not a child
            expected = _expected(gate, (weights[0], weights[1]), tokens, chosen, shares)
    except Exception:  # noqa: BLE001 - any error means that the module does not accept experts of this form
        return False
    return isinstance(output, Tensor) and output.shape == tokens.shape and torch.allclose(output, expected, 1e-4, 1e-4)


def _expected(
    gate: Callable[[Tensor], Tensor], weights: tuple[Tensor, Tensor], tokens: Tensor, chosen: Tensor, shares: Tensor
) -> Tensor:
    (gate_up, down), rows = weights, []
    for token, experts, own in zip(tokens, chosen, shares, strict=True):
        outputs = [functional.linear(gate(functional.linear(token, gate_up[e])), down[e]) for e in experts]
        rows.append(sum((w * y for w, y in zip(own, outputs, strict=True)), torch.zeros_like(token)))
    return torch.stack(rows)

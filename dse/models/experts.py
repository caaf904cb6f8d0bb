"""Fused tensors of routed experts: which layers hold them in the one layout that is understood, verified by running it.

Transformers keeps the routed experts of most families in one module with two parameters, `gate_up_proj` of shape
(experts, 2 * intermediate, hidden) and `down_proj` of shape (experts, hidden, intermediate). Some transpose them, add
biases or interleave gate and up. No list of families says which: the module's own forward pass is run once over small
random weights and must give what this layout means, sum_e w_e D_e gate(G_e x) over a token's chosen experts.
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
    ("is_transposed", True, "hold their weights transposed"),
    ("has_bias", True, "add biases"),
    ("has_gate", False, "have no gate"),
    ("is_concatenated", False, "interleave gate and up"),
    ("has_post_expert_norm", True, "normalise each expert's output"),
)
_HIDDEN, _INTERMEDIATE, _TOKENS = 16, 8, 5


def find_experts(
    model: PreTrainedModel, block_path: str, layers: nn.ModuleList, tied: set[int], taken: Iterable[str]
) -> tuple[tuple[ExpertTensor, ...], dict[str, str]]:
    """The fused expert tensors of every layer, and why others are not offered.

    Args:
        model: The model, on any device, the meta device included.
        block_path: Path of the list of layers.
        layers: The layers.
        tied: Identities of parameters that carry more than one name.
        taken: Names that the caller's own roles have given already.

    Returns:
        Tensors in order of layers, `gate_up_proj` first, and the names they would have to the reason where not.
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
    """What keeps the module's tensors from being decomposed; "" where nothing does."""
    kind = type(module).__name__
    for flag, unknown, doing in _FLAGS:
        if getattr(module, flag, not unknown) is unknown:
            return f"the experts of {kind} {doing}"
    parameters = dict(module.named_parameters())
    if set(parameters) != set(_PARAMETERS) or any(p.ndim != 3 for p in parameters.values()):
        held = ", ".join(f"{name} ({' x '.join(map(str, p.shape))})" for name, p in parameters.items())
        return f"the experts of {kind} are no pair of gate_up_proj and down_proj of three dimensions but {held}"
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
    """Whether its own forward pass gives what the layout means, on small random weights."""
    generator = torch.Generator().manual_seed(0)
    small = copy.copy(module)
    vars(small).pop("forward", None)  # libraries that place modules on devices put one there
    sizes = ((experts, 2 * _INTERMEDIATE, _HIDDEN), (experts, _HIDDEN, _INTERMEDIATE))
    weights = [torch.randn(size, generator=generator) for size in sizes]
    small._parameters = {n: nn.Parameter(w, requires_grad=False) for n, w in zip(_PARAMETERS, weights, strict=True)}
    tokens = torch.randn(_TOKENS, _HIDDEN, generator=generator)
    chosen = torch.rand(_TOKENS, experts, generator=generator).topk(min(2, experts)).indices
    shares = torch.rand(chosen.shape, generator=generator)
    # Below transformers' switch between implementations lies the architecture's own, whatever device this is.
    forward = inspect.unwrap(type(module).forward)
    try:
        with torch.no_grad():
            output = forward(small, tokens, chosen, shares)
            gate: Callable[[Tensor], Tensor] = small._apply_gate  # type: ignore[assignment]  # a method, not a child
            expected = _expected(gate, (weights[0], weights[1]), tokens, chosen, shares)
    except Exception:  # noqa: BLE001 - whatever it raises here means that it does not take experts of this form
        return False
    return isinstance(output, Tensor) and output.shape == tokens.shape and torch.allclose(output, expected, 1e-4, 1e-4)


def _expected(
    gate: Callable[[Tensor], Tensor],
    weights: tuple[Tensor, Tensor],
    tokens: Tensor,
    chosen: Tensor,
    shares: Tensor,
) -> Tensor:
    (gate_up, down), rows = weights, []
    for token, experts, own in zip(tokens, chosen, shares, strict=True):
        outputs = [functional.linear(gate(functional.linear(token, gate_up[e])), down[e]) for e in experts]
        rows.append(sum((w * y for w, y in zip(own, outputs, strict=True)), torch.zeros_like(token)))
    return torch.stack(rows)

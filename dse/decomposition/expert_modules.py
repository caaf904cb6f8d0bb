"""The module that stands in for the routed experts of a layer when their fused tensors are Tucker-decomposed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dse.decomposition.expert_factors import TuckerFactors

__all__ = ["TuckerExpertWeight", "TuckerExperts"]


class TuckerExpertWeight(nn.Module):
    """A fused expert tensor as core and factors; the weight of an expert is never formed.

    With the expert mode full, expert e multiplies by L C_e R: its own slice C_e of the core between shared factors.
    With an expert factor U of r_e columns its core is C_e = sum_a U[e, a] C_a, and the r_e cores are applied once per
    token rather than mixed for every expert: mixing the results (or, where experts' outputs are added up, the inputs)
    costs a row of U instead of a core. A dense tensor is the core without factors.

    Args:
        factors: Core and factors; a core that is a parameter already is taken over, not copied.
    """

    def __init__(self, factors: TuckerFactors) -> None:
        super().__init__()
        self.core = _parameter(factors.core)
        self.experts = None if factors.experts is None else _parameter(factors.experts)
        self.left = None if factors.left is None else _parameter(factors.left)
        self.right = None if factors.right is None else _parameter(factors.right)

    def read(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """What a token's chosen experts make of it: the right factor is applied once per token.

        Args:
            tokens: Shape (tokens, in_features).
            chosen: Expert indices, shape (tokens, k).

        Returns:
            Shape (tokens, k, out_features).
        """
        inner = tokens if self.right is None else functional.linear(tokens, self.right)
        if self.experts is None:
            outputs = _by_expert(self.core, inner.repeat_interleave(chosen.shape[1], dim=0), chosen)
        else:
            of_cores = functional.linear(inner, self.core.flatten(0, 1)).view(-1, *self.core.shape[:2])
            outputs = torch.bmm(self.experts[chosen], of_cores)
        return outputs if self.left is None else functional.linear(outputs, self.left)

    def write(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The weighted sum of what chosen experts make of their own inputs: the left factor is applied once per token.

        Args:
            hidden: Shape (tokens, k, in_features).
            chosen: Expert indices, shape (tokens, k).
            shares: Weight of each chosen expert, shape (tokens, k).

        Returns:
            Shape (tokens, out_features).
        """
        inner = hidden if self.right is None else functional.linear(hidden, self.right)
        if self.experts is None:
            outputs = _by_expert(self.core, inner.flatten(0, 1), chosen)
            summed = (outputs * shares.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)
        else:
            mixture = (self.experts[chosen] * shares.unsqueeze(-1)).to(hidden.dtype)
            to_cores = torch.bmm(mixture.mT, inner).transpose(0, 1)
            summed = torch.bmm(to_cores, self.core.mT).sum(dim=0)
        return summed if self.left is None else functional.linear(summed, self.left)

    def factors(self) -> TuckerFactors:
        """The module's weights as factors."""
        kept = [None if p is None else p.data for p in (self.core, self.experts, self.left, self.right)]
        return TuckerFactors(*kept)  # type: ignore[arg-type]  # the core is never None

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        factors = self.factors()
        return f"shape={factors.shape}, ranks={factors.ranks}"


class TuckerExperts(nn.Module):
    """Routed experts y = sum_e w_e D_e gate(G_e x) over a token's chosen experts, with G, D or both decomposed.

    Args:
        dense: The module it stands for, whose gate it computes: plain settings and children are taken over.
        gate_up: Shape (experts, 2 * intermediate, hidden).
        down: Shape (experts, hidden, intermediate).
    """

    def __init__(self, dense: nn.Module, gate_up: TuckerExpertWeight, down: TuckerExpertWeight) -> None:
        super().__init__()
        for name, value in vars(dense).items():
            if not name.startswith("_") and isinstance(value, (str, int, float, bool)):
                setattr(self, name, value)
        for name, child in dense.named_children():
            setattr(self, name, child)
        self.gate_up = gate_up
        self.down = down
        self._gate: Callable[[nn.Module, Tensor], Tensor] = type(dense)._apply_gate  # type: ignore[attr-defined]  # `dse.models.experts` looked

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the dense module's.

        Args:
            hidden_states: Shape (tokens, hidden).
            top_k_index: Chosen experts, shape (tokens, k).
            top_k_weights: Their weights, shape (tokens, k).

        Returns:
            Shape (tokens, hidden).
        """
        gated = self._gate(self, self.gate_up.read(hidden_states, top_k_index))
        return self.down.write(gated, top_k_index, top_k_weights)


def _by_expert(core: Tensor, rows: Tensor, chosen: Tensor) -> Tensor:
    """Each row times its own expert's slice of the core.

    Args:
        core: Shape (experts, out, in).
        rows: Shape (tokens * k, in).
        chosen: Expert of each row, shape (tokens, k).

    Returns:
        Shape (tokens, k, out).
    """
    experts = chosen.flatten()
    if len(chosen) == 1:  # decoding: as many slices as chosen experts, in one kernel and without waiting for the device
        outputs = torch.bmm(core[experts], rows.unsqueeze(-1)).squeeze(-1)
    else:
        order, counts = experts.argsort(), experts.bincount(minlength=len(core)).tolist()
        parts = torch.split(rows[order], counts)
        found = [functional.linear(part, core[e]) for e, part in enumerate(parts) if len(part)]
        outputs = rows.new_empty(len(rows), core.shape[1])
        if found:
            outputs[order] = torch.cat(found)
    return outputs.view(*chosen.shape, core.shape[1])


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)

"""Modules that replace the routed experts of a layer when their fused tensors are Tucker-decomposed.

Exports copy this file's classes into their modelling file (`dse.export.modelling_code`), so it imports torch and
`dse.models.plain_attributes` only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dse.models.plain_attributes import copy_plain_attributes

__all__ = ["TuckerExpertWeight", "TuckerExperts"]


class TuckerExpertWeight(nn.Module):
    """A fused expert tensor as a core and factors; the weight of one expert is never formed.

    With a full expert mode, expert e multiplies by L C_e R, where C_e is its slice of the core and L and R are shared.
    With an expert factor U of r_e columns, C_e = sum_a U[e, a] C_a. The r_e cores are then applied once per token, and
    their results are mixed (or their inputs, where the experts' outputs are summed). That costs a row of U per expert
    instead of a mixed core. A dense tensor is a core without factors.

    Args:
        core: Shape (r_e, r_o, r_i). A core that is already a parameter is reused, not copied.
        experts: Shape (experts, r_e), or None if r_e = experts.
        left: Shape (out_features, r_o), or None if r_o = out_features.
        right: Shape (r_i, in_features), or None if r_i = in_features.
    """

    def __init__(
        self, core: Tensor, experts: Tensor | None = None, left: Tensor | None = None, right: Tensor | None = None
    ) -> None:
        super().__init__()
        self.core = core if isinstance(core, nn.Parameter) else nn.Parameter(core, requires_grad=False)
        self.experts = None if experts is None else nn.Parameter(experts, requires_grad=False)
        self.left = None if left is None else nn.Parameter(left, requires_grad=False)
        self.right = None if right is None else nn.Parameter(right, requires_grad=False)

    def read(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Apply each token's chosen experts to it; the right factor is applied once per token.

        Args:
            tokens: Shape (tokens, in_features).
            chosen: Expert indices, shape (tokens, k).

        Returns:
            Shape (tokens, k, out_features).
        """
        inner = tokens if self.right is None else nn.functional.linear(tokens, self.right)
        if self.experts is None:
            outputs = by_expert(self.core, inner.repeat_interleave(chosen.shape[1], dim=0), chosen)
        else:
            of_cores = nn.functional.linear(inner, self.core.flatten(0, 1)).view(-1, *self.core.shape[:2])
            outputs = torch.bmm(self.experts[chosen], of_cores)
        return outputs if self.left is None else nn.functional.linear(outputs, self.left)

    def write(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Apply each chosen expert to its own input and return the weighted sum; the left factor is applied once.

        Args:
            hidden: Shape (tokens, k, in_features).
            chosen: Expert indices, shape (tokens, k).
            shares: Weight of each chosen expert, shape (tokens, k).

        Returns:
            Shape (tokens, out_features).
        """
        inner = hidden if self.right is None else nn.functional.linear(hidden, self.right)
        if self.experts is None:
            outputs = by_expert(self.core, inner.flatten(0, 1), chosen)
            summed = (outputs * shares.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)
        else:
            mixture = (self.experts[chosen] * shares.unsqueeze(-1)).to(hidden.dtype)
            to_cores = torch.bmm(mixture.mT, inner).transpose(0, 1)
            summed = torch.bmm(to_cores, self.core.mT).sum(dim=0)
        return summed if self.left is None else nn.functional.linear(summed, self.left)

    def extra_repr(self) -> str:
        """Ranks for `print(model)`."""
        return f"ranks={tuple(self.core.shape)}"


class TuckerExperts(nn.Module):
    """Routed experts y = sum_e w_e D_e gate(G_e x) over a token's chosen experts, with G, D or both decomposed.

    Args:
        dense: The module it replaces. Its gate function, plain attributes and children are reused.
        gate_up: Fused tensor of shape (experts, 2 * intermediate, hidden).
        down: Fused tensor of shape (experts, hidden, intermediate).
    """

    def __init__(self, dense: Any, gate_up: TuckerExpertWeight, down: TuckerExpertWeight) -> None:
        super().__init__()
        copy_plain_attributes(dense, self)
        for name, child in dense.named_children():
            setattr(self, name, child)
        self.gate_up = gate_up
        self.down = down
        self._gate = type(dense)._apply_gate

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Same signature as the dense module.

        Args:
            hidden_states: Shape (tokens, hidden).
            top_k_index: Indices of the chosen experts, shape (tokens, k).
            top_k_weights: Their weights, shape (tokens, k).

        Returns:
            Shape (tokens, hidden).
        """
        gated = self._gate(self, self.gate_up.read(hidden_states, top_k_index))
        return self.down.write(gated, top_k_index, top_k_weights)


def by_expert(core: Tensor, rows: Tensor, chosen: Tensor) -> Tensor:
    """Multiply each row by its expert's slice of the core.

    Args:
        core: Shape (experts, out, in).
        rows: Shape (tokens * k, in).
        chosen: Expert of each row, shape (tokens, k).

    Returns:
        Shape (tokens, k, out).
    """
    experts = chosen.flatten()
    if len(chosen) == 1:  # decoding: one kernel for the chosen slices, without a device synchronisation
        outputs = torch.bmm(core[experts], rows.unsqueeze(-1)).squeeze(-1)
    else:
        order, counts = experts.argsort(), experts.bincount(minlength=len(core)).tolist()
        parts = torch.split(rows[order], counts)
        found = [nn.functional.linear(part, core[e]) for e, part in enumerate(parts) if len(part)]
        outputs = rows.new_empty(len(rows), core.shape[1])
        if found:
            outputs[order] = torch.cat(found)
    return outputs.view(*chosen.shape, core.shape[1])

# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
#
# mypy: ignore-errors
"""A Llama model in which some weight matrices are products of low-rank factors; written by lowrank-dse.

It needs torch and transformers alone. Load it with

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`config.low_rank` names every module that is replaced, with its rank and whether it keeps a core and a bias; modules of
one `stack` read the same input and share their right factor. `config.removed` names the blocks and layers that are left
out, which the residual stream passes by. Experts are named with the ranks of their three modes (experts, out, in).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D


class LowRankLlamaConfig(LlamaConfig):
    """The base architecture's config, with the low-rank modules by path.

    The model type is its own, so that a loader which does not run this file refuses the folder: as a plain model it
    would miss the factorised weights, and such a loader would put random ones in their place.
    """

    model_type = "lowrank-llama"

    low_rank: dict[str, Any] | None = None
    removed: dict[str, Any] | None = None


class LowRankLinear(nn.Module):
    """Linear layer with a factorised weight: `y = ((x R^T) C^T) L^T + b`, C absent unless a core is kept.

    `left` has shape (out_features, rank), `core` (rank, rank), `right` (rank, in_features), `bias` (out_features,).
    """

    def __init__(self, out_features: int, in_features: int, rank: int, *, core: bool, bias: bool) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(out_features, rank))
        self.right = nn.Parameter(torch.empty(rank, in_features))
        self.core = nn.Parameter(torch.empty(rank, rank)) if core else None
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        for factor in (self.left, self.right, self.core):
            if factor is not None:
                nn.init.normal_(factor, std=factor.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        hidden = functional.linear(x, self.right)
        if self.core is not None:
            hidden = functional.linear(hidden, self.core)
        return functional.linear(hidden, self.left, self.bias)

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        core = ", core" if self.core is not None else ""
        return f"in_features={self.right.shape[1]}, out_features={self.left.shape[0]}, rank={self.left.shape[1]}{core}"


class SharedProduct(nn.Module):
    """The product `x R^T` (and `C^T`) that the members of a stack share: computed once for the same input tensor.

    It is held until the last member took it.
    """

    def __init__(self, in_features: int, rank: int, *, core: bool, members: int) -> None:
        super().__init__()
        self.right = nn.Parameter(torch.empty(rank, in_features))
        self.core = nn.Parameter(torch.empty(rank, rank)) if core else None
        for factor in (self.right, self.core):
            if factor is not None:
                nn.init.normal_(factor, std=factor.shape[1] ** -0.5)
        self.members = members
        self._held = None

    def forward(self, x: Tensor, member: int) -> Tensor:
        """Map (..., in_features) to (..., rank) for the member of this number."""
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        held, own = self._held, 1 << member
        if held is not None and held[0] is x and held[1] == version and not held[3] & own:
            product, taken = held[2], held[3] | own
        else:
            product, taken = self._product(x), own
        self._held = (x, version, product, taken) if taken != (1 << self.members) - 1 else None
        return product

    def _product(self, x: Tensor) -> Tensor:
        hidden = functional.linear(x, self.right)
        return hidden if self.core is None else functional.linear(hidden, self.core)

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin without a held product."""
        return {**vars(self), "_held": None}


class StackedLinear(nn.Module):
    """A member of a stack: `y = (shared product) L^T + b`; the first member holds the shared factor as its own."""

    def __init__(self, out_features: int, shared: SharedProduct, member: int, *, bias: bool) -> None:
        super().__init__()
        rank = shared.right.shape[0]
        self.left = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.normal_(self.left, std=rank**-0.5)
        self.member = member
        if member == 0:
            self.owned = shared
        self._shared = (shared,)  # in a tuple it is no part of this module, but a deep copy follows it

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return functional.linear(self._shared[0](x, self.member), self.left, self.bias)


class TuckerExpertWeight(nn.Module):
    """The weights of all experts as a core (r_e, r_o, r_i) and a factor for each mode whose rank is not full.

    `experts` has shape (experts, r_e), `left` (out_features, r_o), `right` (r_i, in_features).
    """

    def __init__(self, shape: tuple[int, int, int], ranks: list[int]) -> None:
        super().__init__()
        factors = [(shape[0], ranks[0]), (shape[1], ranks[1]), (ranks[2], shape[2])]
        made = [
            nn.Parameter(torch.empty(factor)) if rank < size else None
            for factor, rank, size in zip(factors, ranks, shape, strict=True)
        ]
        self.core = nn.Parameter(torch.empty(*ranks))
        self.experts, self.left, self.right = made
        for factor in (self.core, *made):
            if factor is not None:
                nn.init.normal_(factor, std=factor.shape[-1] ** -0.5)

    def read(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """What each of a token's chosen experts makes of it: (tokens, in) and (tokens, k) to (tokens, k, out)."""
        inner = tokens if self.right is None else functional.linear(tokens, self.right)
        if self.experts is None:
            outputs = by_expert(self.core, inner.repeat_interleave(chosen.shape[1], dim=0), chosen)
        else:
            of_cores = functional.linear(inner, self.core.flatten(0, 1)).view(-1, *self.core.shape[:2])
            outputs = torch.bmm(self.experts[chosen], of_cores)
        return outputs if self.left is None else functional.linear(outputs, self.left)

    def write(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Weighted sum over a token's chosen experts: (tokens, k, in), (tokens, k) and (tokens, k) to (tokens, out)."""
        inner = hidden if self.right is None else functional.linear(hidden, self.right)
        if self.experts is None:
            outputs = by_expert(self.core, inner.flatten(0, 1), chosen)
            summed = (outputs * shares.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)
        else:
            mixture = (self.experts[chosen] * shares.unsqueeze(-1)).to(hidden.dtype)
            to_cores = torch.bmm(mixture.mT, inner).transpose(0, 1)
            summed = torch.bmm(to_cores, self.core.mT).sum(dim=0)
        return summed if self.left is None else functional.linear(summed, self.left)


class TuckerExperts(nn.Module):
    """Routed experts whose weights share their outer factors; the gate is the base model's."""

    def __init__(self, dense: nn.Module, ranks: dict[str, list[int]]) -> None:
        super().__init__()
        for name, value in vars(dense).items():
            if not name.startswith("_") and isinstance(value, (str, int, float, bool)):
                setattr(self, name, value)
        for name, child in dense.named_children():
            setattr(self, name, child)
        self.gate_up = TuckerExpertWeight(tuple(dense.gate_up_proj.shape), ranks["gate_up"])
        self.down = TuckerExpertWeight(tuple(dense.down_proj.shape), ranks["down"])
        self._gate = type(dense)._apply_gate

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Map (tokens, hidden) to the same, by each token's chosen experts and their weights, (tokens, k)."""
        gated = self._gate(self, self.gate_up.read(hidden_states, top_k_index))
        return self.down.write(gated, top_k_index, top_k_weights)


def by_expert(core: Tensor, rows: Tensor, chosen: Tensor) -> Tensor:
    """Each row (tokens * k, in) times its expert's slice of the core (experts, out, in): (tokens, k, out)."""
    experts = chosen.flatten()
    if len(chosen) == 1:
        outputs = torch.bmm(core[experts], rows.unsqueeze(-1)).squeeze(-1)
    else:
        order, counts = experts.argsort(), experts.bincount(minlength=len(core)).tolist()
        parts = torch.split(rows[order], counts)
        found = [functional.linear(part, core[e]) for e, part in enumerate(parts) if len(part)]
        outputs = rows.new_empty(len(rows), core.shape[1])
        if found:
            outputs[order] = torch.cat(found)
    return outputs.view(*chosen.shape, core.shape[1])


class RemovedBlock(nn.Module):
    """Stands in for an attention or MLP block that is left out; gives a zero that any residual stream takes."""

    def __init__(self, returned_items: int) -> None:
        super().__init__()
        self.returned_items = returned_items

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """One zero without dimensions, in the form in which the block gave its output."""
        hidden = next(value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor))
        zero = hidden.new_zeros(())
        return zero if self.returned_items == 1 else (zero, *[None] * (self.returned_items - 1))


class PassedLayer(nn.Module):
    """Stands in for a layer of which nothing is left; hands its input on."""

    def __init__(self, dense: nn.Module, returned_items: int) -> None:
        super().__init__()
        for name, value in vars(dense).items():
            if not name.startswith("_") and isinstance(value, (str, int, float, bool)):
                setattr(self, name, value)
        self.returned_items = returned_items

    def forward(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        """The hidden states as they came."""
        return hidden_states if self.returned_items == 1 else (hidden_states, *[None] * (self.returned_items - 1))


class LowRankLlamaForCausalLM(LlamaForCausalLM):
    """The base model with the modules of `config.low_rank` replaced by low-rank ones, without those removed."""

    config_class = LowRankLlamaConfig

    def __init__(self, config: LowRankLlamaConfig, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "add_pooling_layer", True) is False:  # BERT's body was saved without its pooler
            kwargs["add_pooling_layer"] = False
        # The base may look its parts up by the type of the config (AutoModel.from_config), so it is shown its own.
        config.__class__ = LlamaConfig
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.__class__ = LowRankLlamaConfig
        self._factorise(config.low_rank or {})
        self._leave_out(**(config.removed or {}))
        self.post_init()
        self._tp_plan = {}  # the base's plan splits dense matrices over devices; it does not fit factors

    def _factorise(self, low_rank: dict[str, Any]) -> None:
        """Put low-rank modules in the places of `config.low_rank`."""
        shared: dict[str, SharedProduct] = {}
        for path, form in low_rank.items():
            if "experts" in form:
                self._replace(path, TuckerExperts(self.get_submodule(path), form["experts"]))
                continue
            dense, rank, core = self.get_submodule(path), form["rank"], form["core"]
            # GPT-2's Conv1D stores its weight as (in_features, out_features).
            out_features, in_features = dense.weight.shape[::-1] if isinstance(dense, Conv1D) else dense.weight.shape
            if "stack" in form:
                first, members = form["stack"][0], len(form["stack"])
                if first not in shared:
                    shared[first] = SharedProduct(in_features, rank, core=core, members=members)
                module = StackedLinear(out_features, shared[first], form["stack"].index(path), bias=form["bias"])
            else:
                module = LowRankLinear(out_features, in_features, rank, core=core, bias=form["bias"])
            self._replace(path, module)

    def _leave_out(self, blocks: Any = (), norms: Any = (), layers: Any = (), cache_slots: Any = ()) -> None:
        """Take out the blocks and layers of `config.removed`; attention that remains moves up in the KV cache."""
        for path in cache_slots:
            self.get_submodule(path).layer_idx = cache_slots[path]
        for path in blocks:
            self._replace(path, RemovedBlock(blocks[path]))
        for path in norms:
            self._replace(path, nn.Identity())
        for path in layers:
            self._replace(path, PassedLayer(self.get_submodule(path), layers[path]))

    def _replace(self, path: str, module: nn.Module) -> None:
        parent_path, _, name = path.rpartition(".")
        setattr(self.get_submodule(parent_path), name, module)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a weight that is missing from the files is an error and never made up."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"the files must hold every weight of {cls.__name__}, but {len(missing)} are missing (first:"
                f" {missing[0]}): the folder is damaged, or this version of transformers reads it differently"
            )
        return (model, info) if output_loading_info else model

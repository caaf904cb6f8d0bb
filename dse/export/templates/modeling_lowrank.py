# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
#
# mypy: ignore-errors
"""A Llama model in which some weight matrices are smaller, or products of low-rank factors; written by lowrank-dse.

It needs only torch and transformers. Load it with

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`config.low_rank` lists the replaced modules by path in the base model, with rank, core and bias. The modules of one
`stack` read the same input and share their right factor; if a norm is named, the factor is applied behind that norm. A
module with `columns` or `rows` lists those that are independent; its others are combinations of them. A module with a
`shape`, (out_features, in_features), is a dense matrix of an MLP that keeps some of its channels.
`config.removed` lists the removed blocks and layers. `config.num_hidden_layers` counts the attention blocks left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.pytorch_utils import Conv1D

from dse.decomposition.expert_modules import TuckerExperts, TuckerExpertWeight
from dse.decomposition.low_rank_modules import LowRankLinear, NormThenFactor, SharedProduct, StackedLinear, linear_from
from dse.decomposition.pivoted_module import PivotedLinear
from dse.models.plain_attributes import copy_plain_attributes  # noqa: F401
from dse.models.removed_modules import LayerList, RemovedBlock


def tensor_parallel_plan(dense: Mapping[str, str] | None) -> dict[str, str]:
    """The base architecture's plan, extended to factors.

    The left factor of a matrix that is split by output rows is split the same way, and so is the right factor of a
    matrix that is split by input columns. The other factors are small and stay whole. Patterns match prefixes, so those
    of factors come first, and those of dense matrices end in `$`.
    """
    plan = {}
    for pattern, style in (dense or {}).items():
        split = {"colwise": "left", "rowwise": "right"}.get(style[:7])
        for factor in ("left", "core", "right") if split else ():
            plan[f"{pattern}.{factor}"] = style if factor == split else "replicate"
        # <pivoted>
        if split:  # columns of a matrix that is split by output rows are independent, or rows of one split by columns
            plan |= {f"{pattern}.pivots": style, f"{pattern}.combinations": "replicate"}
        # </pivoted>
    return plan | {f"{pattern}$": style for pattern, style in (dense or {}).items()}


class LowRankLlamaConfig(LlamaConfig):
    """The base architecture's config plus the low-rank modules by path.

    It has its own model type, so that a loader that does not run this file refuses the folder. Loaded as the base
    architecture, the factorised weights would be missing and initialised at random.
    """

    model_type = "lowrank-llama"
    base_model_tp_plan = tensor_parallel_plan(LlamaConfig.base_model_tp_plan)

    low_rank: dict[str, Any] | None = None
    low_rank_head: dict[str, Any] | None = None
    removed: dict[str, Any] | None = None
    # <attention_outputs>
    attention_outputs: list[str] | None = None
    # </attention_outputs>


class LowRankMixin:
    """What the base model and the model with a head have in common."""

    _factor_modules = (LowRankLinear, NormThenFactor, SharedProduct, StackedLinear)
    # <pivoted>
    _factor_modules += (PivotedLinear,)
    # </pivoted>

    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of factors that keep the variance of activations; `from_pretrained` reads the real ones."""
        super()._init_weights(module)
        # <pivoted>
        if isinstance(module, PivotedLinear):
            module.set_order()
        # </pivoted>
        if isinstance(module, self._factor_modules):
            for factor in module.children():
                if isinstance(factor, nn.Linear) and not getattr(factor.weight, "_is_hf_initialized", False):
                    nn.init.normal_(factor.weight, std=factor.in_features**-0.5)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Same as in transformers, but a weight that is missing from the files raises instead of being random."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"the files must hold every weight of {cls.__name__}, but {len(missing)} are missing (first:"
                f" {missing[0]}): the folder is damaged, or this version of transformers reads it differently"
            )
        # <pivoted>
        for module in model.modules():
            if isinstance(module, PivotedLinear):
                module.set_order()  # no file holds it
        # </pivoted>
        return (model, info) if output_loading_info else model


class LowRankLlamaModel(LowRankMixin, LlamaModel):
    """The base model with the low-rank modules of `config.low_rank` and without the parts in `config.removed`."""

    config_class = LowRankLlamaConfig

    def __init__(self, config: LowRankLlamaConfig, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "add_pooling_layer", True) is False:  # a BERT body that was saved without its pooler
            kwargs["add_pooling_layer"] = False
        removed = dict(config.removed or {})
        counted = {name: getattr(config, name) for name in removed.get("built_with", {})}
        try:
            set_all(config, removed.pop("built_with", {}))  # every layer, as in the base model
            super().__init__(config, *args, **kwargs)
        finally:
            set_all(config, counted)
        if removed:
            remove_blocks(self, **removed)
        insert_factors(self, config.low_rank or {})
        # <attention_outputs>
        for path in config.attention_outputs or []:
            self.get_submodule(path).register_forward_pre_hook(separate_tokens)
        # </attention_outputs>
        self.post_init()


# <head>
class LowRankLlamaForCausalLM(LowRankMixin, LlamaForCausalLM):
    """The model with its head, on top of the low-rank base model."""

    config_class = LowRankLlamaConfig

    def __init__(self, config: LowRankLlamaConfig, *args: Any, **kwargs: Any) -> None:
        # The base class may select submodules by the config's type (AutoModel.from_config), so it gets the base type.
        config.__class__ = LlamaConfig
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.__class__ = LowRankLlamaConfig
        pooling = {"add_pooling_layer": False} if getattr(self.model, "pooler", 0) is None else {}
        self.model = LowRankLlamaModel(config, **pooling)
        insert_factors(self, config.low_rank_head or {})
        self.post_init()


# </head>
def insert_factors(model: nn.Module, low_rank: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the listed modules. Initial values are set later, by `_init_weights`."""
    shared: dict[str, SharedProduct] = {}
    replaced: dict[str, list[str]] = {}
    for path, form in low_rank.items():
        if "shape" in form:
            bias = torch.zeros(form["shape"][0]) if form["bias"] else None
            replace(model, path, linear_from(torch.empty(form["shape"]), bias))
            continue
        dense = model.get_submodule(path)
        # <experts>
        if "experts" in form:
            gate_up = expert_weight(dense.gate_up_proj.shape, form["experts"]["gate_up"])
            down = expert_weight(dense.down_proj.shape, form["experts"]["down"])
            replace(model, path, TuckerExperts(dense, gate_up, down))
            continue
        # </experts>
        # GPT-2's Conv1D stores its weight as (in_features, out_features).
        out_features, in_features = dense.weight.shape[::-1] if isinstance(dense, Conv1D) else dense.weight.shape
        rank, stack, norm = form["rank"], form.get("stack", [path]), form.get("norm")
        left, right = torch.empty(out_features, rank), torch.empty(rank, in_features)
        core = torch.empty(rank, rank) if form["core"] else None
        bias = torch.zeros(out_features) if form["bias"] else None
        if norm is not None:
            if path == stack[0]:
                replace(model, norm, NormThenFactor(model.get_submodule(norm), right, core))
            replace(model, path, linear_from(left, bias))
            continue
        if "stack" in form:
            if stack[0] not in shared:
                shared[stack[0]] = SharedProduct(right, core, len(stack))
            module = StackedLinear(left, bias, shared[stack[0]], stack.index(path))
        else:
            module = LowRankLinear(left, right, bias, core)
        # <pivoted>
        if "columns" in form or "rows" in form:
            module = pivoted_linear(form, out_features, in_features, bias)
        # </pivoted>
        replace(model, path, module)
        parent, _, name = path.rpartition(".")
        replaced.setdefault(parent, []).append(name)
    for parent, names in replaced.items():
        module = model.get_submodule(parent)
        module.__class__ = class_with(type(module), tuple(sorted(names)))


_classes: dict[tuple[type, tuple[str, ...]], type] = {}


def class_with(cls: type, names: tuple[str, ...]) -> type:
    """The subclass for parents of which exactly these children are low-rank.

    Engines analyse each class once, for example to fuse the projections that read the same input.
    """
    if (cls, names) not in _classes:
        _classes[cls, names] = type(cls.__name__, (cls,), {"__module__": __name__})
    return _classes[cls, names]


def remove_blocks(
    model: nn.Module,
    layers: str,
    passed: Sequence[int],
    groups: Sequence[tuple[int, int]],
    blocks: Mapping[str, int],
    norms: Sequence[str],
    cache_slots: Mapping[str, int],
) -> None:
    """Drop the passed layers, remove the listed blocks, and number the remaining attention blocks.

    Paths are those after the passed layers are dropped.
    """
    kept = [layer for i, layer in enumerate(model.get_submodule(layers)) if i not in passed]
    replace(model, layers, LayerList(kept, groups) if groups else nn.ModuleList(kept))
    for path, returned_items in blocks.items():
        replace(model, path, RemovedBlock(returned_items))
    for path in norms:
        replace(model, path, nn.Identity())
    for path, slot in cache_slots.items():
        model.get_submodule(path).layer_idx = slot


# <attention_outputs>
def separate_tokens(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give the input of an attention output matrix the shape (batch, tokens, features) again.

    The architecture joins the last two axes of what the attention interface returns, as if they were heads and head
    size. Engines return them as one axis behind the tokens of all requests, so that a single axis is left.
    """
    width = module.weight.shape[0] if isinstance(module, Conv1D) else module.in_features
    return (inputs[0].reshape(1, -1, width) if inputs[0].ndim == 1 else inputs[0], *inputs[1:])


# </attention_outputs>
def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module.requires_grad_())


def set_all(target: Any, values: Mapping[str, Any]) -> None:
    """Set several attributes."""
    for name, value in values.items():
        setattr(target, name, value)


# <pivoted>
def pivoted_linear(form: Mapping[str, Any], out_features: int, in_features: int, bias: Tensor | None) -> PivotedLinear:
    """A layer of independent columns or rows, without values."""
    rank, of_columns = form["rank"], "columns" in form
    pivots = torch.empty(out_features, rank) if of_columns else torch.empty(rank, in_features)
    others = torch.empty(rank, in_features - rank) if of_columns else torch.empty(out_features - rank, rank)
    chosen = numbers_of(form["columns" if of_columns else "rows"])
    return PivotedLinear(pivots, others, chosen, of_columns=of_columns, bias=bias)


def numbers_of(ranges: str) -> list[int]:
    """The numbers of a text such as "0-3,7,9-12"."""
    ends = (part.partition("-")[::2] for part in ranges.split(","))
    return [number for first, last in ends for number in range(int(first), int(last or first) + 1)]


# </pivoted>
# <experts>
def expert_weight(shape: torch.Size, ranks: list[int]) -> TuckerExpertWeight:
    """Random core and factors that keep the variance of activations; modes of full rank have no factor."""
    experts, left, right = ((shape[0], ranks[0]), (shape[1], ranks[1]), (ranks[2], shape[2]))
    factors = [
        random_tensor(*factor) if rank < size else None
        for factor, rank, size in zip((experts, left, right), ranks, shape, strict=True)
    ]
    return TuckerExpertWeight(random_tensor(*ranks), *factors)


def random_tensor(*shape: int) -> Tensor:
    """Normal numbers with the variance of one over the last dimension."""
    tensor = torch.empty(shape)
    nn.init.normal_(tensor, std=shape[-1] ** -0.5)  # transformers may turn this into a no-op that returns None
    return tensor


# </experts>

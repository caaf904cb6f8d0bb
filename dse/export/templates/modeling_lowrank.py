# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
#
# mypy: ignore-errors
"""A Llama model in which some weight matrices are products of low-rank factors; written by lowrank-dse.

It needs only torch and transformers. Load it with

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`config.low_rank` lists the replaced modules by path, with rank, core and bias. The modules of one `stack` read the same
input and share their right factor. `config.removed` lists the removed blocks and layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from dse.decomposition.expert_modules import TuckerExperts, TuckerExpertWeight
from dse.decomposition.low_rank_modules import LowRankLinear, SharedProduct, StackedLinear
from dse.models.removed_modules import PassedLayer, RemovedBlock


class LowRankLlamaConfig(LlamaConfig):
    """The base architecture's config plus the low-rank modules by path.

    It has its own model type, so that a loader that does not run this file refuses the folder. Loaded as the base
    architecture, the factorised weights would be missing and initialised at random.
    """

    model_type = "lowrank-llama"

    low_rank: dict[str, Any] | None = None
    removed: dict[str, Any] | None = None


class LowRankLlamaForCausalLM(LlamaForCausalLM):
    """The base model with the low-rank modules of `config.low_rank` and without the parts in `config.removed`."""

    config_class = LowRankLlamaConfig

    def __init__(self, config: LowRankLlamaConfig, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "add_pooling_layer", True) is False:  # a BERT body that was saved without its pooler
            kwargs["add_pooling_layer"] = False
        # The base class may select submodules by the config's type (AutoModel.from_config), so it gets the base type.
        config.__class__ = LlamaConfig
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.__class__ = LowRankLlamaConfig
        self._insert_factors(config.low_rank or {})
        self._remove_blocks(**(config.removed or {}))
        self.post_init()
        self._tp_plan = {}  # the base class's tensor-parallel plan splits dense matrices; it does not fit factors

    def _insert_factors(self, low_rank: dict[str, Any]) -> None:
        """Replace the modules listed in `config.low_rank`."""
        shared: dict[str, SharedProduct] = {}
        for path, form in low_rank.items():
            dense = self.get_submodule(path)
            # <experts>
            if "experts" in form:
                gate_up = _expert_weight(dense.gate_up_proj.shape, form["experts"]["gate_up"])
                down = _expert_weight(dense.down_proj.shape, form["experts"]["down"])
                self._replace(path, TuckerExperts(dense, gate_up, down))
                continue
            # </experts>
            # GPT-2's Conv1D stores its weight as (in_features, out_features).
            out_features, in_features = dense.weight.shape[::-1] if isinstance(dense, Conv1D) else dense.weight.shape
            rank = form["rank"]
            left, right = _random(out_features, rank), _random(rank, in_features)
            core = _random(rank, rank) if form["core"] else None
            bias = torch.zeros(out_features) if form["bias"] else None
            if "stack" in form:
                members = form["stack"]
                if members[0] not in shared:
                    shared[members[0]] = SharedProduct(right, core, len(members))
                module = StackedLinear(left, bias, shared[members[0]], members.index(path))
            else:
                module = LowRankLinear(left, right, bias, core)
            self._replace(path, module)

    def _remove_blocks(self, blocks: Any = (), norms: Any = (), layers: Any = (), cache_slots: Any = ()) -> None:
        """Remove the blocks and layers listed in `config.removed`; remaining attention moves up in the KV cache."""
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
        setattr(self.get_submodule(parent_path), name, module.requires_grad_())

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
        return (model, info) if output_loading_info else model


def _random(*shape: int) -> Tensor:
    """Initial values that keep the variance of activations; `from_pretrained` overwrites them."""
    factor = torch.empty(shape)
    nn.init.normal_(factor, std=shape[-1] ** -0.5)  # transformers may turn this into a no-op that returns None
    return factor


# <experts>
def _expert_weight(shape: torch.Size, ranks: list[int]) -> TuckerExpertWeight:
    """Random core and factors; modes of full rank have no factor."""
    experts, left, right = ((shape[0], ranks[0]), (shape[1], ranks[1]), (ranks[2], shape[2]))
    factors = [
        _random(*factor) if rank < size else None
        for factor, rank, size in zip((experts, left, right), ranks, shape, strict=True)
    ]
    return TuckerExpertWeight(_random(*ranks), *factors)


# </experts>

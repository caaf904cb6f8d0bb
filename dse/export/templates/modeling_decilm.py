# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
#
# mypy: ignore-errors
"""A Llama model whose layers differ, built from the parts of transformers; written by lowrank-dse.

Load it with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from .configuration_decilm import DeciLMConfig


class DeciLMDecoderLayer(LlamaDecoderLayer):
    """A Llama layer without the parts that its block config leaves out."""

    def __init__(self, config: DeciLMConfig, layer_idx: int, cache_slot: int) -> None:
        block = config.block_configs[layer_idx]
        super().__init__(config, cache_slot)
        if block.attention.no_op:
            self.self_attn = self.input_layernorm = None
        elif getattr(config, "qkv_bias", False):
            for name in ("q_proj", "k_proj", "v_proj"):
                dense = getattr(self.self_attn, name)
                setattr(self.self_attn, name, nn.Linear(dense.in_features, dense.out_features, bias=True))
        if block.ffn.no_op:
            self.mlp = self.post_attention_layernorm = None
        elif block.ffn.intermediate_size != config.intermediate_size:
            own = copy.copy(config)
            own.intermediate_size = block.ffn.intermediate_size
            self.mlp = LlamaMLP(own)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """Add each remaining block's output to the residual stream, shape (batch, tokens, width)."""
        if self.self_attn is not None:
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **arguments)
            hidden_states = hidden_states + attended
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class DeciLMModel(LlamaModel):
    """A Llama body with the layers of `config.block_configs`."""

    config_class = DeciLMConfig
    _no_split_modules = ["DeciLMDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        # Attention fills the slots of the key-value cache from the front: transformers reads lengths from the first.
        slots, used = [], 0
        for block in config.block_configs:
            slots.append(used)
            used += not block.attention.no_op
        layers = [DeciLMDecoderLayer(config, layer, slot) for layer, slot in enumerate(slots)]
        self.layers = nn.ModuleList(layers)
        self.post_init()


class DeciLMForCausalLM(LlamaForCausalLM):
    """The body with its language-modelling head."""

    config_class = DeciLMConfig
    _no_split_modules = ["DeciLMDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.post_init()

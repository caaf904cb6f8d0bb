# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
#
# mypy: ignore-errors
"""Config of a Llama model whose layers differ: any may lack its attention or its MLP, or have another MLP width."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    """Llama's config with `block_configs`, one entry for each layer.

    An entry has `attention` with `no_op` and `n_heads_in_group`, and `ffn` with `no_op`, `intermediate_size` and
    `hidden_act`. Entries are read as attributes (`block_configs[3].ffn.no_op`) and stored as JSON.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[Any] | None = None, **kwargs: Any) -> None:
        self.block_configs = [_as_object(block) for block in block_configs or []]
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values."""
        plain = copy.copy(self)
        plain.__dict__["block_configs"] = [_as_dict(block) for block in self.block_configs]
        return LlamaConfig.to_dict(plain)


def _as_object(value: Any) -> Any:
    return SimpleNamespace(**{k: _as_object(v) for k, v in value.items()}) if isinstance(value, dict) else value


def _as_dict(value: Any) -> Any:
    return {k: _as_dict(v) for k, v in vars(value).items()} if isinstance(value, SimpleNamespace) else value

"""The layers of an export: those that keep a block, with consecutive numbers, and their slots in the KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig

from dse.decomposition.block_removal import removal_plan
from dse.design_point import DesignPoint
from dse.topology import Topology

__all__ = ["KeptLayers"]


@dataclass(frozen=True, eq=False)
class KeptLayers:
    """How a point with removed blocks changes the list of layers.

    A layer without any block is dropped, and the layers behind it move up. The config counts the attention blocks that
    are left, because engines and caches allocate one KV cache for each. They are numbered in order.

    Attributes:
        topology: The dense model's topology.
        removed: Names of the removed blocks.
        path: Path of the list of layers; "" if no block is removed.
    """

    topology: Topology
    removed: tuple[str, ...]
    path: str

    @classmethod
    def of(cls, topology: Topology, point: DesignPoint) -> KeptLayers:
        """The layers that a point keeps."""
        layer = topology.blocks_by_name[point.removed[0]].layer_module if point.removed else ""
        return cls(topology, point.removed, layer.rpartition(".")[0])

    @cached_property
    def numbers(self) -> Mapping[int, int]:
        """Number of each kept layer in the dense model, to its number in the export."""
        passed = self.topology.passed_layers(self.removed)
        kept = [layer for layer in range(self.topology.layer_count) if layer not in passed]
        return {layer: number for number, layer in enumerate(kept)}

    @cached_property
    def attention(self) -> Mapping[int, str]:
        """Layers that keep attention with a KV cache, in order, to the path of the module that holds its number."""
        blocks = [block for block in self.topology.blocks if block.cache_module and block.name not in self.removed]
        return {block.layer: block.cache_module for block in blocks}

    def renamed(self, name: str) -> str:
        """The name in the export of a module or weight of the dense model."""
        inside = name.removeprefix(f"{self.path}.")
        number, dot, rest = inside.partition(".")
        if not self.path or inside == name or not number.isdecimal():
            return name
        return f"{self.path}.{self.numbers.get(int(number), number)}{dot}{rest}"

    def counted(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Config entries that count or list layers, for the attention blocks that are left."""
        layers = list(self.attention) or list(self.numbers)
        lists = {name: [values[layer] for layer in layers] for name, values in self._lists(config).items()}
        return lists | {_count_name(config): max(len(layers), 1)}

    def removal(self, config: PreTrainedConfig, body_path: str) -> dict[str, Any]:
        """The config entry that the modelling code needs to build the export from the dense architecture.

        Args:
            config: The dense model's config.
            body_path: Path of the base model with a trailing dot; "" for a model without a head.
        """
        plan = removal_plan(self.topology, self.removed)

        def below(path: str) -> str:
            return self.renamed(path).removeprefix(body_path)

        return {
            "built_with": {_count_name(config): self.topology.layer_count, **self._lists(config)},
            "layers": self.path.removeprefix(body_path),
            "passed": [layer for layer in range(self.topology.layer_count) if layer not in self.numbers],
            "groups": self._groups(),
            "blocks": {below(path): items for path, items in plan.blocks.items()},
            "norms": [below(path) for path in plan.norms],
            "cache_slots": {
                below(path): slot for slot, (layer, path) in enumerate(self.attention.items()) if layer != slot
            },
        }

    def _groups(self) -> list[list[int]]:
        """The layers around each remaining attention block: their number, and the index of the one with attention.

        Layers without attention belong to the next attention block, and the last ones to the last block. [] if every
        kept layer has attention.
        """
        if not self.attention or len(self.attention) == len(self.numbers):
            return []
        groups: list[list[int]] = []
        waiting = 0
        for layer in self.numbers:
            if layer in self.attention:
                groups.append([waiting + 1, waiting])
            waiting = 0 if layer in self.attention else waiting + 1
        groups[-1][0] += waiting
        return groups

    def _lists(self, config: PreTrainedConfig) -> dict[str, list[Any]]:
        """Config entries with one value per layer, such as `layer_types`."""
        return {
            name: list(value)
            for name, value in config.to_dict().items()
            if "layer" in name and isinstance(value, (list, tuple)) and len(value) == self.topology.layer_count
        }


def _count_name(config: PreTrainedConfig) -> str:
    """The entry of the config that counts layers; GPT-2 calls it `n_layer`."""
    return str(config.attribute_map.get("num_hidden_layers", "num_hidden_layers"))

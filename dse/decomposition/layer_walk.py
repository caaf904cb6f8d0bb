"""Walk through the layers of a model in order, with the weights of one layer in memory at a time.

The hidden states of all windows wait before the current layer. A layer whose weights are on disk is read when it is
reached and released afterwards. Several devices share the batches: each has a copy of the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dse.decomposition.layer_calls import (
    CallRecorder,
    LayerCall,
    NotSequentialError,
    check_layer_calls,
    layers_replaced,
)
from dse.files import cache_dir
from dse.models import LoadedModel
from dse.models.layer_paths import layer_paths
from dse.models.tensor_store import StoreBudget, TensorStore

__all__ = ["LayerWalk"]

_PROBE_TOKENS = 16
_CHECKED_ON_DISK = 2
"""Layers that are compared with the model's own pass if the weights are on disk: two layers fit into memory."""

_Result = TypeVar("_Result")


class LayerWalk:
    """The layers of a model, and the hidden states of batches of windows before them.

    Args:
        loaded: The dense model, resident or with its weights on disk.
        batches: Token ids, each of shape (windows, tokens).
        devices: Devices that share the batches; None for the model's own.
        budget: Memory for hidden states; None for a share of the device.
        folder: Where states go that do not fit; None for the user's cache.

    Raises:
        NotSequentialError: The layers of this architecture cannot be called one by one.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batches: Sequence[Tensor],
        *,
        devices: Sequence[torch.device] | None = None,
        budget: StoreBudget | None = None,
        folder: Path | None = None,
    ) -> None:
        self.loaded = loaded
        self.batches = batches
        self.paths = layer_paths(loaded.topology)
        self.layers = [loaded.model.get_submodule(path) for path in self.paths]
        if len(self.layers) != loaded.topology.layer_count:
            raise NotSequentialError(f"only {len(self.layers)} of its {loaded.topology.layer_count} layers are known")
        if getattr(loaded.model.config.get_text_config(), "num_kv_shared_layers", 0):
            raise NotSequentialError("its layers read the keys and values of other layers")
        self.devices = tuple(devices) if devices else (loaded.device,)
        self.states = TensorStore(budget or StoreBudget.of(self.devices[0]), folder or cache_dir())
        self._calls: list[list[LayerCall]] = []
        self._recorder = CallRecorder(loaded.model, self.layers)
        self._begin()

    def _begin(self) -> None:
        """Check the layers, then embed all batches."""
        first = self.loaded.device
        resident = self.loaded.checkpoint is None
        checked = len(self.layers) if resident else min(_CHECKED_ON_DISK, len(self.layers))
        with self._outside_layers():
            with self._weights(self.paths[:checked]):
                check_layer_calls(self._recorder, self.batches[0][:1, :_PROBE_TOKENS].to(first), checked)
            for index, batch in enumerate(self.batches):
                hidden, calls = self._recorder.record(batch.to(first))
                self._calls.append(calls)
                self.states.put((0, index), hidden)

    @contextmanager
    def layer(self, index: int) -> Iterator[list[nn.Module]]:
        """The layer with its weights, once for each device."""
        with self._weights([self.paths[index]]):
            first = self.layers[index]
            yield [first, *(copy.deepcopy(first).to(device) for device in self.devices[1:])]

    def map(
        self, replicas: Sequence[nn.Module], work: Callable[[nn.Module, int], _Result], batches: Sequence[int]
    ) -> list[_Result]:
        """Call `work(replica, batch index)` for every batch; each replica takes every n-th batch, in its own thread."""
        count = len(replicas)

        def of_replica(number: int) -> list[_Result]:
            return [work(replicas[number], batch) for batch in batches[number::count]]

        if count == 1:
            return of_replica(0)
        with ThreadPoolExecutor(count) as pool:
            parts = list(pool.map(of_replica, range(count)))
        return [parts[i % count][i // count] for i in range(len(batches))]

    def call(self, layer: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Run layer `index` (or a replica of it) on the hidden states of a batch."""
        return self._calls[batch][index](layer, hidden)

    def hidden(self, layer: nn.Module, index: int, batch: int) -> Tensor:
        """A copy of the states of a batch before layer `index`, on the device of `layer`."""
        return self.states.get((index, batch), next(layer.parameters()).device)

    @contextmanager
    def tail(self) -> Iterator[Callable[[int, Tensor], Any]]:
        """A function (batch, states after the last layer) to the model's outputs, with weights outside the layers."""
        extras = self._recorder.extras

        def passed(*arguments: Any, **keywords: Any) -> Any:
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            return hidden if extras is None else (hidden, *extras)

        def run(batch: int, hidden: Tensor) -> Any:
            def last(*_arguments: Any, **_keywords: Any) -> Any:
                output = hidden.clone()  # not a leaf, so that models may change it in place
                return output if extras is None else (output, *extras)

            with layers_replaced(self.layers, [*[passed] * (len(self.layers) - 1), last]):
                return self.loaded.model(input_ids=self.batches[batch].to(self.loaded.device))

        with self._outside_layers(with_head=True):
            yield run

    @contextmanager
    def _outside_layers(self, *, with_head: bool = False) -> Iterator[None]:
        checkpoint, model = self.loaded.checkpoint, self.loaded.model
        if checkpoint is None:
            yield
            return
        prefix = self.paths[0].rpartition(".")[0]
        head = None if with_head else model.get_output_embeddings()  # type: ignore[no-untyped-call]
        left_out = [prefix, *(path for path, module in model.named_modules() if module is head and head is not None)]
        with checkpoint.present(model, [""], self.loaded.device, without=left_out):
            yield

    def _weights(self, paths: Sequence[str]) -> Any:
        checkpoint = self.loaded.checkpoint
        return nullcontext() if checkpoint is None else checkpoint.present(self.loaded.model, paths, self.devices[0])
